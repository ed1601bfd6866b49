"""What stands around a user's words, and prompts put together from tokens: pieces are tokenised as they are inside one text, and
lengths come out exact."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from longlora.data.tokenise import LINE, PARTED, all_bare, as_words, bare, marks

Prompt = Literal["chat", "authors", "plain"]
"""chat: the tokenizer's own template; authors: LongLoRA's supervised fine-tuning; plain: text to be continued."""
AUTHORS = ("[INST]", "[/INST]")
"""What the authors write before and after an instruction."""
AT_ONCE = {"enable_thinking": False}
"""What a chat template is told that lets a model think before it answers, as Qwen3's does: the answers that are taught follow at
once, so they are asked for at once."""
WORD = "again"
"""A piece that stands inside of a text is tokenised after this: which word it is does not matter, only that one stands there."""
PIECE = 1000
"""Words of running text that are tokenised at once. Tokenizers that do not part a text at its spaces (Llama 2's) take more time for
each word, the longer it is: half a minute for 4 MB."""


@dataclass(frozen=True)
class Frame:
    """What stands before a user's words, and after them, up to where the model goes on."""

    tokenizer: PreTrainedTokenizerBase
    before: str
    after: str
    marked: bool
    """`before` has all marks, as a chat template writes them; else the tokenizer puts first what it puts before every text."""

    def open(self, text: str) -> list[int]:
        """The ids of a prompt's beginning: what stands before the user's words, and `text`, the first of them."""
        return (bare if self.marked else opening)(self.tokenizer, self.before + text)


def frame(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, plain: str) -> Frame:
    """The frame of a kind of prompt; a plain one has nothing before the words, and `plain` after them.

    Raises:
        ValueError: the prompt is chat, and the tokenizer has no chat template.
    """
    if prompt == "chat":
        return Frame(tokenizer, *chat_turn(tokenizer), marked=True)
    before, after = AUTHORS if prompt == "authors" else ("", plain)
    return Frame(tokenizer, before, after, marked=False)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str, *, after: str) -> list[int]:
    """The ids of `text` as they are after `after`, so without the space that some tokenizers put before every text."""
    return continuations(tokenizer, [text], after=after)[0]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, after: str) -> list[list[int]]:
    """`continuation` of each text, in one call of the tokenizer."""
    known = bare(tokenizer, after)
    wholes = all_bare(tokenizer, [after + text for text in texts])
    # Where the tokenizer joins the two across the border, the token streams cannot be parted: then the text alone.
    return [
        whole[len(known) :] if whole[: len(known)] == known else bare(tokenizer, text)
        for whole, text in zip(wholes, texts, strict=True)
    ]


def opening(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` where it opens a prompt: behind whatever the tokenizer puts first by itself (a begin mark, or nothing)."""
    own, marked = bare(tokenizer, text), tokenizer(text.partition(PARTED)[0], verbose=False)["input_ids"]
    return marked[: marked.index(own[0])] + own


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after a user's words, the model's turn opened.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not say a user's words once, as they are.
    """
    if not tokenizer.chat_template:
        raise ValueError("prompt = chat needs a tokenizer with a chat template, and this one has none: use plain")
    words = "THE-WORDS-OF-THE-USER"
    turn = [{"role": "user", "content": words}]
    parts = rendered(tokenizer, turn, open_turn=True).split(words)
    if len(parts) != 2:
        raise ValueError(
            f"prompt = chat needs a chat template that says the user's words once, as they are, and this one says them "
            f"{len(parts) - 1} times: use plain"
        )
    return parts[0], parts[1]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, open_turn: bool) -> str:
    """What the chat template makes of `messages`, the model's next turn opened or not.

    Raises:
        ValueError: the template refuses them, or is none.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn, **AT_ONCE))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses turns of {roles} ({error})") from None


def taught_ends(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The marks at which an answer ends that is taught: the tokenizer's, and, with a chat template, those behind an answer.

    Raises:
        ValueError: the template refuses a question and its answer.
    """
    found = listed(tokenizer.eos_token_id)
    if prompt == "chat":
        said = [{"role": "user", "content": "THE-WORDS"}, {"role": "assistant", "content": "THE-ANSWER"}]
        behind = rendered(tokenizer, said, open_turn=False).rpartition("THE-ANSWER")[2]
        found += marks(tokenizer).keys() & bare(tokenizer, behind)
    return sorted({token for token in found if token != tokenizer.unk_token_id})


def listed(marks: int | list[int] | None) -> list[int]:
    """End marks as transformers' configs name them: none, one or several."""
    return [] if marks is None else [marks] if isinstance(marks, int) else list(marks)


def haystack(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """The ids (N,) of `texts` as one running text that begins a line, with a space between words; none where there are no words."""
    words = " ".join(texts).split()
    pieces = [" ".join(words[first : first + PIECE]) for first in range(0, len(words), PIECE)]
    said = [as_words(piece, tokenizer=tokenizer) for piece in pieces]
    ids = [continuation(tokenizer, f" {p}" if n else p, after=WORD if n else LINE) for n, p in enumerate(said)]
    return np.array([token for piece in ids for token in piece], dtype=np.uint32)


def hidden(lines: list[list[int]], *, hay: np.ndarray, start: int, cuts: list[int], length: int) -> list[int]:
    """`length` tokens of the text `hay` (N,) from `start` on, begun again where it ends, with each of `lines` put in after as many
    of them as `cuts` says, which rise."""
    text = hay.take(range(start, start + length), mode="wrap").tolist()
    body, done = [], 0
    for cut, line in zip(cuts, lines, strict=True):
        body += text[done:cut] + line
        done = cut
    return body + text[done:]
