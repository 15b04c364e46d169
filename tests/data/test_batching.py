import torch

from data.batching import length_sorted_batches, prompt_sorted_batches, right_pad


def test_batches_are_sorted_by_length_and_equal_lengths_keep_their_order() -> None:
    assert length_sorted_batches([3, 1, 2, 1, 3], 2) == [[1, 3], [2, 0], [4]]
    assert length_sorted_batches([], 2) == []


def test_rows_of_one_prompt_stand_side_by_side_shortest_first_and_prompts_by_their_longest_row() -> None:
    a, b, c = (1, 2), (3,), (4, 5)
    prompts, responses = [a, b, a, c, b], [(0,) * length for length in (6, 2, 1, 3, 4)]  # rows of 8, 3, 3, 5 and 5
    assert prompt_sorted_batches(list(zip(prompts, responses, strict=True)), 2) == [[1, 4], [3, 2], [0]]
    assert prompt_sorted_batches([], 2) == []


def test_padding_stands_on_the_right_and_the_mask_comes_from_lengths() -> None:
    sequences = [(7, 0), (5, 6, 7)]  # the first ends with the pad id itself
    ids_BS, is_token_BS = right_pad(sequences, 0, "cpu")
    assert ids_BS.tolist() == [[7, 0, 0], [5, 6, 7]]
    assert is_token_BS.tolist() == [[True, True, False], [True, True, True]]
    assert (ids_BS.dtype, is_token_BS.dtype) == (torch.int64, torch.bool)


def test_no_sequences_are_a_tensor_with_no_rows() -> None:
    assert right_pad([], 0, "cpu")[0].shape == (0, 0)
