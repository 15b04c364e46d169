import json
from pathlib import Path

import pytest

from align.errors import DataError
from data.records import Account, Reject
from data.rejects import check_rate, describe, write_rejects

REJECTS = [Reject("f.jsonl:12", "empty response", "chosen", "''"), Reject("f.jsonl:90", "malformed", "", "é\ud800")]
ACCOUNT = Account.of(1500, REJECTS)


def test_an_account_is_described_in_one_line() -> None:
    assert describe(Account(1500, 1500, ())) == "1,500 rows in, 1,500 kept"
    assert describe(Account(1500, 1500, (), cut=12)) == "1,500 rows in, 1,500 kept (12 of them cut)"
    assert describe(ACCOUNT) == "1,500 rows in, 1,498 kept, 2 rejected (empty response 1, malformed 1)"


def test_rejects_are_written_one_a_line_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rejects.jsonl"
    write_rejects(path, REJECTS)
    assert [Reject(**json.loads(line)) for line in path.read_text().splitlines()] == REJECTS


def test_a_rate_at_the_limit_passes_and_one_above_names_counts_first_row_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    check_rate(ACCOUNT, REJECTS, max_rate=2 / 1500, what="data.sft.train", rejects_path=path)
    with pytest.raises(DataError) as caught:
        check_rate(ACCOUNT, REJECTS, max_rate=0.001, what="data.sft.train", rejects_path=path)
    assert str(caught.value) == (
        "data.sft.train: 1,500 rows in, 1,498 kept, 2 rejected (empty response 1, malformed 1): 0.1% is more than "
        "data.max_reject_rate 0.1%; the first, f.jsonl:12: empty response (''). "
        f"All are in {path}; mend the rows, or raise data.max_reject_rate"
    )
