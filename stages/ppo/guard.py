"""The guard: looks at held-out prompts now and then, remembers the best state, and says when to stop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from align.config import GuardConfig
from align.rewards import RewardSources, judge
from align.sampler import Sampler
from data.tokenization import TokenizedPrompt
from stages.ppo.actor_critic import ActorCritic
from stages.ppo.rollout import POLICY, REFERENCE


@dataclass(frozen=True)
class HeldOut:
    """What a look looks at, the same prompts and uniforms each time, so that looks can be compared."""

    prompts: list[TokenizedPrompt]
    sampler: Sampler
    sources: RewardSources
    micro_batch_size: int


@dataclass
class Guard:
    """Owns the best state by held-out score: the mean of the standardised scores, without the KL penalty."""

    config: GuardConfig
    held_out: HeldOut
    best_score: float = float("-inf")
    best_update: int = 0
    looks_below: int = 0
    best: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def is_due(self, update: int) -> bool:
        """Before the first update, and then after every so many."""
        return self.config.every is not None and update % self.config.every == 0

    def look(self, learner: ActorCritic, *, update: int) -> dict[str, float]:
        """Measure the policy as it is after `update` updates, and remember it if it is the best so far."""
        score, kl = measure(self.held_out)
        if score > self.best_score:
            self.best_score, self.best_update, self.looks_below = score, update, 0
            self.best = learner.snapshot()
        else:
            self.looks_below += 1
        return {"guard/score": score, "guard/kl": kl, "guard/best_score": self.best_score}

    def reason_to_stop(self, kl: float) -> str | None:
        """`kl` is the last rollout's, nats a response."""
        if self.config.max_kl is not None and kl > self.config.max_kl:
            return f"objective/kl {kl:.3g} passed ppo.guard.max_kl {self.config.max_kl:g}"
        if self.config.patience is not None and self.looks_below >= self.config.patience:
            return f"the held-out score was below its best for {self.looks_below} looks (ppo.guard.patience)"
        return None

    def put_best_back(self, learner: ActorCritic) -> int:
        """Returns the update after which the policy was at its best."""
        learner.put_back(self.best)
        return self.best_update

    def state(self) -> dict[str, float]:
        return {"best_score": self.best_score, "best_update": self.best_update, "looks_below": self.looks_below}

    def restore(self, state: Mapping[str, float], best: Mapping[str, Tensor]) -> None:
        self.best_score = state["best_score"]
        self.best_update, self.looks_below = int(state["best_update"]), int(state["looks_below"])
        self.best = best


def measure(held_out: HeldOut) -> tuple[float, float]:
    """The policy's mean standardised score, and its mean KL to the reference in nats a response."""
    sampler = held_out.sampler
    episodes, batch_size = sampler.episodes(held_out.prompts, role=POLICY, purpose="guard"), held_out.micro_batch_size
    by_name, kls_N = judge(sampler, episodes, held_out.sources, role=POLICY, reference=REFERENCE, batch_size=batch_size)
    return fmean(held_out.sources.standardized(by_name).tolist()), fmean(kls_N.tolist())
