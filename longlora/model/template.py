"""The authors' prompt as a chat template, so that an OpenAI-compatible server asks a model as it was taught.

`[INST]{instruction}[/INST]{output}` (LongLoRA's supervised fine-tuning), a system turn before the next user's words, an end
mark after each answer: the tokens are those of `longlora.data.dialogue.tokenised`, which tests/test_serve.py holds it to.
"""

import json

from transformers import PreTrainedTokenizerBase

from longlora.data.prompt import AUTHORS

TURNS = """\
{%- set waiting = namespace(words='') -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}{%- set waiting.words = waiting.words + turn.content + '\\n\\n' -%}
{%- elif turn.role == 'user' -%}{{- 'BEFORE' + waiting.words + turn.content + 'AFTER' -}}{%- set waiting.words = '' -%}
{%- elif turn.role == 'assistant' -%}{{- turn.content + eos_token -}}
{%- else -%}{{- raise_exception('the roles are system, user and assistant, not ' + turn.role) -}}
{%- endif -%}
{%- endfor -%}
""".replace("BEFORE", AUTHORS[0]).replace("AFTER", AUTHORS[1])


def authors_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template, in Jinja; it begins with whatever `tokenizer` puts before every text by itself."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    marked = tokenizer("x")["input_ids"]
    opening = tokenizer.decode(marked[: marked.index(bare[0])])
    return "{{- " + json.dumps(opening) + " -}}\n" + TURNS if opening else TURNS
