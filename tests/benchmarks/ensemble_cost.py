"""What an ensemble of reward models costs: k adapters and heads on the one resident base, scored one after another.

Measured on the embedded model: the time to score the same episodes with k = 4 and with k = 1, as a ratio of medians in
one run; and the bytes that the members add, against those of one adapter and head. The bar: k members add at most
1.05 · (k − 1) times the bytes of one.
"""

import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig, RewardsConfig
from align.episodes import Episode, collate
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.rewards import RewardModel, RewardSources, reward_sources
from tests.benchmarks.keep import keep

MEMBERS = 4
EPISODES, PROMPT, RESPONSE = 64, 32, 32  # tokens
REPEATS = 5


def run(root: Path) -> int:
    model = AdaptedModel(load_base(BaseModelConfig(dtype="bfloat16")), AdaptersConfig())
    tensors = sum(p.numel() * p.element_size() for p in model.base.model.parameters())
    members: list[RewardModel] = []
    memory, disk = [], []
    for number in range(1, MEMBERS + 1):
        before = _bytes_of(model)
        model.add(f"reward-{number}", seed=number)
        head = ScalarHead(model.hidden_size).initialize(number).to(model.device)
        members.append(RewardModel(f"reward-{number}", head, ScoreStatistics(0.0, 1.0, 1)))
        memory.append(_bytes_of(model) - before + sum(p.numel() * p.element_size() for p in head.parameters()))
        disk.append(_written(model, members[-1], root / str(number)))
    seconds = {k: _seconds(model, _sources(model, members[:k])) for k in (1, MEMBERS)}
    ratio = seconds[MEMBERS] / seconds[1]
    added = {name: sum(sizes[1:]) / ((MEMBERS - 1) * sizes[0]) for name, sizes in (("memory", memory), ("disk", disk))}
    result = {
        "members": MEMBERS,
        "scoring_time_ratio": ratio,
        "bytes_of_one": {"memory": memory[0], "disk": disk[0]},
        "bytes_added_over_those_of_one": added,
        "base_bytes": tensors,
    }
    table = Table("", f"k = {MEMBERS} over k = 1")
    table.add_row("time to score the same episodes", f"{ratio:.2f}")
    for name, value in added.items():
        table.add_row(f"bytes added in {name}, over {MEMBERS - 1} × one adapter and head", f"{value:.3f}")
    Console().print(table)
    keep("ensemble-cost", result)
    return 0 if max(added.values()) <= 1.05 else 1


def _bytes_of(model: AdaptedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.base.model.parameters())


def _written(model: AdaptedModel, member: RewardModel, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(member.adapter, folder)
    save_head(member.head, folder, member.scale)
    return sum(file.stat().st_size for file in folder.iterdir())


def _sources(model: AdaptedModel, members: list[RewardModel]) -> RewardSources:
    return reward_sources(RewardsConfig(), tuple(members), model, model.base.codec(None))


def _seconds(model: AdaptedModel, sources: RewardSources) -> float:
    """The median over some repeats, after one that does not count."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(100, 40_000, (EPISODES, PROMPT + RESPONSE), generator=generator).tolist()
    episodes = [Episode(tuple(ids[:PROMPT]), tuple(ids[PROMPT:]), has_eos=True) for ids in drawn]
    batch = collate(episodes, pad_id=model.base.codec(None).pad_id, device=model.device)
    taken: list[float] = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        sources.score(batch, episodes)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
