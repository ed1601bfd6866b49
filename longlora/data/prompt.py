"""Prompts put together from tokens: pieces are tokenised as they are inside one text, and lengths come out exact."""

from transformers import PreTrainedTokenizerBase


def continuation(tokenizer: PreTrainedTokenizerBase, text: str, *, after: str) -> list[int]:
    """The ids of `text` as they are after `after`, so without the space that some tokenizers put before every text."""
    return continuations(tokenizer, [text], after=after)[0]


def continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, after: str) -> list[list[int]]:
    """`continuation` of each text, in one call of the tokenizer."""
    known = tokenizer(after, add_special_tokens=False)["input_ids"]
    wholes = tokenizer([after + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    # Where the tokenizer joins the two across the border, the token streams cannot be parted: then the text alone.
    return [
        whole[len(known) :] if whole[: len(known)] == known else tokenizer(text, add_special_tokens=False)["input_ids"]
        for whole, text in zip(wholes, texts, strict=True)
    ]


def opening(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` where it opens a prompt: behind whatever the tokenizer puts first by itself (a begin mark, or nothing)."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    marked = tokenizer(text, verbose=False)["input_ids"]
    return marked[: marked.index(bare[0])] + bare


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after a user's words, the model's turn opened.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("prompt = chat needs a tokenizer with a chat template, and this one has none: use plain")
    words = "THE-WORDS-OF-THE-USER"
    turn = [{"role": "user", "content": words}]
    before, after = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)).split(words)
    return before, after


def hidden(lines: list[list[int]], *, hay: list[int], start: int, cuts: list[int], length: int) -> list[int]:
    """`length` tokens of the text `hay` from `start` on, begun again where it ends, with each of `lines` put in after as many of
    them as `cuts` says, which rise."""
    endless = hay * (1 + -(-length // len(hay)))
    body, done = [], 0
    for cut, line in zip(cuts, lines, strict=True):
        body += endless[start + done : start + cut] + line
        done = cut
    return body + endless[start + done : start + length]
