"""Scorers that are not adapters on the resident base: a sequence classifier of transformers, a Python function."""

import importlib
import math
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import ConfigError, ModelError, RewardFunctionError

_BATCH_SIZE = 32


class Classifier:
    """A sequence classifier with its own tokenizer, frozen, beside the resident base.

    Args:
        model: a local folder or a hub id.
        label: the class whose log-odds are the score; None for a classifier with one output, which is the score.
        sees_prompt: it reads prompt and response as a pair, otherwise the response alone.

    Raises:
        ModelError: it cannot be loaded, or its head would be random.
        ConfigError: it has no such label.
    """

    def __init__(
        self, model: str, *, revision: str | None, label: str | None, sees_prompt: bool, device: torch.device
    ) -> None:
        from accelerate.utils.memory import should_reduce_batch_size
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        where = f"reward source {model!r}"
        if Path(model).is_absolute() and not Path(model).is_dir():
            raise ModelError(f"{where}: there is no such folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
            loaded, info = cast(
                "tuple[Any, dict[str, Any]]",
                AutoModelForSequenceClassification.from_pretrained(
                    model, revision=revision, use_safetensors=True, output_loading_info=True
                ),
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if should_reduce_batch_size(error):
                raise  # memory, not the model
            raise ModelError(f"{where} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        if info["missing_keys"]:
            raise ModelError(f"{where} is no trained classifier: it lacks {min(info['missing_keys'])}")
        self._model = loaded.to(device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._label = _label_index(loaded.config, label, where)
        self._is_multi_label = loaded.config.problem_type == "multi_label_classification"
        self._max_length = _longest(loaded, tokenizer)
        self._sees_prompt = sees_prompt
        self._device = device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores (B,) float32: log p(label) − log(1 − p(label)), or the one output. Of labels that do not exclude one
        another, each with a sigmoid of its own, that is the logit. Texts too long for the model are cut off."""
        scores = []
        for start in range(0, len(responses), _BATCH_SIZE):
            chunk = slice(start, start + _BATCH_SIZE)
            texts = (prompts[chunk], responses[chunk]) if self._sees_prompt else (responses[chunk],)
            encoded = self._tokenizer(
                *map(list, texts), truncation=True, max_length=self._max_length, padding=True, return_tensors="pt"
            )
            logits_BC = self._model(**encoded.to(self._device)).logits.float()
            is_logit = self._is_multi_label or logits_BC.shape[1] == 1
            scores.append(logits_BC[:, self._label] if is_logit else log_odds(logits_BC, self._label))
        return torch.cat(scores)


def log_odds(logits_BC: Tensor, label: int) -> Tensor:
    """log p − log(1 − p) of one class under the softmax: (B,) from (B, C). Unlike a logit, not changed by a shift."""
    assert logits_BC.shape[1] > 1, logits_BC.shape
    others = [c for c in range(logits_BC.shape[1]) if c != label]
    return logits_BC[:, label] - logits_BC[:, others].logsumexp(-1)


def _longest(model: Any, tokenizer: Any) -> int | None:
    """Tokens that the classifier takes; None if neither it nor its tokenizer sets a limit. Tokenizers that know of none
    say 10³⁰, and RoBERTa's kind counts positions from behind the padding's."""
    embeddings = getattr(model.base_model, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    limits = [tokenizer.model_max_length]
    if isinstance(positions, nn.Embedding):
        limits.append(positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1))
    at_most = min(limits)
    return at_most if at_most < 10**9 else None


def _label_index(config: Any, label: str | None, where: str) -> int:
    if config.num_labels == 1:
        if label is not None:
            raise ConfigError(f"{where} has one output and no labels: leave label {label!r} out")
        return 0
    labels = {str(name): int(index) for index, name in config.id2label.items()}
    if label not in labels:
        raise ConfigError(f"{where}: name the label that is the reward; it has {', '.join(labels)}, not {label!r}")
    return labels[label]


class RewardFunction:
    """The user's own `module:function`, called as function(prompt, response) on a thread of its own.

    The module is looked for where Python looks: installed, or in the folder that the command is run in.

    Raises:
        ConfigError: there is no such module or function.
    """

    def __init__(self, target: str, *, timeout_seconds: float) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._function = find_function(target)
        self._calls: queue.Queue[tuple[str, str]] = queue.Queue()
        self._answers: queue.Queue[object] = queue.Queue()
        self._thread: threading.Thread | None = None

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores (B,) float32. RewardFunctionError: it raised, was too slow, or gave back no finite number."""
        scores = [self._call(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def _call(self, prompt: str, response: str) -> float:
        if self._thread is None:  # a daemon, so that a function that never returns does not keep the process alive
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._calls.put((prompt, response))
        try:
            answer = self._answers.get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise RewardFunctionError(
                f"{self._target} took more than timeout_seconds {self._timeout_seconds:g} for the response "
                f"{response[:80]!r}; make it faster, or raise timeout_seconds of this reward source"
            ) from None
        if isinstance(answer, BaseException):
            raise RewardFunctionError(
                f"{self._target} raised {type(answer).__name__}: {answer} for the response {response[:80]!r}"
            ) from answer
        if isinstance(answer, Tensor | np.ndarray | np.generic) and math.prod(answer.shape) == 1:
            answer = answer.item()  # as most scorers give it
        if isinstance(answer, bool | int | float) and math.isfinite(answer):
            return float(answer)
        raise RewardFunctionError(
            f"{self._target} gave back {answer!r} for the response {response[:80]!r}; it must be a finite number"
        )

    def _serve(self) -> None:
        while True:
            prompt, response = self._calls.get()
            try:
                self._answers.put(self._function(prompt, response))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it travels to the caller, who names it
                self._answers.put(error)


def find_function(target: str) -> Callable[[str, str], object]:
    """Import `module:function`. ConfigError if it is not there."""
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigError(
            f"reward source {target}: importing {module_name} failed: {type(error).__name__}: {error}. It must be "
            "installed, or lie in the folder that the command is run in"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward source {target}: {module.__file__} has no function {name}")
    return cast("Callable[[str, str], object]", function)
