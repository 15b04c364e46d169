"""What is done when memory runs out: micro-batches are computed in parts, and if that is not enough, what to change."""

from align.config import Config


def micro_batch_size(step: str, config: Config) -> int:
    """Rows that a step computes at once."""
    sizes = {"sft": config.sft.micro_batch_size, "reward": config.reward.micro_batch_size}
    return sizes.get(step) or (config.ppo.loss.micro_batch_size if step == "ppo" else config.ppo.rollout.batch_size)


def next_split(micro_batch_size: int, split: int) -> int | None:
    """In how many parts to compute a micro-batch that did not fit in `split`: twice as many, or the least more that
    divide it evenly; None if a part was one row already."""
    more = [parts for parts in range(2 * split, micro_batch_size + 1) if micro_batch_size % parts == 0]
    return more[0] if more else None


def to_need_less(step: str, again: str) -> str:
    """The remedy, once one row at a time does not fit. `again` is the command that continues the run."""
    stage = "ppo" if step == "evaluation" else step
    changes = ["base.dtype=bfloat16 where the device computes in it"]
    if step != "evaluation":  # which goes nowhere backwards
        changes.append(f"{'ppo.loss' if stage == 'ppo' else stage}.gradient_checkpointing=true")
    if stage == "ppo":
        changes.append("a smaller ppo.rollout.max_response_length or max_prompt_length")
    else:
        changes.append(f"a smaller {stage}.max_length")
    if stage != "sft":
        changes.append("a smaller ppo.rollout.batch_size, of responses generated side by side")
    return (
        f"One row at a time does not fit. Change: {', '.join(changes)}, or more memory; align "
        f"plan says what each part takes. Then, with each KEY that you changed allowed: {again} --allow-change KEY"
    )
