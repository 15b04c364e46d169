"""One backward pass of the peer, done again with our formulas on plain models that hold the same weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from align.adapters import AdaptedModel
from align.episodes import Episode, collate, policy_pass
from stages.ppo import objective


@dataclass(frozen=True)
class Settings:
    temperature: float
    kl: float
    gamma: float
    lam: float
    clip: float
    value_clip: float
    vf: float
    penalty: float  # of a response without EOS


@dataclass(frozen=True)
class Losses:
    policy: Tensor
    value: Tensor


def policy_loss(logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, *, clip: float) -> Tensor:
    """The one place that knows our signature: one clip, the same on both sides."""
    return objective.policy_loss(logprobs_BT, old_logprobs_BT, advantages_BT, clip_low=clip, clip_high=clip)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """As the learner averages: by loss_weights, over the mask."""
    weights_BT = objective.loss_weights(mask_BT, average="token", num_tokens=int(mask_BT.sum()), num_responses=0)
    return (values_BT * weights_BT).sum()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of theirs."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Replay:
    """The captured numbers of one step, and what our functions make of them."""

    def __init__(self, captured: dict[str, Tensor], step: int, settings: Settings, model: Path, pad_id: int) -> None:
        self._all = captured
        self._step = step
        self._settings = settings
        self._pad_id = pad_id
        self._rows_B = captured[f"{step}/micro_batch_inds"]
        self._policy, self._value = self._models(model)

    def captured(self, name: str) -> Tensor:
        return self._all[f"{self._step}/{name}"]

    def captured_gradient(self) -> Tensor:
        """Of policy and value model, one after another: (N,)."""
        return torch.cat([self._all[f"{self._step}/gradient/{name}"].flatten() for name in self._names()])

    def _names(self) -> list[str]:
        prefix = f"{self._step}/gradient/"
        return sorted(key.removeprefix(prefix) for key in self._all if key.startswith(prefix))

    def by_model(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Such a gradient, cut into the policy's and the value model's."""
        size = sum(parameter.numel() for parameter in self._policy.parameters())
        return gradient[:size], gradient[size:]

    def _rollout(self, name: str) -> Tensor:
        return self._all[f"rollout/{name}"][self._rows_B]

    def _models(self, folder: Path) -> tuple[nn.Module, nn.Module]:
        config = LlamaConfig.from_pretrained(folder)
        config.num_labels = 1
        models = {"policy.": LlamaForCausalLM(config), "value_model.": LlamaForSequenceClassification(config)}
        for prefix, model in models.items():
            start = f"{self._step}/weight/{prefix}"
            own = {key.removeprefix(start): tensor for key, tensor in self._all.items() if key.startswith(start)}
            model.double().load_state_dict(own)
        return models["policy."], models["value_model."]

    # ---- the same formulas on stored numbers ----

    def losses_of_stored(self) -> Losses:
        """From TRL's own new logprobs and values."""
        return self._losses(self.captured("new_logprobs"), self.captured("vpred"), as_trl=True)

    def _losses(self, logprobs_BT: Tensor, values_BT: Tensor, *, as_trl: bool) -> Losses:
        """`as_trl`: with TRL's advantages and returns, and its mask of values, one token past EOS; otherwise ours."""
        s = self._settings
        mask_BT = ~self._rollout("padding_mask")
        value_mask_BT = ~self._rollout("padding_mask_p1") if as_trl else mask_BT
        advantages_BT, returns_BT = self._rollout("advantages"), self._rollout("returns")
        if not as_trl:
            advantages_BT, returns_BT = self._our_estimates()
        policy_BT = policy_loss(logprobs_BT, self._rollout("logprobs"), advantages_BT, clip=s.clip)
        value_BT = objective.value_loss(values_BT, self._rollout("values"), returns_BT, clip=s.value_clip)
        return Losses(masked_mean(policy_BT, mask_BT), masked_mean(value_BT, value_mask_BT))

    def _our_estimates(self) -> tuple[Tensor, Tensor]:
        """This minibatch's whitened advantages and returns as our pipeline makes them of the whole rollout."""
        s, t = self._settings, self._all
        mask_BT = ~t["rollout/padding_mask"]
        kl_BT = objective.kl_k1(t["rollout/logprobs"], t["rollout/ref_logprobs"]).double()
        rewards_BT = objective.token_rewards(t["rollout/scores"], kl_BT, mask_BT, kl_coefficient=s.kl)
        advantages_BT, returns_BT = objective.gae(rewards_BT, t["rollout/values"], mask_BT, gamma=s.gamma, lam=s.lam)
        advantages_BT = objective.whiten([advantages_BT], [mask_BT])[0]
        return advantages_BT[self._rows_B], returns_BT[self._rows_B]

    # ---- and their gradient ----

    def gradient(self, *, as_trl: bool) -> Tensor:
        """Of our losses with respect to the same weights, in the order of `captured_gradient`: (N,)."""
        logprobs_BT, values_BT = self._forward(self._settings.temperature + (1e-7 if as_trl else 0.0))
        losses = self._losses(logprobs_BT, values_BT, as_trl=as_trl)
        parameters = {f"policy.{name}": p for name, p in self._policy.named_parameters()}
        parameters |= {f"value_model.{name}": p for name, p in self._value.named_parameters()}
        loss = losses.policy + self._settings.vf * losses.value
        gradients = torch.autograd.grad(loss, [parameters[name] for name in self._names()])
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _forward(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprobs and values (B, T) of the responses, 0 in padding; prompts are left-padded, as TRL pads them."""
        ids_BS, responses_BT = self._rollout("query_responses"), self._rollout("responses")
        is_token_BS = ids_BS != self._pad_id
        options = {
            "input_ids": ids_BS.masked_fill(~is_token_BS, 0),
            "attention_mask": is_token_BS,
            "position_ids": is_token_BS.cumsum(1) - is_token_BS.long(),
        }
        before = slice(ids_BS.shape[1] - responses_BT.shape[1] - 1, -1)
        logits_BTV = self._policy(**options).logits[:, before] / temperature
        logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, responses_BT[..., None])[..., 0]
        backbone, head = self._value.get_submodule("model"), self._value.get_submodule("score")
        values_BT = head(backbone(**options).last_hidden_state[:, before])[..., 0]
        padding_BT, padding_p1_BT = self._rollout("padding_mask"), self._rollout("padding_mask_p1")
        return logprobs_BT.masked_fill(padding_BT, 1.0), values_BT.masked_fill(padding_p1_BT, 0.0)

    def own_pass(self, model: AdaptedModel) -> tuple[float, float]:
        """Relative errors of the logprobs and of the policy's gradient as the learner itself computes them: in float32,
        right-padded, tile by tile. The LM head, which the learner never trains, is left out of the gradient."""
        parameters = dict(model.base.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.data.copy_(self._all[f"{self._step}/weight/policy.{name}"])
        parameters = {n: p.requires_grad_(True) for n, p in parameters.items() if p is not model.lm_head.weight_VH}
        batch = collate(self._episodes(), pad_id=self._pad_id, device=model.device)
        mask_BT = batch.is_response_BT
        real = slice(mask_BT.shape[1])
        logprobs_BT = policy_pass(model, batch, temperature=self._settings.temperature).logprobs_BT
        old_BT, advantages_BT = (self._rollout(name)[:, real].float() for name in ("logprobs", "advantages"))
        loss_BT = policy_loss(logprobs_BT, old_BT, advantages_BT, clip=self._settings.clip)
        gradients = torch.autograd.grad(masked_mean(loss_BT, mask_BT), list(parameters.values()))
        theirs = [self._all[f"{self._step}/gradient/policy.{name}"] for name in parameters]
        pairs = (
            (logprobs_BT, self.captured("new_logprobs")[:, real] * mask_BT),
            (torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in theirs])),
        )
        first, second = (relative_error(*pair) for pair in pairs)
        return first, second

    def _episodes(self) -> list[Episode]:
        prompts, responses = self._rollout("queries"), self._rollout("responses")
        ended, last_B = self._rollout("contain_eos_token").tolist(), self._rollout("sequence_lengths").tolist()
        return [
            Episode(tuple(ids[ids != self._pad_id].tolist()), tuple(response[: last + 1].tolist()), has_eos)
            for ids, response, last, has_eos in zip(prompts, responses, last_B, ended, strict=True)
        ]

    # ---- what the departures change ----

    def ratio_error(self) -> float:
        return (self._log_ratio_BT().exp() - 1).abs().max().item()

    def clipped(self) -> float:
        """Share of response tokens whose ratio is outside the clip."""
        outside_BT = (self._log_ratio_BT().exp() - 1).abs() > self._settings.clip
        return masked_mean(outside_BT.double(), ~self._rollout("padding_mask")).item()

    def values_clipped(self) -> float:
        moved_BT = (self.captured("vpred") - self._rollout("values")).abs() > self._settings.value_clip
        return masked_mean(moved_BT.double(), ~self._rollout("padding_mask")).item()

    def temperature_gap(self) -> float:
        with torch.no_grad():
            exact_BT, shifted_BT = (self._forward(self._settings.temperature + shift)[0] for shift in (0.0, 1e-7))
        return (exact_BT - shifted_BT).abs().max().item()

    def approxkl(self) -> str:
        """At the last step, where there is something to see."""
        last = max(int(key.split("/")[0]) for key in self._all if key.endswith("/loss"))
        rows_B = self._all[f"{last}/micro_batch_inds"]
        squares_BT = (self._all[f"{last}/new_logprobs"] - self._all["rollout/logprobs"][rows_B]).square()
        mask_BT = ~self._all["rollout/padding_mask"][rows_B]
        ours = 0.5 * masked_mean(squares_BT, mask_BT).item()
        return f"logged only; in the last minibatch {ours:.3g}, TRL logs {0.5 * squares_BT.mean().item():.3g}"

    def _log_ratio_BT(self) -> Tensor:
        return self.captured("new_logprobs") - self._rollout("logprobs")
