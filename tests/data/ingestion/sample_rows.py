"""The sample files, and what a shape makes of rows."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from data.formats import parse_row
from data.ingestion.shapes import SHAPES, Row, Shape, mapped
from data.records import Reject, UnfitError
from tests.data.ingestion.expected import Expected

SAMPLES = Path(__file__).parent / "samples"
MAPS: Mapping[str, Mapping[str, str]] = {
    "shp.tsv": {
        "prompt": "history",
        "first": "human_ref_A",
        "second": "human_ref_B",
        "first_is_better": "labels",
        "margin": "score_ratio",
    },
    "pku-saferlhf.csv": {
        "prompt": "prompt",
        "first": "response_0",
        "second": "response_1",
        "better": "better_response_id",
    },
    "dolly.csv": {"prompt": "instruction + context", "completion": "response"},
}


def sample(name: str) -> list[Row]:
    return [cast(Row, json.loads(line)) for line in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]


def table(name: str) -> list[Row]:
    with (SAMPLES / name).open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if name.endswith(".tsv") else ","))


def outcomes(shape: Shape, rows: list[Row]) -> list[Expected]:
    """What the rows become: records without their source, or (reason, field)."""
    found: list[Expected] = []
    for row in rows:
        try:
            parsed = [parse_row(canonical, "", shape.kind) for canonical in shape.convert(row)]
        except UnfitError as unfit:
            found.append((unfit.reason, unfit.field))
        else:
            found += [(one.reason, one.field) if isinstance(one, Reject) else one for one in parsed]
    return found


def rows_of(shape: Shape) -> list[Row]:
    """The rows of its sample; of all tables for one that is mapped, which also has rows that lack its columns."""
    return sample(shape.name) if shape.name in SHAPES else [row for name in MAPS for row in table(name)]


ALL_SHAPES = [*SHAPES.values(), *(mapped(columns) for columns in MAPS.values())]
