"""Rows that were set aside: counted in one line, written to a file, and too many of them an error."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from align.errors import DataError
from data.records import Account, Reject


def describe(account: Account) -> str:
    """For example "1,500 rows in, 1,498 kept, 2 rejected (empty response 2)"."""
    line = f"{account.rows_in:,} rows in, {account.kept:,} kept"
    line += f" ({account.cut:,} of them cut)" if account.cut else ""
    if not account.rejected:
        return line
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in account.rejected)
    return f"{line}, {account.num_rejected:,} rejected ({reasons})"


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """One JSON object a line: source, reason, field, detail. The file exists also if there is no reject."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(reject)) + "\n" for reject in rejects))


def check_rate(account: Account, rejects: Sequence[Reject], *, max_rate: float, what: str, rejects_path: Path) -> None:
    """DataError if more than `max_rate` of the rows were rejected; `what` names the data ("data.sft.train")."""
    rate = account.num_rejected / max(account.rows_in, 1)
    if rate <= max_rate:
        return
    first = f"; the first, {rejects[0].source}: {rejects[0].reason} ({rejects[0].detail})" if rejects else ""
    raise DataError(
        f"{what}: {describe(account)}: {rate:.1%} is more than data.max_reject_rate {max_rate:.1%}{first}. "
        f"All are in {rejects_path}; mend the rows, or raise data.max_reject_rate"
    )
