"""Raw rows out of files and hub data sets, and whole sources read into records with an account of every row."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast, overload

from align.config import SourceConfig
from align.errors import DataError
from data.formats import FORMATS, parse_row, shorten
from data.records import Account, Comparison, Demonstration, PlainText, Prompt, Record, RecordKind, Reject, Verdict

Row = dict[str, object]
LabelledRow = tuple[str, Row | Reject]  # ("file.jsonl:12", the row)
RecordT = TypeVar("RecordT", bound=Record, covariant=True)

EXTENSIONS = (".jsonl", ".jsonl.gz", ".parquet")
_SAMPLES = Path(__file__).parent / "samples"
_SAMPLES_PREFIX = "samples:"


@dataclass(frozen=True)
class Reading(Generic[RecordT]):
    """A source, read. `content_hash` is the SHA-256 of the file's bytes (hub: of the rows) and the limit."""

    records: tuple[RecordT, ...]
    rejects: tuple[Reject, ...]
    account: Account
    content_hash: str


# fmt: off
@overload
def read_records(source: SourceConfig, kind: Literal["demonstration"]) -> Reading[Demonstration | PlainText]: ...
@overload
def read_records(source: SourceConfig, kind: Literal["comparison"]) -> Reading[Comparison]: ...
@overload
def read_records(source: SourceConfig, kind: Literal["verdict"]) -> Reading[Verdict]: ...
@overload
def read_records(source: SourceConfig, kind: Literal["prompt"]) -> Reading[Prompt]: ...
# fmt: on
def read_records(source: SourceConfig, kind: RecordKind) -> Reading[Record]:
    """The whole source as records of `kind`. DataError if it cannot be read, has no row, or has no row that fits."""
    if source.path is not None:
        path = resolve_path(source.path)
        where, digest = str(path), _file_digest(path)
        rows: Iterable[LabelledRow] = iterate_rows(path, limit=source.limit)
    else:
        hub_rows = _load_hub_rows(source)
        rows, where, digest = hub_rows, f"hub data set {source.hub}", _rows_digest(hub_rows)
    records, rejects, first = _parse(rows, kind)
    account = _checked_account(records, rejects, first, where=where, kind=kind)
    content_hash = hashlib.sha256(f"{digest} limit={source.limit}".encode()).hexdigest()
    return Reading(tuple(records), tuple(rejects), account, content_hash)


def peek(source: SourceConfig, kind: RecordKind, rows: int = 20) -> Account | None:
    """The account of the first rows of a file; None for a hub source, which is not looked at.

    DataError as for `read_records`: also when none of these rows is of a format known for `kind`.
    """
    if source.path is None:
        return None
    path = resolve_path(source.path)
    limit = rows if source.limit is None else min(rows, source.limit)
    records, rejects, first = _parse(iterate_rows(path, limit=limit), kind)
    return _checked_account(records, rejects, first, where=str(path), kind=kind)


def resolve_path(path: Path) -> Path:
    """`path` itself, or the file of our own that `samples:NAME` names. DataError if there is none."""
    if not str(path).startswith(_SAMPLES_PREFIX):
        if not path.is_file():
            raise DataError(f"no data file {path}: {'it is a folder' if path.is_dir() else 'it does not exist'}")
        return path
    sample = _SAMPLES / str(path).removeprefix(_SAMPLES_PREFIX)
    if not sample.is_file():
        files = sorted(file.relative_to(_SAMPLES).as_posix() for file in _SAMPLES.rglob("*"))
        known = ", ".join(_SAMPLES_PREFIX + name for name in files if name.endswith(EXTENSIONS))
        raise DataError(f"no sample {path}; the samples are: {known or 'none'}")
    return sample


def iterate_rows(path: Path, *, limit: int | None) -> Iterator[LabelledRow]:
    """The first `limit` rows of a file, each with its source label; a line that is no JSON object is a Reject.

    Blank lines are no rows. DataError if the file is missing, of an unknown kind, or damaged beyond one line.
    """
    path = resolve_path(path)
    if path.name.endswith(".parquet"):
        rows = _iterate_parquet(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _iterate_jsonl(path)
    else:
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(EXTENSIONS)}")
    return islice(rows, limit)


def _iterate_jsonl(path: Path) -> Iterator[LabelledRow]:
    number = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    label = f"{path.name}:{number}"
                    yield label, _decode_line(content, label)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short: {error}; the last line read is {number}") from error


def _decode_line(line: bytes, label: str) -> Row | Reject:
    try:
        row: object = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and over-long integers
        return Reject(label, "malformed", "", shorten(f"{error}: {line[:40]!r}"))
    return cast(Row, row) if isinstance(row, dict) else Reject(label, "malformed", "", f"no object: {shorten(row)}")


def _iterate_parquet(path: Path) -> Iterator[LabelledRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in cast(list[Row], batch.to_pylist()):
                    number += 1
                    yield f"{path.name}:row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}; the last row read is {number}") from error


def _load_hub_rows(source: SourceConfig) -> list[LabelledRow]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    hub = str(source.hub)
    name = f"hub data set {hub} (subset {source.subset}, split {source.split}, revision {source.revision})"
    try:
        loaded = load_dataset(hub, name=source.subset, split=source.split, revision=source.revision)
    except (ConnectionError, TimeoutError) as error:
        remedy = "with no network, save it as .jsonl or .parquet elsewhere and give its path"
        raise DataError(f"cannot reach {name}: {error}; {remedy}") from error
    except FileNotFoundError as error:
        raise DataError(f"there is no {name}: {error}; check hub and revision (a private one needs a login)") from error
    except (ValueError, OSError, DatasetsError) as error:
        raise DataError(f"cannot load {name}: {error}; check subset, split and revision") from error
    rows = cast(Iterable[Row], loaded)
    return [(f"{hub}/{source.split}:row {n}", row) for n, row in enumerate(islice(rows, source.limit), start=1)]


def _parse(rows: Iterable[LabelledRow], kind: RecordKind) -> tuple[list[Record], list[Reject], Row]:
    """The records, the rejects, and the first row that is an object (for its keys)."""
    records: list[Record] = []
    rejects: list[Reject] = []
    first: Row = {}
    for label, row in rows:
        parsed = row if isinstance(row, Reject) else parse_row(row, label, kind)
        if not first and not isinstance(row, Reject):
            first = row
        if isinstance(parsed, Reject):
            rejects.append(parsed)
        else:
            records.append(parsed)
    return records, rejects, first


def _checked_account(
    records: list[Record], rejects: list[Reject], first: Row, *, where: str, kind: RecordKind
) -> Account:
    if not records and not rejects:
        raise DataError(f"{where} is empty: it has no rows")
    if not records:
        reject = rejects[0]
        field = f" in {reject.field!r}" if reject.field else ""
        raise DataError(
            f"{where}: none of the {len(rejects)} rows read is a {kind}; the first, {reject.source}: {reject.reason}"
            f"{field} ({reject.detail}). Keys found: {', '.join(first) or 'none'}. "
            f"Known formats of a {kind}: {'; '.join(FORMATS[kind])}"
        )
    return Account.of(len(records) + len(rejects), rejects)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows_digest(rows: Iterable[LabelledRow]) -> str:
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()
