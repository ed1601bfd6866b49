"""Question and answer as tokens to train on: which tokens are the answer's is kept with them, so that only those are learnt.

Two prompts: the tokenizer's own chat template, and the authors' `[INST]{instruction}[/INST]{output}` (LongLoRA's supervised
fine-tuning). A prompt has the tokens that it has when the model is asked; the answer has those that follow it. Marks in
what anybody says are words.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from longlora.data.instructions import Turn
from longlora.data.packing import Pair
from longlora.data.prompt import AUTHORS, continuation, opening, rendered
from longlora.data.tokenise import as_words

SHOWN = 30
"""Characters of a template that a message shows."""


def tokenised(turns: Sequence[Turn], *, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Pair:
    """The tokens of a dialogue, and which of them are answers.

    Raises:
        ValueError: the tokenizer has no chat template, or one that says earlier turns in another way later on, or an answer in
            another way than it asks for one, or refuses some; or no end mark.
    """
    tokens: list[int] = []
    answer: list[bool] = []
    before = ""
    said = [Turn(t.role, as_words(t.content, tokenizer=tokenizer)) for t in turns]
    for text, learnt in chat_pieces(said, tokenizer) if prompt == "chat" else authors_pieces(said):
        opens = not before and prompt != "chat"  # a chat template writes its own begin mark
        new = opening(tokenizer, text) if opens else continuation(tokenizer, text, after=before[-100:])
        if learnt and prompt == "authors":
            if not isinstance(tokenizer.eos_token_id, int):
                raise ValueError(
                    "pairs.prompt = authors ends answers with the tokenizer's end mark, and this one has none"
                )
            new = [*new, tokenizer.eos_token_id]
        tokens += new
        answer += [learnt] * len(new)
        before = text
    return Pair(np.array(tokens, dtype=np.int64), np.array(answer, dtype=bool))


def authors_pieces(turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """Texts, and whether they are learnt. The authors' prompt has no place for a system turn: it goes before the user's words."""
    system = "".join(f"{t.content}\n\n" for t in turns if t.role == "system")
    (before, after), pieces = AUTHORS, []
    for turn in turns:
        if turn.role == "user":
            pieces.append((f"{before}{system}{turn.content}{after}", False))
            system = ""
        elif turn.role == "assistant":
            pieces.append((turn.content, True))
    return pieces


def chat_pieces(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """As `authors_pieces`, by the tokenizer's template. What it writes behind an answer's end mark (a line break) is not learnt.

    Raises:
        ValueError: there is no template, or it rewrites earlier turns, does not go on with the answer where it opens a turn, or
            refuses some.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "pairs.prompt = chat needs a tokenizer with a chat template, and this one has none: use authors"
        )
    messages = [{"role": t.role, "content": t.content} for t in turns]
    pieces: list[tuple[str, bool]] = []
    said = ""
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        open_ = rendered(tokenizer, messages[:number], open_turn=True)
        whole = rendered(tokenizer, messages[: number + 1], open_turn=False)
        if not open_.startswith(said):
            raise ValueError(
                "pairs.prompt = chat: the template rewrites earlier turns, so answers cannot be told apart: use authors, or "
                "records of one answer each"
            )
        learnt = whole[len(open_) :].rstrip()
        # Else marks of thinking, which the template writes by itself, would be learnt as words of the answer.
        if not (whole.startswith(open_) and learnt.lstrip().startswith(turn.content.strip())):
            raise ValueError(
                f"pairs.prompt = chat: the template opens a turn with {open_[-SHOWN:]!r}, and then an answer does not follow as "
                "it is: use authors, or a template that asks for it without thinking"
            )
        pieces += [(open_[len(said) :], False), (learnt, True)]
        said = open_ + learnt
    return pieces
