"""Reward functions as a user would write them, for the tests."""

import time

import numpy as np
import torch


def share_of_a(prompt: str, response: str) -> float:
    return response.count("a") / max(len(response), 1)


def lengths(prompt: str, response: str) -> float:
    return 1000 * len(prompt) + len(response)


def raising(prompt: str, response: str) -> float:
    raise KeyError("colour")


def slow(prompt: str, response: str) -> float:
    time.sleep(30)
    return 0.0


def nan(prompt: str, response: str) -> float:
    return float("nan")


def leaving(prompt: str, response: str) -> float:
    raise SystemExit(3)


def of_numpy(prompt: str, response: str) -> object:
    return np.float32(len(response))


def of_torch(prompt: str, response: str) -> object:
    return torch.tensor([len(response)])


def two(prompt: str, response: str) -> object:
    return torch.zeros(2)


def text(prompt: str, response: str) -> str:
    return "good"


def share_of_letters(prompt: str, response: str) -> float:
    """Small letters among the characters: a third of them may be had by chance, all can be learnt."""
    return sum("a" <= c <= "z" for c in response) / max(len(response), 1)


def same(prompt: str, response: str) -> float:
    return 0.7
