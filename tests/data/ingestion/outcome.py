"""`align ingest` as the tests call it, and what must be true of whatever it leaves behind.

All that these tests know of the command is in this module: its options, its files, its exit codes.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner, Result

from align.cli import app

ROOT = Path(__file__).parents[3]


class Account(TypedDict):
    rows_in: int
    kept: int
    rejected: dict[str, int]


class WholeAccount(Account):
    sources: dict[str, Account]


@dataclass(frozen=True)
class Outcome:
    """Of one call: `account` is there if the data set is."""

    result: Result
    folder: Path
    account: WholeAccount | None


def command(files: list[Path], to: Path, *options: str) -> list[str]:
    return ["ingest", *map(str, files), "--to", str(to), "--quiet", *options]


def ingest_files(files: list[Path], to: Path, *options: str) -> Outcome:
    """In this process."""
    result = CliRunner().invoke(app, command(files, to, *options))
    account = to / "account.json"
    return Outcome(result, to, json.loads(account.read_text(encoding="utf-8")) if account.exists() else None)


def start_ingestion(files: list[Path], to: Path, *options: str, hash_seed: int = 0) -> subprocess.Popen[bytes]:
    """In a process, and process group, of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "align.cli", *command(files, to, *options)],
        cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": str(hash_seed)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def check(outcome: Outcome) -> None:
    """A data set whose rows add up, or one message and nothing left; never a traceback."""
    result, folder = outcome.result, outcome.folder
    said = f"{result.output}\n{result.exc_info}"
    assert result.exception is None or isinstance(result.exception, SystemExit), said
    assert result.exit_code in (0, 2), said
    assert "Traceback" not in result.output, said
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")] == []
    if result.exit_code == 2:
        assert not folder.exists(), said
        assert result.stderr.count("error: ") >= 1, said
        return
    assert outcome.account is not None, said
    _check_account(outcome.account, folder)


def _check_account(account: WholeAccount, folder: Path) -> None:
    sources = account["sources"].values()
    for own in (account, *sources):
        assert own["rows_in"] == own["kept"] + sum(own["rejected"].values())
        assert min(own["rows_in"], own["kept"], *own["rejected"].values()) >= 0
    assert account["rows_in"] == sum(own["rows_in"] for own in sources)
    assert account["kept"] == sum(own["kept"] for own in sources) == len(kept_rows(folder))
    assert account["rejected"] == Counter(cast(str, reject["reason"]) for reject in rejects(folder))


def kept_rows(folder: Path) -> list[dict[str, object]]:
    shards = sorted(folder.glob("train-*.parquet")) + sorted(folder.glob("held_out-*.parquet"))
    return [cast(dict[str, object], row) for shard in shards for row in pq.read_table(shard).to_pylist()]


def rejects(folder: Path) -> list[dict[str, object]]:
    with pa.CompressedInputStream(pa.OSFile(str(folder / "rejects.jsonl.zst"), "rb"), "zstd") as file:
        return [json.loads(line) for line in file.read().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
