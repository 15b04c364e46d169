"""A small config with its data, written to a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

CONFIG = """\
run:
  name: small
base: {model: "tiny:llama", device: cpu}
adapters: {rank: 2}
data:
  sft: {train: demonstrations.jsonl, held_out_fraction: 0.3}
  reward: {train: comparisons.jsonl, held_out_fraction: 0.3}
  ppo: {train: prompts.jsonl, held_out_fraction: 0.3}
sft:
  learning_rate: 1e-4
ppo:
  updates: 4
  rollout: {episodes: 8, max_response_length: 8}
  loss: {minibatches: 2, micro_batch_size: 2}
"""


def write_recipe(folder: Path, *, num_rows: int = 20) -> Path:
    """The config's path. Its data lies beside it."""
    prompts = [f"What do you think of number {i}?" for i in range(num_rows)]
    write_rows(folder / "demonstrations.jsonl", [{"prompt": p, "completion": "It is fine."} for p in prompts])
    write_rows(folder / "comparisons.jsonl", [{"prompt": p, "chosen": "Yes.", "rejected": "No."} for p in prompts])
    write_rows(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    path = folder / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
