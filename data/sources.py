"""Raw rows out of files, hub data sets and data sets of `align ingest`, and whole sources read into records with an
account of every row."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast, overload

from align.artifacts import read_artifact, read_json, sha256_of_file
from align.config import SourceConfig
from align.errors import ArtifactError, DataError
from data.formats import FORMATS, parse_row, shorten
from data.readers import Damage, cut, decode, raw_rows, require_file
from data.records import Account, Comparison, Demonstration, PlainText, Prompt, Record, RecordKind, Reject, Verdict

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, object]
LabelledRow = tuple[str, Row | Reject]  # ("file.jsonl:12", the row)
RecordT = TypeVar("RecordT", bound=Record, covariant=True)

DATASET = "dataset.json"  # what `align ingest` leaves in a data set's folder
_SAMPLES = Path(__file__).parent / "samples"
_SAMPLES_PREFIX = "samples:"


@dataclass(frozen=True)
class Reading(Generic[RecordT]):
    """A source, read. `content_hash` is the SHA-256 of the file's bytes (hub: of the rows; a data set: of its files'
    hashes, with the split beside it), and says what the limit was."""

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
        where, digest = str(source.path), _digest(source, kind)
        rows: Iterable[LabelledRow] = iterate_rows(source.path, limit=source.limit, split=source.split)
    else:
        hub_rows = _load_hub_rows(source)
        rows, where, digest = hub_rows, f"hub data set {source.hub}", _rows_digest(hub_rows)
    records, rejects, account = _parse(rows, kind, where)
    content_hash = digest if source.limit is None else f"{digest}, the first {source.limit} rows"
    return Reading(tuple(records), tuple(rejects), account, content_hash)


def peek(source: SourceConfig, kind: RecordKind, rows: int = 20) -> Account | None:
    """The account of the first rows of a file; None for a hub source, which is not looked at.

    DataError as for `read_records`: also when none of these rows is of a format known for `kind`.
    """
    if source.path is None:
        return None
    _verify_kind(source.path, kind)
    limit = rows if source.limit is None else min(rows, source.limit)
    return _parse(iterate_rows(source.path, limit=limit, split=source.split), kind, str(source.path))[2]


def resolve_path(path: Path) -> Path:
    """`path` itself, or the file of our own that `samples:NAME` names. DataError if there is none."""
    if not str(path).startswith(_SAMPLES_PREFIX):
        return require_file(path)
    sample = _SAMPLES / str(path).removeprefix(_SAMPLES_PREFIX)
    if not sample.is_file():
        files = sorted(file.relative_to(_SAMPLES).as_posix() for file in _SAMPLES.rglob("*.*"))
        known = ", ".join(_SAMPLES_PREFIX + name for name in files if not name.endswith((".md", ".py")))
        raise DataError(f"no sample {path}; the samples are: {known or 'none'}")
    return sample


def iterate_rows(path: Path, *, limit: int | None, split: str = "train") -> Iterator[LabelledRow]:
    """The first `limit` rows, each with its source label; a line that is no JSON object is a Reject.

    Of a data set of `align ingest`, those of `split`. DataError if the file is missing, of an unknown kind, or damaged
    beyond one line.
    """
    files = dataset_files(path, split) if is_dataset(path) else [resolve_path(path)]
    return islice((row for file in files for row in _rows_of(file)), limit)


def _rows_of(path: Path) -> Iterator[LabelledRow]:
    (whole,) = cut(path, chunk_bytes=sys.maxsize)
    for raw in raw_rows(whole):
        row = decode(raw)
        label = f"{path.name}:{'row ' if path.name.endswith('.parquet') else ''}{raw.line}"
        if not isinstance(row, Damage):
            yield label, row
        elif row.ends_file:
            raise DataError(f"{path}:{raw.line}: {row.detail}")
        else:
            yield label, Reject(label, "malformed", "", shorten(row.detail))


def is_dataset(path: Path) -> bool:
    return os.path.isfile(path / DATASET)  # which says no where Path.is_file raises


def has_split(path: Path, split: str) -> bool:
    return is_dataset(path) and any(path.glob(f"{split}-*.parquet"))


def dataset_files(path: Path, split: str) -> list[Path]:
    """The shards of a split, in order. DataError if there is none."""
    files = sorted(path.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{path} has no split {split}; it was made with --held-out 0, or all its rows are in the other")
    return files


def load_hub(source: SourceConfig) -> "Dataset":
    """DataError if it cannot be loaded: says what was asked for, and what to do."""
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
    return loaded


def _load_hub_rows(source: SourceConfig) -> list[LabelledRow]:
    rows = cast(Iterable[Row], load_hub(source))
    return [(f"{source.hub}/{source.split}:row {n}", row) for n, row in enumerate(islice(rows, source.limit), start=1)]


def _parse(rows: Iterable[LabelledRow], kind: RecordKind, where: str) -> tuple[list[Record], list[Reject], Account]:
    """DataError if there is no row in `where`, or none that fits."""
    records: list[Record] = []
    rejects: list[Reject] = []
    first: Row = {}  # that is an object
    for label, row in rows:
        first = first or ({} if isinstance(row, Reject) else row)
        parsed = row if isinstance(row, Reject) else parse_row(row, label, kind)
        if isinstance(parsed, Reject):
            rejects.append(parsed)
        else:
            records.append(parsed)
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
    return records, rejects, Account.of(len(records) + len(rejects), rejects)


def _digest(source: SourceConfig, kind: RecordKind) -> str:
    """Of a file its SHA-256; of a data set, which is verified, that of its manifest."""
    assert source.path is not None
    if not is_dataset(source.path):
        return sha256_of_file(resolve_path(source.path))
    _verify_kind(source.path, kind)
    try:
        return f"{read_artifact(source.path).content_hash}, {source.split}"
    except ArtifactError as error:
        raise ArtifactError(f"{error}; ingest its sources again (`align ingest`)") from None


def _verify_kind(path: Path, kind: RecordKind) -> None:
    """DataError if it is a data set of another kind."""
    if not is_dataset(path):
        return
    content = read_json(path / DATASET)
    made = cast(Mapping[str, object], content).get("kind") if isinstance(content, dict) else None
    if made != kind:
        raise DataError(f"{path} is a {made} data set, where a {kind} one is needed")


def _rows_digest(rows: Iterable[LabelledRow]) -> str:
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()
