"""The chat template for tokenizers that bring none."""

# Each turn has a heading on a line of its own, so a response starts at the start of a line and no tokenizer has to
# choose between a word and the same word after a space:
#
#     The system's text.
#
#     ### User:
#     A question?
#
#     ### Assistant:
#     An answer.<eos>
#
# The BOS token comes first if the tokenizer has one of its own; in GPT-2's it is the EOS token, which would teach a
# model that a conversation starts with its end. The blank line after an answer belongs to the turn that follows.
DEFAULT_CHAT_TEMPLATE = """\
{%- if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}
{%- if loop.previtem is defined and loop.previtem.role == 'assistant' %}{{ '\\n\\n' }}{% endif %}
{{- '### User:\\n' + message.content + '\\n\\n' }}
{%- else %}{{ '### Assistant:\\n' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""
