"""Three small byte-level tokenizers, one for each family whose habits differ: one token a byte, and special tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def chatml() -> PreTrainedTokenizerBase:
    """Like SmolLM2's: pad is eos, a system prompt of its own, a newline after the end-of-turn token."""
    tokenizer = _byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.unk_token, tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|im_end|>", "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def gpt2() -> PreTrainedTokenizerBase:
    """Like GPT-2's: no template, no pad, one special token that is BOS, EOS and unknown."""
    tokenizer = _byte_level("<|endoftext|>")
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = "<|endoftext|>"
    return tokenizer


def llama() -> PreTrainedTokenizerBase:
    """Like Llama 3's: adds BOS by itself, ends turns with a token that is not its EOS token, trims contents."""
    tokenizer = _byte_level("<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>", "<|pad|>", adds_bos=True)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = LLAMA
    return tokenizer


def _byte_level(*special: str, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
