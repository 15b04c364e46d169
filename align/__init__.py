"""RLHF on one resident base model: SFT, reward model and PPO as LoRA adapters, under Ray."""

__version__ = "0.1.0"
