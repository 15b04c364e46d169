"""Lengths in tokens, and what a base's context has room for: known from its config.json before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from align.config import Config
from align.errors import ConfigError

_POSITIONS = ("max_position_embeddings", "n_positions")  # the second is GPT-2's and its kin's name for it


def context_length_in(folder: Path) -> int | None:
    """Tokens of a row that a base in this folder has positions for; None if it does not say in a config.json."""
    try:
        content: Any = json.loads((folder / "config.json").read_text())
        text = content.get("text_config", content)
        return next((text[name] for name in _POSITIONS if isinstance(text.get(name), int)), None)
    except (OSError, ValueError, AttributeError):
        return None


def fitting_length(length: int, context_length: int | None, *, reserved: int = 0) -> int:
    """`length` tokens, or what the context has beside the reserved ones, those of a response, if that is less.

    Raises:
        ConfigError: it has none.
    """
    if context_length is None or length + reserved <= context_length:
        return length
    if context_length <= reserved:
        raise ConfigError(
            f"ppo.rollout.max_response_length: {reserved}, but the base's context is {context_length} tokens, so that "
            "no prompt has room beside it; shorten it"
        )
    return context_length - reserved


def fitted(config: Config, context_length: int | None) -> Config:
    """The same config with the lengths that its stages come to on such a base. Raises as fitting_length."""
    stages, updates = config.run.stages, dict[str, object]()
    for stage in ("sft", "reward"):
        section = getattr(config, stage)
        length = fitting_length(section.max_length, context_length)
        updates[stage] = section.model_copy(update={"max_length": length})
    if "reward" in stages or "ppo" in stages:  # which draws answers as PPO will
        loss, rollout = config.ppo.loss, config.ppo.rollout
        prompt = fitting_length(rollout.max_prompt_length, context_length, reserved=rollout.max_response_length)
        texts = fitting_length(loss.ptx_max_length, context_length)
        sections = {
            "rollout": rollout.model_copy(update={"max_prompt_length": prompt}),
            "loss": loss.model_copy(update={"ptx_max_length": texts}),
        }
        updates["ppo"] = config.ppo.model_copy(update=sections)
    return config.model_copy(update=updates)


def shortened(config: Config, as_run: Config) -> list[str]:
    """What differs in a fitted config, for people: "sft.max_length is 2048, not 4096"."""
    lengths = {
        "sft.max_length": (config.sft.max_length, as_run.sft.max_length),
        "reward.max_length": (config.reward.max_length, as_run.reward.max_length),
        "ppo.rollout.max_prompt_length": (config.ppo.rollout.max_prompt_length, as_run.ppo.rollout.max_prompt_length),
        "ppo.loss.ptx_max_length": (config.ppo.loss.ptx_max_length, as_run.ppo.loss.ptx_max_length),
    }
    used = {key for key in lengths if key.partition(".")[0] in config.run.stages}
    return [f"{key} is {new}, not {old}" for key, (old, new) in lengths.items() if key in used and old != new]
