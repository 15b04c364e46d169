"""Reward modelling: TRL's RewardTrainer trains the `reward` adapter and a scalar head on the resident base."""

import logging
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PrinterCallback
from trl.trainer.reward_config import RewardConfig as TRLConfig
from trl.trainer.reward_trainer import RewardTrainer

from align.adapters import AdaptedModel
from align.artifacts import write_directory
from align.config import RewardConfig
from align.context import RewardInputs, StageContext, StageResult
from align.episodes import Episode, collate, score_pass
from align.errors import DataError, InvariantError
from align.generation import generate
from align.heads import ScalarHead, ScoreStatistics, save_head
from align.randomness import keyed_uniforms
from align.restore import lent
from align.statistics import wilson_interval
from data.batching import length_sorted_batches
from data.records import Prompt
from data.tokenization import Codec, TokenizedComparison, encode_comparisons, encode_prompts
from stages.reward import objective
from stages.trainer import ReportToTracker, trainer_arguments

_log = logging.getLogger(__name__)
SFT = "sft"
REWARD = "reward"
_STATISTICS_PROMPTS = 128  # at most: the mean and spread of a score need no more


def run_reward(config: RewardConfig, inputs: RewardInputs, context: StageContext) -> StageResult:
    """Train the `reward` adapter, which starts as a copy of `sft`, and its head on comparisons (Bradley-Terry).

    The score's mean and spread on SFT responses to held-out prompts are saved with the head: PPO normalises by them.

    Raises:
        DataError: too many pairs do not fit, or none does.
        ArtifactError: an input is damaged or does not fit the base.
    """
    model, tracker = context.model, context.tracker
    codec = model.base.codec(context.system_prompt)
    train, train_rejects = encode_comparisons(codec, inputs.train, max_length=config.max_length)
    held_out, held_out_rejects = encode_comparisons(codec, inputs.held_out, max_length=config.max_length)
    account = context.set_aside("train", len(inputs.train), train_rejects)
    account += context.set_aside("held_out", len(inputs.held_out), held_out_rejects)

    if inputs.sft is None:
        model.add(SFT, seed=context.seed)
    else:
        model.load(SFT, inputs.sft.path)
    if inputs.adapter is None:
        model.add(REWARD, copy_of=SFT)
    else:
        model.load(REWARD, inputs.adapter.path)
    head = ScalarHead(model.hidden_size).initialize(context.seed).to(model.device)
    steps = _train(config, train, head, codec, context)

    tracker.progress(0, 2, "held-out pairs")
    chosen_B = score(model, head, [(r.prompt_ids, r.chosen_ids) for r in held_out], codec, config.micro_batch_size)
    rejected_B = score(model, head, [(r.prompt_ids, r.rejected_ids) for r in held_out], codec, config.micro_batch_size)
    tracker.progress(1, 2, "score statistics")
    statistics = measure_scale(config, inputs, head, codec, context)
    tracker.progress(2, 2, "score statistics")

    own = {"stage": "reward", "step": steps, "base_identity": model.base_identity}
    adapter = write_directory(
        context.folder / "adapter",
        lambda path: model.save(REWARD, path),
        kind="adapter",
        **own,  # type: ignore[arg-type]
    )
    saved_head = write_directory(
        context.folder / "head",
        lambda path: save_head(head, path, statistics),
        kind="head",
        **own,  # type: ignore[arg-type]
    )
    metrics = {**_held_out_metrics(chosen_B, rejected_B, train, held_out), "steps": steps}
    metrics |= {"score_mean": statistics.mean, "score_std": statistics.std, "score_responses": statistics.num_responses}
    return StageResult("reward", (adapter, saved_head), metrics, account)


def _train(
    config: RewardConfig, train: list[TokenizedComparison], head: ScalarHead, codec: Codec, context: StageContext
) -> int:
    """Let RewardTrainer train the active adapter and the head; returns the optimizer steps."""
    model = context.model
    rows = [
        {
            "chosen_ids": [*r.prompt_ids, *r.chosen_ids],
            "rejected_ids": [*r.prompt_ids, *r.rejected_ids],
            "length": len(r.prompt_ids) + max(len(r.chosen_ids), len(r.rejected_ids)),
        }
        for r in train
    ]
    with (
        lent(model.base.model),
        model.role(REWARD, train=True),
        tempfile.TemporaryDirectory() as temporary,
    ):
        head.requires_grad_(True)
        trainer = RewardTrainer(
            model=scorer_on_trunk(model, head, pad_id=codec.pad_id),
            args=TRLConfig(
                **trainer_arguments(config, context, Path(temporary)),  # type: ignore[arg-type]
                center_rewards_coefficient=config.centering or None,
                disable_dropout=False,  # adapters.dropout applies here too; TRL would set it to 0
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=model.base.tokenizer,
            callbacks=[ReportToTracker(context.tracker, "reward")],
        )
        if len(trainer.train_dataset) != len(train):  # type: ignore[arg-type]
            raise InvariantError(f"RewardTrainer kept {len(trainer.train_dataset)} of {len(train)} pairs")  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        model.verify_trainable()
        steps = trainer.train().global_step
    head.requires_grad_(False)
    return steps


def scorer_on_trunk(model: AdaptedModel, head: ScalarHead, *, pad_id: int) -> PreTrainedModel:
    """A sequence classifier of transformers around the resident trunk and our head: no second copy of the base.

    Its forward reads the score at the last token that is not `pad_id`; every comparison ends in EOS, which pad never
    is, so that is the real last token.
    """
    config = type(model.base.model.config).from_dict(model.base.model.config.to_dict())
    config.num_labels = 1
    config.pad_token_id = pad_id
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, model.trunk)
    classifier.score = head
    left = [name for name, tensor in (*classifier.named_parameters(), *classifier.named_buffers()) if tensor.is_meta]
    if left:
        raise InvariantError(f"{type(classifier).__name__} keeps weights of its own beside trunk and score: {left}")
    return classifier


@torch.no_grad()
def score(
    model: AdaptedModel,
    head: ScalarHead,
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]],
    codec: Codec,
    batch_size: int,
) -> Tensor:
    """Scores (N,) on the CPU of (prompt ids, response ids), in the order given."""
    scores = torch.zeros(len(pairs))
    with model.role(REWARD):
        for group in length_sorted_batches([len(p) + len(r) for p, r in pairs], batch_size):
            episodes = [Episode(*pairs[i], has_eos=True) for i in group]
            batch = collate(episodes, pad_id=codec.pad_id, device=model.device)
            scores[group] = score_pass(model, head, batch).cpu()
    return scores


def measure_scale(
    config: RewardConfig, inputs: RewardInputs, head: ScalarHead, codec: Codec, context: StageContext
) -> ScoreStatistics:
    """The score's mean and standard deviation on one SFT response to each held-out prompt."""
    model, sampling = context.model, inputs.sampling
    distinct = {record.prompt: Prompt(record.prompt, record.source) for record in inputs.held_out}
    prompts, too_long = encode_prompts(codec, list(distinct.values()), max_prompt_length=sampling.max_prompt_length)
    if not prompts:
        raise DataError(
            f"data.reward: none of the {len(distinct)} held-out prompts fits ppo.rollout.max_prompt_length "
            f"{sampling.max_prompt_length}, so the score's mean and spread cannot be measured; raise it"
        )
    if too_long:
        _log.warning(
            "reward: the score's mean and spread are measured without %d of %d held-out prompts, which are over "
            "ppo.rollout.max_prompt_length %d",
            len(too_long),
            len(distinct),
            sampling.max_prompt_length,
        )
    ids = [prompt.ids for prompt in prompts[:_STATISTICS_PROMPTS]]
    uniforms = keyed_uniforms(context.seed, "statistics", 0, list(range(len(ids))), sampling.max_response_length)
    with model.role(SFT):
        responses = generate(model, codec, ids, sampling=sampling, uniforms_BT=uniforms)
    pairs = [(p, r.ids) for p, r in zip(ids, responses, strict=True)]
    scores_B = score(model, head, pairs, codec, config.micro_batch_size)
    std = scores_B.std(unbiased=False).item() if len(scores_B) > 1 else 0.0
    return ScoreStatistics(scores_B.mean().item(), max(std, 1e-6), len(scores_B))


def _held_out_metrics(
    chosen_B: Tensor, rejected_B: Tensor, train: list[TokenizedComparison], held_out: list[TokenizedComparison]
) -> dict[str, object]:
    """Accuracy and margin, and those of a rule that sees only the lengths (its direction is from the train set)."""

    def right(rows: list[TokenizedComparison], *, longer_wins: bool) -> float:
        lengths = [len(r.chosen_ids) for r in rows], [len(r.rejected_ids) for r in rows]
        return objective.length_rule_correct(*lengths, longer_wins=longer_wins)

    longer_wins = right(train, longer_wins=True) >= right(train, longer_wins=False)
    total = len(held_out)
    accuracy = objective.pair_accuracy(chosen_B, rejected_B).item()
    baseline = right(held_out, longer_wins=longer_wins)
    return {
        "accuracy": accuracy,
        "accuracy_ci95": list(wilson_interval(accuracy * total, total)),
        "length_baseline_accuracy": baseline / total,
        "length_baseline_ci95": list(wilson_interval(baseline, total)),
        "loss": objective.bradley_terry_loss(chosen_B, rejected_B).item(),
        "margin": (chosen_B - rejected_B).mean().item(),
        "held_out_pairs": total,
    }
