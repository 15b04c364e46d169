import pytest
import torch
from torch import Tensor

from align.adapters import AdaptedModel
from align.episodes import Episode, EpisodeBatch, collate, policy_pass, score_pass, value_pass
from align.heads import ScalarHead
from tests.resident import SHAPES, drawn_episodes, logits_of, with_adapters

LENGTHS = [(3, 5), (1, 1), (7, 2), (2, 6)]  # (prompt, response)


def collated(model: AdaptedModel, episodes: list[Episode]) -> EpisodeBatch:
    return collate(episodes, pad_id=model.base.codec(None).pad_id, device=model.device)


def hidden_of(model: AdaptedModel, ids: tuple[int, ...]) -> Tensor:
    """(S, H) by the model's own forward of one row."""
    with torch.no_grad():
        return model.base.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


def head_of(model: AdaptedModel) -> ScalarHead:
    head = ScalarHead(model.hidden_size).initialize(3)
    head.bias.data.fill_(0.25)
    return head


def test_collating_pads_on_the_right_and_masks_come_from_lengths() -> None:
    # the pad id 9 also stands inside, as EOS does where pad is EOS
    episodes = [Episode((1, 9), (3, 4, 9), has_eos=True), Episode((5,), (9,), has_eos=True)]
    batch = collate(episodes, pad_id=9, device=torch.device("cpu"))
    assert batch.ids_BS.tolist() == [[1, 9, 3, 4, 9], [5, 9, 9, 9, 9]]
    assert batch.is_token_BS.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.is_response_BT.tolist() == [[True, True, True], [True, False, False]]
    assert batch.response_positions_BT.tolist() == [[2, 3, 4], [1, 1, 1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_policy_pass_is_a_plain_computation_from_each_rows_full_logits(shape: str) -> None:
    model = with_adapters(shape, "sft")
    episodes, head = drawn_episodes(LENGTHS, end=model.base.eos_ids[0]), head_of(model)
    with model.role("sft"):
        with torch.no_grad():
            out = policy_pass(model, collated(model, episodes), temperature=0.7, value_head=head, with_entropy=True)
        assert out.entropy_BT is not None
        assert out.values_BT is not None
        for row, episode in enumerate(episodes):
            start = len(episode.prompt_ids)
            ids = episode.prompt_ids + episode.response_ids
            distribution_SV = (logits_of(model, ids) / 0.7).log_softmax(-1)
            hidden_SH = hidden_of(model, ids)
            for t, token in enumerate(episode.response_ids):
                before = start + t - 1  # the state that has not seen the token yet
                assert out.logprobs_BT[row, t].item() == pytest.approx(distribution_SV[before, token].item(), abs=2e-5)
                entropy = -(distribution_SV[before].exp() * distribution_SV[before]).sum().item()
                assert out.entropy_BT[row, t].item() == pytest.approx(entropy, abs=1e-5)
                value = (hidden_SH[before] @ head.weight[0]).item() + 0.25
                assert out.values_BT[row, t].item() == pytest.approx(value, abs=1e-5)
            for padded_BT in (out.logprobs_BT, out.entropy_BT, out.values_BT):
                assert not padded_BT[row, len(episode.response_ids) :].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_pass_reads_the_same_states_as_values_on_the_policys_trunk(shape: str) -> None:
    model = with_adapters(shape, "sft")
    batch, head = collated(model, drawn_episodes(LENGTHS, end=model.base.eos_ids[0])), head_of(model)
    with torch.no_grad(), model.role("sft"):
        on_trunk_BT = policy_pass(model, batch, value_head=head).values_BT
        assert on_trunk_BT is not None
        torch.testing.assert_close(value_pass(model, head, batch), on_trunk_BT)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_score_is_read_at_the_real_last_token_also_where_pad_is_eos(shape: str) -> None:
    model = with_adapters(shape, "sft")
    end, head = model.base.eos_ids[0], head_of(model)
    episodes = drawn_episodes(LENGTHS, end=end)
    with torch.no_grad(), model.role("sft"):
        expected = [
            (hidden_of(model, e.prompt_ids + e.response_ids)[-1] @ head.weight[0]).item() + 0.25 for e in episodes
        ]
        for pad_id in (end, 0):
            scores_B = score_pass(model, head, collate(episodes, pad_id=pad_id, device=model.device))
            assert scores_B.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_row_is_the_same_bit_for_bit_when_its_batch_is_looked_at_again() -> None:
    # what makes the first ratio exactly 1: the same batch, by the same kernels, with and without gradients
    for dtype in ("float32", "bfloat16"):
        model = with_adapters("llama", "sft", dtype=dtype, dropout=0.3)
        model.add("policy", copy_of="sft")
        batch, head = collated(model, drawn_episodes(LENGTHS, end=model.base.eos_ids[0])), head_of(model)
        with torch.no_grad(), model.role("sft"):
            reference_BT = policy_pass(model, batch).logprobs_BT
        with model.role("policy", train=True):
            assert torch.equal(policy_pass(model, batch, value_head=head).logprobs_BT, reference_BT)
