"""Small preference data that a tiny model can learn: answers of letters are good, answers of digits are bad."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_pairs(path: Path, count: int, *, seed: int, kind: str = "sure") -> Path:
    """`kind`: "sure", "soft" (a preference of 0.95, and one of 0.05 where the sides are swapped), "ties" (a third are
    of two good answers), or "unpaired" (one answer and whether it is good)."""
    draw = random.Random(seed)

    def answer(is_good: bool) -> str:
        return "".join(draw.choice("abcdefghijklm" if is_good else "0123456789") for _ in range(6))

    rows: list[Mapping[str, object]] = []
    for number in range(count):
        prompt = f"Question {draw.randrange(10**6)}?"
        good, bad = answer(True), answer(False)
        if kind == "unpaired":
            is_good = number % 3 == 0
            rows.append({"prompt": prompt, "completion": good if is_good else bad, "label": is_good})
        elif kind == "ties" and number % 3 == 0:
            rows.append({"prompt": prompt, "chosen": good, "rejected": answer(True), "preference": 0.5})
        elif kind == "soft" and number % 2:
            rows.append({"prompt": prompt, "chosen": bad, "rejected": good, "preference": 0.05})
        else:
            sure = {"preference": 0.95} if kind == "soft" else {}
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad, **sure})
    return _write(path, rows)


def _write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
