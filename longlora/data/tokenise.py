"""Texts to tokens, wherever they come from: documents, questions, exercises, prompts.

What a user wrote is words. A document may speak of `</s>`, or forge the end of a turn; only what a prompt or this library puts
around it are marks. So a mark that stands in a user's words is parted behind its first sign (`as_words`), and the parts are
tokenised one after the other. A text without marks has the tokens that the tokenizer gives it.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LINE = "\n"
"""A piece that begins a line is tokenised after this."""
PARTED = "\udfff"
"""Stands where a mark is parted. Half of a character, which no text can hold and no tokenizer takes."""


def marks(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens, by number, as they are written."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Any mark, the longest that stands at a place."""
    written = sorted(filter(None, marks(tokenizer).values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, written)) or "(?!)")


def as_words(text: str, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """A user's words, for `bare`, and for all that is made of it: any marks in them are parted."""
    return parted(text, pattern(tokenizer))


def parted(text: str, mark: re.Pattern[str]) -> str:
    return mark.sub(lambda found: found[0][0] + PARTED + found[0][1:], text)


def bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` without any mark that the tokenizer puts there by itself."""
    if PARTED in text:
        return all_bare(tokenizer, [text])[0]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def all_bare(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """`bare` of each text, in one call of the tokenizer."""
    parts = [text.split(PARTED) for text in texts]
    # Behind the first sign of a mark the rest goes on as if it began a line: behind that sign itself it would be the mark again.
    pieces = [LINE * bool(n) + piece for text in parts for n, piece in enumerate(text)]
    ids = iter(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"])
    lead = [] if len(pieces) == len(texts) else bare(tokenizer, LINE)
    return [
        [token for n, new in enumerate(itertools.islice(ids, len(text))) for token in (new[len(lead) :] if n else new)]
        for text in parts
    ]


def places(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where each token of a user's words stands in them: first character, and the one behind the last. Around a mark in them the
    numbers are near."""
    words = pattern(tokenizer).sub(lambda found: "(" + found[0][1:], text)  # as long, and no mark
    return tokenizer(words, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]


def tokenise(texts: Iterable[str], *, tokenizer: PreTrainedTokenizerFast, together: int = 32) -> Iterator[np.ndarray]:
    """Each text's tokens between the model's begin and end marks, where it has them.

    Some texts `together`: the fast tokenizers spread them over all cores by themselves. Asked directly, they do not compute
    offsets and masks that nobody reads.
    """
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    mark = pattern(tokenizer)
    # What a tokenizer.json says of its training is no part of a document's tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    remaining = (parted(text, mark) for text in texts)
    while batch := list(itertools.islice(remaining, together)):
        whole = [text for text in batch if PARTED not in text]
        ids = (
            encoded.ids for encoded in tokenizer.backend_tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        )
        for text in batch:
            yield np.array([*before, *(bare(tokenizer, text) if PARTED in text else next(ids)), *after])
