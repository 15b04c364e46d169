"""The three that `rollout` times: our generation, transformers.generate, and its continuous batching.

All are given the same base and the same adapter. The peers' model is loaded anew, with PEFT's layers and transformers'
attention as they come; ours changes both in its own copy alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from align.adapters import AdaptedModel
from align.base import load_base
from align.config import AdaptersConfig, BaseModelConfig
from align.context import Sampling
from align.generation import generate
from tests.benchmarks.rollout_task import BATCHES, GENERATE, OURS, SLOTS, Run, Work, until_eos

POLICY = "policy"
_PAGE = 32  # tokens of a page of generate_batch's cache: the default of 256 would hold one answer and much air
Sample = Callable[[Work], Sequence[Sequence[int]]]  # the answers to each prompt in turn; padding may follow


def load_ours(base: str, adapter: Path, dtype: str) -> AdaptedModel:
    config = BaseModelConfig.model_validate({"model": base, "dtype": dtype, "device": "cpu"})
    model = AdaptedModel(load_base(config), AdaptersConfig())
    model.load(POLICY, adapter)
    return model


def load_theirs(base: Path, adapter: Path, dtype: str) -> PeftModel:
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)))
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def load_sides(base: Path, adapter: Path, dtype: str) -> dict[str, Sample]:
    ours, theirs = load_ours(str(base), adapter, dtype), load_theirs(base, adapter, dtype)
    return {
        OURS: lambda work: sample_ours(ours, work),
        GENERATE: lambda work: sample_theirs(theirs, work),
        BATCHES: lambda work: sample_in_batches(theirs, work),
    }


def sample_ours(model: AdaptedModel, work: Work) -> list[tuple[int, ...]]:
    prompts = [ids for ids in work.prompts for _ in range(work.per_prompt)]
    longest = max(map(len, prompts))
    sampling = Sampling(1.0, max_response_length=work.max_tokens, max_prompt_length=longest, batch_size=SLOTS)
    codec = replace(model.base.codec(None), eos_ids=work.eos_ids, pad_id=work.pad_id)
    uniforms_BT = np.random.default_rng(work.seed).random((len(prompts), work.max_tokens))
    with model.role(POLICY):
        responses = generate(model, codec, prompts, sampling=sampling, uniforms_BT=uniforms_BT)
    return [response.ids for response in responses]


def sample_theirs(model: PeftModel, work: Work) -> list[list[int]]:
    """As many prompts at once as fill the slots; each batch goes on until its last answer has ended."""
    torch.manual_seed(work.seed)
    at_once = max(1, SLOTS // work.per_prompt)
    answers: list[list[int]] = []
    for start in range(0, len(work.prompts), at_once):
        ids_BP = torch.tensor(work.prompts[start : start + at_once])
        out_BT = model.generate(
            input_ids=ids_BP, attention_mask=torch.ones_like(ids_BP), generation_config=_generation_config(work)
        )
        answers += out_BT[:, ids_BP.shape[1] :].tolist()
    return answers


def sample_in_batches(model: PeftModel, work: Work) -> list[list[int]]:
    """generate_batch belongs to the model inside, in which PEFT's layers stand. Answers to one prompt in any order."""
    longest = max(map(len, work.prompts)) + work.max_tokens
    config = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=SLOTS * (longest // _PAGE + 2),  # one more than needed: with 15 % left or less none would enter
        max_batch_tokens=SLOTS * longest,
        max_requests_per_batch=SLOTS,
        seed=work.seed,
    )
    inner = cast(GenerationMixin, model.get_base_model())
    outputs = inner.generate_batch(
        [list(ids) for ids in work.prompts],
        generation_config=_generation_config(work),
        continuous_batching_config=config,
    )
    return [output.generated_tokens for output in outputs.values()]


def _generation_config(work: Work) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.max_tokens,
        eos_token_id=list(work.eos_ids), pad_token_id=work.pad_id, num_return_sequences=work.per_prompt,
    )  # fmt: skip


def time_run(sample: Sample, work: Work) -> Run:
    """Raises RuntimeError where answers are missing."""
    started = time.perf_counter()
    answers = sample(work)
    seconds = time.perf_counter() - started
    eos = frozenset(work.eos_ids)
    lengths = [len(until_eos(ids, eos)) for ids in answers]
    expected = len(work.prompts) * work.per_prompt
    if len(lengths) != expected or 0 in lengths:
        raise RuntimeError(f"{expected} answers were to come, their lengths are {lengths}")
    return Run(seconds, lengths)
