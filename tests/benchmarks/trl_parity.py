"""On one stored rollout, our PPO formulas against the numbers that TRL 1.12.0's own PPOTrainer computed, in float64.

Where we depart from TRL, our functions are first given TRL's choice (a mask, a factor), to show that the formulas are
the same; then without it, to show what the departure changes.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.tiny import find_tiny
from stages.ppo import objective
from tests.benchmarks.keep import keep
from tests.benchmarks.peer.installation import VERSION, finish, install_peer, start
from tests.benchmarks.peer.scripted import arbitrary_score
from tests.benchmarks.replay import Replay, Settings, relative_error

TOLERANCE = 1e-6
FLOAT32_TOLERANCE = 1e-5  # of what our own pass computes, which is float32 by design
PAD_ID = 256  # <|endoftext|>, the pad token that the peer is given
EOS_ID = 258  # <|im_end|>
SETTINGS = Settings(temperature=0.7, kl=0.1, gamma=0.99, lam=0.95, clip=0.2, value_clip=0.2, vf=0.1, penalty=1.0)
EPISODES, EPOCHS, MINIBATCHES = 16, 2, 2


@dataclass(frozen=True)
class Row:
    """`error` is max |ours − TRL's| relative to the largest |TRL's|; held if at most `allowed`."""

    name: str
    error: float
    allowed: float | None  # None: a departure, shown and not judged

    @property
    def held(self) -> bool:
        return self.allowed is None or self.error <= self.allowed


def run(root: Path) -> int:
    """Capture, compare, print and keep the result; returns the exit code."""
    captured = _capture(root / "trl-parity")
    same = _rollout_rows(captured)
    departures: dict[str, str] = _rollout_departures(captured)
    model = AdaptedModel(load_base(BaseModelConfig(model="tiny:llama", device="cpu")), AdaptersConfig())
    for step in range(EPOCHS * MINIBATCHES):
        replay = Replay(captured, step, SETTINGS, find_tiny("llama"), PAD_ID)
        same += _step_rows(replay, step, model)
        if step in (0, EPOCHS * MINIBATCHES - 1):
            departures |= _step_departures(replay, step)
    table = Table("the same formula, on TRL's masks", "relative error", "held")
    for row in same:
        table.add_row(row.name, f"{row.error:.2g}", "yes" if row.held else "NO")
    Console().print(table)
    table = Table("where we depart", "what it changes")
    for name, effect in departures.items():
        table.add_row(name, effect)
    Console().print(table)
    result = {
        "trl": VERSION,
        "dtype": "float64 (TRL's sampler hands over float32 logprobs, which both sides take as they are)",
        "settings": asdict(SETTINGS),
        "same": [asdict(row) | {"held": row.held} for row in same],
        "departures": departures,
    }
    keep("trl-parity", result)
    return 0 if all(row.held for row in same) else 1


def _capture(folder: Path) -> dict[str, Tensor]:
    """One update of TRL's trainer on a tiny float64 llama: 2 epochs of 2 minibatches, at a learning rate that moves the
    policy far enough for both clips to bite."""
    draw = random.Random(0)
    s = SETTINGS
    arguments: dict[str, object] = {
        "total_episodes": EPISODES, "per_device_train_batch_size": EPISODES, "num_ppo_epochs": EPOCHS,
        "num_mini_batches": MINIBATCHES, "local_rollout_forward_batch_size": EPISODES, "learning_rate": 3e-3,
        "response_length": 12, "temperature": s.temperature, "kl_coef": s.kl, "gamma": s.gamma, "lam": s.lam,
        "vf_coef": s.vf, "cliprange": s.clip, "cliprange_value": s.value_clip, "missing_eos_penalty": s.penalty,
    }  # fmt: skip
    prompts = [[draw.randrange(250) for _ in range(draw.randrange(4, 12))] for _ in range(EPISODES)]
    job: dict[str, object] = {
        "seed": 0, "model": str(find_tiny("llama")), "pad_token": "<|endoftext|>", "eos_bias": 4.0,
        "prompts": prompts, "arguments": arguments,
    }  # fmt: skip
    finish(start("tests.benchmarks.peer.capture", job, folder, peer=install_peer()), folder)
    return load_file(folder / "captured.safetensors")


def bessel(mask_BT: Tensor) -> float:
    """What turns our whitening, by the variance over n, into TRL's, by that over n − 1."""
    n = int(mask_BT.sum())
    return ((n - 1) / n) ** 0.5


def _estimates(t: dict[str, Tensor], mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Our rewards, advantages before whitening, and returns, with `mask_BT` as the response."""
    kl_BT = objective.kl_k1(t["rollout/logprobs"], t["rollout/ref_logprobs"])
    rewards_BT = objective.token_rewards(t["rollout/scores"], kl_BT.double(), mask_BT, kl_coefficient=SETTINGS.kl)
    values_BT = t["rollout/values"] * mask_BT
    return rewards_BT, *objective.gae(rewards_BT, values_BT, mask_BT, gamma=SETTINGS.gamma, lam=SETTINGS.lam)


def _raw_scores(t: dict[str, Tensor]) -> Tensor:
    """What the scripted reward said, before TRL took the penalty: of prompt and response up to EOS, without padding.

    Not up to `sequence_lengths`: TRL also ends a response at a pad token that the policy has sampled itself.
    """
    rows: list[list[int]] = []
    for query, response in zip(t["rollout/queries"].tolist(), t["rollout/responses"].tolist(), strict=True):
        end = response.index(EOS_ID) + 1 if EOS_ID in response else len(response)
        rows.append([token for token in query + response[:end] if token != PAD_ID])
    return torch.tensor([arbitrary_score(row) for row in rows], dtype=torch.float64)


def _rollout_rows(t: dict[str, Tensor]) -> list[Row]:
    """Rewards to advantages. TRL's mask reaches one token past EOS; given it, our functions must say what TRL says."""
    mask_BT, mask_p1_BT = ~t["rollout/padding_mask"], ~t["rollout/padding_mask_p1"]
    shaped_B = objective.shaped_scores(
        _raw_scores(t), t["rollout/contain_eos_token"], mask_BT.sum(-1), clip=None,
        missing_eos_penalty=SETTINGS.penalty, token_penalty=0.0,
    )  # fmt: skip
    rewards_BT, advantages_BT, returns_BT = _estimates(t, mask_p1_BT)
    whitened_BT = objective.whiten([advantages_BT], [mask_BT])[0] * bessel(mask_BT)
    pairs = {
        "scores, less the penalty for a missing EOS": (shaped_B, t["rollout/scores"]),
        "rewards": (rewards_BT, t["rollout/rewards"]),
        "returns": (returns_BT, t["rollout/returns"]),
        "advantages, whitened": (whitened_BT, t["rollout/advantages"]),
    }
    return [Row(name, relative_error(*pair), TOLERANCE) for name, pair in pairs.items()]


def _rollout_departures(t: dict[str, Tensor]) -> dict[str, str]:
    mask_BT = ~t["rollout/padding_mask"]
    _, advantages_BT, returns_BT = _estimates(t, mask_BT)
    whitened_BT = objective.whiten([advantages_BT], [mask_BT])[0]
    theirs_BT = t["rollout/advantages"]
    cosine = torch.cosine_similarity(whitened_BT[mask_BT], theirs_BT[mask_BT], dim=0).item()
    ended = int(t["rollout/contain_eos_token"].sum())
    gap = relative_error(returns_BT * mask_BT, t["rollout/returns"] * mask_BT)
    return {
        "the score stands on the last token, not one past EOS": (
            f"{ended} of {len(mask_BT)} responses end: TRL gives them one more step, from V(after EOS); whitened "
            f"advantages have cosine {cosine:.4f}, differ by up to {relative_error(whitened_BT, theirs_BT):.2g} of the "
            f"largest, returns by up to {gap:.2g}"
        ),
        "whitening by the variance over n, not n − 1": f"our advantages × {bessel(mask_BT):.5f} are TRL's",
        "0 in padding, not INVALID_LOGPROB = 1": "nothing: padding is masked, and TRL's 1 − 1 is 0",
    }


def _step_rows(replay: Replay, step: int, model: AdaptedModel) -> list[Row]:
    """One backward pass: losses from TRL's stored logprobs and values, gradients from the same weights."""
    name = f"minibatch {step + 1}"
    stored = replay.losses_of_stored()
    rows = [
        Row(f"{name}: policy loss", relative_error(stored.policy, replay.captured("pg_loss")), TOLERANCE),
        Row(f"{name}: value loss", relative_error(stored.value, replay.captured("vf_loss")), TOLERANCE),
    ]
    gradient = replay.gradient(as_trl=True)
    rows.append(Row(f"{name}: gradient", relative_error(gradient, replay.captured_gradient()), TOLERANCE))
    logprobs_error, gradient_error = replay.own_pass(model)
    rows.append(Row(f"{name}: logprobs by our own pass, float32", logprobs_error, FLOAT32_TOLERANCE))
    rows.append(Row(f"{name}: policy gradient through it, float32", gradient_error, FLOAT32_TOLERANCE))
    return rows


def _step_departures(replay: Replay, step: int) -> dict[str, str]:
    ours, theirs = (replay.by_model(g) for g in (replay.gradient(as_trl=False), replay.captured_gradient()))
    angles = [f"{torch.cosine_similarity(*pair, dim=0).item():.4f}" for pair in zip(ours, theirs, strict=True)]
    effects = {
        f"minibatch {step + 1}: all departures together": (
            f"cosine of the policy's gradients {angles[0]}, of the value model's {angles[1]}; "
            f"{replay.clipped():.0%} of the ratios and {replay.values_clipped():.0%} of the values are clipped"
        )
    }
    if step == 0:
        effects["old logprobs from a pass like the learner's, not from the sampler"] = (
            f"TRL's first ratio is off by up to {replay.ratio_error():.1g}, ours is 1"
        )
        effects["temperature T, not T + 1e-7"] = f"logprobs differ by up to {replay.temperature_gap():.1g} nats"
        effects["policy/approxkl over response tokens, not also over padding"] = replay.approxkl()
    return effects
