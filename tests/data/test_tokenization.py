from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align.errors import ModelError
from data.codec import make_codec
from data.records import Comparison, Demonstration, Message, PlainText, Prompt, UnfitError, Verdict
from data.tokenization import (
    Codec,
    decode_response,
    encode_comparisons,
    encode_conversation,
    encode_demonstrations,
    encode_prompt,
    encode_prompts,
    encode_response,
    encode_verdicts,
)
from tests.data.small_tokenizers import chatml, gpt2, llama

FAMILIES = [chatml, gpt2, llama]
Make = Callable[[], PreTrainedTokenizerBase]
every_family = pytest.mark.parametrize("make", FAMILIES)

SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "Because.")
TWO_TURNS = (USER, ANSWER, Message("user", "And?"), Message("assistant", "So what!"))


def codec_of(make: Make, system_prompt: str | None = None) -> Codec:
    tokenizer = make()
    assert isinstance(tokenizer.eos_token_id, int)
    return make_codec(tokenizer, eos_ids=[tokenizer.eos_token_id], system_prompt=system_prompt)


def text_of(codec: Codec, ids: list[int] | tuple[int, ...]) -> str:
    return str(codec.tokenizer.decode(list(ids), skip_special_tokens=False))


def learnt(codec: Codec, ids: list[int] | tuple[int, ...], is_response: list[bool] | tuple[bool, ...]) -> str:
    """The text that is learnt, with · wherever something that is not learnt was left out."""
    text = ""
    for position, (token_id, is_learnt) in enumerate(zip(ids, is_response, strict=True)):
        if is_learnt:
            gap = "·" if position and not is_response[position - 1] else ""
            text += gap + text_of(codec, [token_id])
    return text


@pytest.mark.parametrize(
    ("make", "end_of_turn", "eos", "pad"),
    [
        (chatml, "<|im_end|>", ["<|im_end|>"], "<|endoftext|>"),
        (gpt2, "<|endoftext|>", ["<|endoftext|>"], "Ā"),  # nothing special is left: the byte 0
        (llama, "<|eot|>", ["</s>", "<|eot|>"], "<|pad|>"),
    ],
)
def test_a_codec_knows_the_end_of_a_turn_and_never_pads_with_it(
    make: Make, end_of_turn: str, eos: list[str], pad: str
) -> None:
    codec = codec_of(make)
    tokens = codec.tokenizer.convert_ids_to_tokens
    assert tokens(codec.end_of_turn_id) == end_of_turn
    assert [tokens(token_id) for token_id in codec.eos_ids] == eos
    assert tokens(codec.pad_id) == pad
    assert codec.pad_id not in codec.eos_ids
    assert (codec.tokenizer.pad_token_id, codec.tokenizer.pad_token) == (codec.pad_id, pad)


def test_a_pad_token_that_is_listed_as_eos_is_replaced() -> None:
    tokenizer = llama()
    tokenizer.pad_token = "<|pad|>"
    listed = [tokenizer.get_vocab()[token] for token in ("</s>", "<|pad|>")]
    codec = make_codec(tokenizer, eos_ids=listed, system_prompt=None)
    assert codec.pad_id not in codec.eos_ids
    assert set(listed) < set(codec.eos_ids)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = chatml()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        make_codec(tokenizer, eos_ids=[], system_prompt=None)


@pytest.mark.parametrize(
    ("make", "prompt", "after"),
    [
        (
            chatml,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "Because.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSo what!<|im_end|>",
        ),
        (
            gpt2,
            "Be brief.\n\n### User:\nWhy?\n\n### Assistant:\n",
            "Because.<|endoftext|>\n\n### User:\nAnd?\n\n### Assistant:\nSo what!<|endoftext|>",
        ),
        (
            llama,
            "<s><|start|>system<|end|>\n\nBe brief.<|eot|><|start|>user<|end|>\n\nWhy?<|eot|>"
            "<|start|>assistant<|end|>\n\n",
            "Because.<|eot|><|start|>user<|end|>\n\nAnd?<|eot|><|start|>assistant<|end|>\n\nSo what!<|eot|>",
        ),
    ],
)
def test_a_conversation_is_the_templates_text_with_one_bos_up_to_the_last_end_of_turn(
    make: Make, prompt: str, after: str
) -> None:
    codec = codec_of(make)
    assert text_of(codec, encode_prompt(codec, [SYSTEM, USER])) == prompt
    ids, _ = encode_conversation(codec, [SYSTEM, *TWO_TURNS])
    assert text_of(codec, ids) == prompt + after
    bos = codec.tokenizer.bos_token_id
    assert make is not llama or ids.count(int(str(bos))) == 1


@every_family
def test_a_single_turn_is_its_prompt_and_its_response(make: Make) -> None:
    codec = codec_of(make)
    for answer in ("Because.", " spaced \n", "\n\nIn lines.\n"):
        prompt, response = encode_prompt(codec, [USER]), encode_response(codec, answer)
        ids, is_response = encode_conversation(codec, [USER, Message("assistant", answer)])
        assert ids == prompt + response
        assert is_response == [False] * len(prompt) + [True] * len(response)


@every_family
@pytest.mark.parametrize("answer", ["Because.", "Because. \n"])  # the Llama-like template trims
def test_each_answer_of_a_conversation_stands_after_exactly_its_prompt(make: Make, answer: str) -> None:
    codec = codec_of(make)
    messages = [USER, Message("assistant", answer), *TWO_TURNS]
    ids, _ = encode_conversation(codec, messages)
    for end in (1, 3, 5):
        before = encode_prompt(codec, messages[:end]) + encode_response(codec, messages[end].content)
        assert ids[: len(before)] == before


@every_family
def test_a_multi_turn_prompt_is_what_the_tokenizer_makes_of_the_whole_text(make: Make) -> None:
    codec = codec_of(make)
    turns = [{"role": message.role, "content": message.content} for message in TWO_TURNS[:3]]
    text = codec.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(codec, TWO_TURNS[:3]) == codec.tokenizer(str(text), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("make", "end"), [(chatml, "<|im_end|>"), (gpt2, "<|endoftext|>"), (llama, "<|eot|>")])
def test_what_is_learnt_is_exactly_the_answers_and_the_ends_of_their_turns(make: Make, end: str) -> None:
    codec = codec_of(make)
    ids, is_response = encode_conversation(codec, TWO_TURNS)
    assert learnt(codec, ids, is_response) == f"·Because.{end}·So what!{end}"
    assert ids[-1] == codec.end_of_turn_id
    assert is_response[-1]


def test_an_end_of_turn_after_a_space_is_learnt_and_one_that_closes_the_users_turn_is_not() -> None:
    tokenizer = chatml()
    spaced = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' <|im_end|>' }}{% endfor %}"
    tokenizer.chat_template = spaced + "{% if add_generation_prompt %}assistant:{% endif %}"
    codec = make_codec(tokenizer, eos_ids=[], system_prompt=None)
    assert learnt(codec, *encode_conversation(codec, TWO_TURNS)) == "·Because.·<|im_end|>·So what!<|im_end|>"
    user_only = (
        "{% for m in messages %}{{ m['content'] + ('|<|im_end|>' if m['role'] == 'user' else ' ') }}{% endfor %}"
    )
    tokenizer.chat_template = user_only
    codec = make_codec(tokenizer, eos_ids=[], system_prompt=None)
    assert learnt(codec, *encode_conversation(codec, TWO_TURNS)) == "·Because.·So what!<|im_end|>"


@every_family
def test_the_system_prompt_comes_before_a_conversation_that_has_none(make: Make) -> None:
    plain, normed = codec_of(make), codec_of(make, "Be brief.")
    assert encode_prompt(normed, [USER]) == encode_prompt(plain, [SYSTEM, USER])
    assert encode_prompt(normed, [Message("system", "Rhyme."), USER]) == encode_prompt(
        plain, [Message("system", "Rhyme."), USER]
    )
    assert encode_conversation(normed, TWO_TURNS) == encode_conversation(plain, [SYSTEM, *TWO_TURNS])


def test_a_template_that_cannot_take_the_system_prompt_is_refused() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    for template, message in ((refusing, "refuses data.system_prompt: no system role"), (deaf, "leaves system")):
        tokenizer = chatml()
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match=message):
            make_codec(tokenizer, eos_ids=[], system_prompt="Be brief.")


@every_family
def test_decoding_a_response_gives_its_text_back(make: Make) -> None:
    codec = codec_of(make)
    for text in ("Because!!", " é 漢字 \n", "don 't , join"):
        assert decode_response(codec, encode_response(codec, text)) == text


def test_a_response_that_spells_out_an_end_token_is_rejected() -> None:
    codec = codec_of(llama)
    for text in ("Because.</s>", "Be<|eot|>cause."):
        with pytest.raises(UnfitError, match="end token in response"):
            encode_response(codec, text)
    kept, rejects = encode_comparisons(codec, [Comparison((USER,), "Yes", "No</s>", "f:3")], max_length=99)
    assert (kept, rejects[0].source, rejects[0].reason) == ([], "f:3", "end token in response")


def rewriting_codec() -> Codec:
    """Like the templates of reasoning models: an answer is marked while it is the last, and then no longer."""
    tokenizer = chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
        "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant>{% endif %}"
    )
    return make_codec(tokenizer, eos_ids=[], system_prompt=None)


def test_a_template_that_rewrites_earlier_turns_is_a_reject_for_demonstrations_and_not_for_prompts() -> None:
    codec = rewriting_codec()
    messages = (USER, Message("assistant", "hm</think>Because."), *TWO_TURNS)
    records = [Demonstration(messages, "f:1"), Demonstration(TWO_TURNS, "f:2"), Demonstration(messages[:2], "f:3")]
    kept, rejects = encode_demonstrations(codec, records, max_length=500)
    assert [(reject.source, reject.reason) for reject in rejects] == [("f:1", "template rewrites earlier turns")]
    assert learnt(codec, kept[1].ids, kept[1].is_response) == "·hm</think>Because.<|im_end|>"
    prompts, rejects = encode_prompts(codec, [Prompt(messages[:3], "f:1")], max_prompt_length=500)
    assert not rejects
    assert text_of(codec, prompts[0].ids).startswith("user>Why?<|im_end|>assistant>Because.<|im_end|>user>")


def test_a_template_whose_beginning_depends_on_later_turns_rewrites_earlier_ones() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}|{{ m['content'] }}<|im_end|>{% endfor %}|"
    codec = make_codec(tokenizer, eos_ids=[], system_prompt=None)
    counted = (USER, Message("assistant", "3"), *TWO_TURNS[2:])  # the answer itself is what the text begins with
    with pytest.raises(UnfitError, match="template rewrites earlier turns"):
        encode_conversation(codec, counted)


def test_a_row_that_the_template_refuses_is_a_reject() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    codec = make_codec(tokenizer, eos_ids=[], system_prompt=None)
    _, rejects = encode_prompts(codec, [Prompt((SYSTEM, USER), "f:1")], max_prompt_length=99)
    assert [(reject.reason, reject.detail) for reject in rejects] == [("template refuses row", "no system")]


def test_a_long_demonstration_is_cut_from_the_left_and_its_last_answer_stays_whole() -> None:
    codec = codec_of(chatml)
    whole, mask = encode_conversation(codec, TWO_TURNS)
    last = len(encode_response(codec, "So what!"))
    for max_length in (len(whole), len(whole) - 1, last + 1):
        kept, rejects = encode_demonstrations(codec, [Demonstration(TWO_TURNS, "f:1")], max_length=max_length)
        assert not rejects
        assert list(kept[0].ids) == whole[-max_length:]
        assert list(kept[0].is_response) == mask[-max_length:]
        assert kept[0].num_cut == len(whole) - max_length
    kept, _ = encode_demonstrations(codec, [Demonstration(TWO_TURNS, "f:1")], max_length=len(whole) + 1)
    assert kept[0].num_cut == 0
    kept, rejects = encode_demonstrations(codec, [Demonstration(TWO_TURNS, "f:1")], max_length=last)
    assert not kept
    assert (rejects[0].source, rejects[0].reason) == ("f:1", "response over length")
    assert rejects[0].detail == f"{last} tokens, over {last - 1}"


def test_both_sides_of_a_comparison_share_the_prompt_cut_for_the_longer_one() -> None:
    codec = codec_of(chatml)
    record = Comparison((USER,), "A", "A longer one", "f:1")
    prompt = encode_prompt(codec, [USER])
    longer = len("A longer one") + 1
    for room in (len(prompt) + 5, len(prompt), 3, 1):
        kept, _ = encode_comparisons(codec, [record], max_length=longer + room)
        assert list(kept[0].prompt_ids) == prompt[-room:]
        assert list(kept[0].chosen_ids) == encode_response(codec, "A")
        assert list(kept[0].rejected_ids) == encode_response(codec, "A longer one")
        assert kept[0].num_cut == max(0, len(prompt) - room)
    kept, rejects = encode_comparisons(codec, [record], max_length=longer)
    assert not kept
    assert (rejects[0].reason, rejects[0].field) == ("response over length", "rejected")


def test_what_was_said_of_a_pair_stays_with_its_tokens() -> None:
    codec = codec_of(chatml)
    records = [Comparison((USER,), "Yes", "No", "f:1", margin=2.0), Comparison((USER,), "Yes", "No", "f:2", None, 0.25)]
    kept, _ = encode_comparisons(codec, records, max_length=99)
    assert [(row.margin, row.preference, row.source) for row in kept] == [(2.0, 1.0, "f:1"), (None, 0.25, "f:2")]


def test_a_verdicts_prompt_is_cut_and_its_response_never() -> None:
    codec = codec_of(chatml)
    record = Verdict((USER,), "A longer one", False, "f:1")
    prompt, response = encode_prompt(codec, [USER]), encode_response(codec, "A longer one")
    for room in (len(prompt) + 5, len(prompt), 3, 1):
        kept, _ = encode_verdicts(codec, [record], max_length=len(response) + room)
        assert list(kept[0].prompt_ids) == prompt[-room:]
        assert list(kept[0].response_ids) == response
        assert (kept[0].is_good, kept[0].source, kept[0].num_cut) == (False, "f:1", max(0, len(prompt) - room))
    kept, rejects = encode_verdicts(codec, [record], max_length=len(response))
    assert not kept
    assert (rejects[0].source, rejects[0].reason, rejects[0].field) == ("f:1", "response over length", "completion")


def test_a_comparison_ends_where_an_episode_ends() -> None:
    for make in FAMILIES:
        codec = codec_of(make)
        kept, _ = encode_comparisons(codec, [Comparison((USER,), "Because.", "No.", "f:1")], max_length=500)
        whole, _ = encode_conversation(codec, [USER, ANSWER])
        assert [*kept[0].prompt_ids, *kept[0].chosen_ids] == whole
        assert kept[0].chosen_ids[-1] == kept[0].rejected_ids[-1] == codec.end_of_turn_id


def test_a_pair_that_is_the_same_in_tokens_is_a_reject() -> None:
    tokenizer = chatml()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    codec = make_codec(tokenizer, eos_ids=[], system_prompt=None)
    records = [Comparison((USER,), "Yes", "yes", "f:1"), Comparison((USER,), "Yes", "no", "f:2")]
    kept, rejects = encode_comparisons(codec, records, max_length=500)
    assert len(kept) == 1
    assert [(reject.source, reject.reason) for reject in rejects] == [("f:1", "identical after truncation")]


def test_a_prompt_over_length_is_rejected_not_cut() -> None:
    codec = codec_of(chatml)
    length = len(encode_prompt(codec, [USER]))
    kept, rejects = encode_prompts(codec, [Prompt((USER,), "f:1")], max_prompt_length=length)
    assert (kept[0].messages, kept[0].source, len(kept[0].ids), rejects) == ((USER,), "f:1", length, [])
    kept, rejects = encode_prompts(codec, [Prompt((USER,), "f:1")], max_prompt_length=length - 1)
    assert (kept, rejects[0].reason) == ([], "prompt over length")


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    told: list[tuple[int, int]] = []
    prompts = [Prompt((USER,), "f:1")] * 600
    encode_prompts(
        codec_of(gpt2), prompts, max_prompt_length=99, on_progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (600, 600)
    assert all(before < after for before, after in pairwise(told))
    assert len(told) < 10


def test_plain_text_ends_with_the_eos_token_also_where_its_id_is_0() -> None:
    tokenizer = gpt2()
    tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(0))
    codec = make_codec(tokenizer, eos_ids=[0, 5], system_prompt=None)
    [row], _ = encode_demonstrations(replace(codec, end_of_turn_id=5), [PlainText("Why?", "f:1")], max_length=64)
    assert row.ids[-1] == 0
