from dataclasses import replace

from align.plan import flops
from align.plan.flops import Rows
from tests.align.plan.shapes import SMALL

# An adapter of rank 2 has 2 · (16 + 12 + 12 + 16 + 24 + 24 + 24) = 256 parameters a layer, 512 in all.


def test_an_adapter_has_its_rank_times_in_plus_out_at_each_place() -> None:
    assert SMALL.num_lora_parameters(2) == 512


def test_a_forward_pass_is_two_flops_a_parameter_and_token_and_the_two_products_of_attention() -> None:
    # 3 sequences of 5: 2 · (1152 + 512) · 15 = 49,920; attention 4 · 2 layers · 8 wide · 3 · 25 = 4,800
    assert flops.forward(SMALL, Rows(3, 5), rank=2) == 49_920 + 4_800


def test_a_backward_pass_repeats_frozen_products_once_and_those_of_lora_twice() -> None:
    # 2 · 1152 · 15 + 2 · 2 · 512 · 15 = 34,560 + 30,720; attention twice
    assert flops.backward(SMALL, Rows(3, 5), rank=2) == 34_560 + 30_720 + 2 * 4_800


def test_decoding_attends_to_all_that_came_before() -> None:
    # Of 4 response tokens 3 go in, behind 5: they see 6, 7 and 8. 2 · 1664 · 9 = 29,952; 4 · 2 · 8 · 3 · 21 = 4,032
    assert flops.decode(SMALL, rank=2, sequences=3, prompt=5, response=4) == 29_952 + 4_032
    assert flops.decode(SMALL, rank=2, sequences=3, prompt=5, response=1) == 0


def test_decoding_token_by_token_is_what_the_loop_adds_up() -> None:
    singly = sum(flops.decode(SMALL, rank=2, sequences=1, prompt=prompt, response=2) for prompt in range(7, 7 + 9))
    assert flops.decode(SMALL, rank=2, sequences=1, prompt=7, response=10) == singly


def test_the_lm_head_is_one_product_over_the_vocabulary() -> None:
    assert flops.lm_head(SMALL, 10) == 2 * 8 * 32 * 10


def test_layers_below_all_adapters_are_passed_once_and_have_no_gradients() -> None:
    upper = SMALL.with_adapters_on_last(1)  # half the products, half the adapter
    assert upper == replace(SMALL, num_frozen_layers=1, adapted=SMALL.adapted[7:])
    known = flops.forward(upper, Rows(3, 5), rank=2, from_frozen=True)
    assert known == 2 * (1152 // 2 + 256) * 15 + 4_800 // 2
    assert flops.forward(upper, Rows(3, 5), rank=2) == known + 2 * (1152 // 2) * 15 + 4_800 // 2
    assert flops.backward(upper, Rows(3, 5), rank=2) == 2 * (1152 // 2 + 2 * 256) * 15 + 4_800
