"""A model asked about a document: the document is read once, and its cache serves every further question.

What is longer than the model's context is refused, cut, or read in overlapping windows, each of which is asked; then the
answer the model is surest of (the mean log-probability of its tokens) is taken, one that says something before one that does
not. Answers are greedy: the same question has the same answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from longlora.data.prompt import Prompt, continuation, frame, listed, taught_ends
from longlora.data.sentences import Span
from longlora.data.tokenise import as_words, places
from longlora.data.wording import LEAD, PLAIN_LEAD, UNSAID, before_question, the_question
from longlora.data.words import words
from longlora.evaluation.answer import rooms
from longlora.model.cache import cut, read, shareable

TooLong = Literal["refuse", "truncate", "windows"]
QUESTION = 128
"""Tokens kept free for a question; a longer one takes what it needs."""
OVERLAP = 8
"""Windows share one part in so many, so that a fact at a border is whole in one of them."""
SLACK = 8
"""Tokens that a window may have more when it is tokenised alone than inside the document."""


@dataclass(frozen=True)
class Answer:
    text: str
    window: Span
    """The characters that the model had before it."""
    certainty: float
    """Mean log-probability of the answer's tokens, its end mark included; 0 is certain."""
    windows: int
    """How many windows were asked."""
    read: int
    """Tokens that had to be read for this answer: the question's, and the document's where it was not kept from before."""


class Session:
    """A document that a model reads once, and the questions on it.

    Raises (when made):
        ValueError: the document is too long and is to be refused; there is no room for it at all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        max_new_tokens: int,
        too_long: TooLong = "refuse",
        prompt: Prompt | None = None,
        question: str = "",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.text, self.max_new_tokens = text.rstrip(), max_new_tokens
        self.prompt: Prompt = prompt or ("chat" if tokenizer.chat_template else "authors")
        self.frame = frame(tokenizer, self.prompt, plain=PLAIN_LEAD)
        self.ends = ends(model, tokenizer=tokenizer, prompt=self.prompt)
        self.context = int(model.config.get_text_config().max_position_embeddings)
        kept = max(QUESTION, len(self.question_ids(question)))
        space = self.context - max_new_tokens - kept - len(self.prefix_ids("")) - SLACK
        if space < 1:
            raise ValueError(
                f"the model reads {self.context} tokens, and prompt, question and an answer of {max_new_tokens} need "
                f"{self.context - space}: ask for a shorter answer"
            )
        self.windows, self.length = windows(self.text, tokenizer=tokenizer, space=space)
        if len(self.windows) > 1 and too_long == "refuse":
            # tokens of an answer for which the document would be short enough
            spare = space + max_new_tokens - self.length
            shorter = f"ask for a shorter answer (--max-new-tokens {spare}), " if spare > 0 else ""
            raise ValueError(
                f"the document has {self.length} tokens, and the model reads {self.context}, of which {space} are left for "
                f"it: {shorter}read its beginning (--too-long truncate), ask part by part (--too-long windows), or take a "
                "model of a longer context"
            )
        if too_long == "truncate":
            self.windows = self.windows[:1]
        self.cached: tuple[Span, list[int], DynamicCache] | None = None

    def notice(self) -> str:
        """What is done with a document that is too long, in a line; '' for one that is not."""
        last = self.windows[-1].end
        if last < len(self.text):
            line = self.text.count("\n", 0, last) + 1
            return (
                f"the document has {self.length} tokens, more than the model reads ({self.context}): only its beginning is "
                f"read, up to line {line}, character {last:,} of {len(self.text):,}"
            )
        if len(self.windows) > 1:
            return (
                f"the document has {self.length} tokens, more than the model reads ({self.context}): it is asked in "
                f"{len(self.windows)} overlapping windows, and the answer it is surest of is taken"
            )
        return ""

    def prefix_ids(self, text: str) -> list[int]:
        """All that comes before a question, which is the same for every question."""
        return self.frame.open(before_question(as_words(text, tokenizer=self.tokenizer)))

    def question_ids(self, question: str) -> list[int]:
        asked = as_words(question, tokenizer=self.tokenizer)
        return continuation(self.tokenizer, the_question(asked) + self.frame.after, after=LEAD)

    def ask(self, question: str, *, say: Callable[[str], None] | None = None) -> Answer:
        """The answer; with one window it is also told to `say` word by word, as it comes. With more it is told at the end, and ''
        before each of them, so that `say` can end the work by an error.

        Raises:
            ValueError: the question is empty, or too long for the room that was left.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        streamer = CallbackStreamer(self.tokenizer, say, ends=self.ends) if say and len(self.windows) == 1 else None
        found = []
        for window in self.windows:
            if say:
                say("")
            found.append(self.answer(question, window, streamer))
        best = max(found, key=lambda a: (words(a.text) not in ([], words(UNSAID)), a.certainty))
        best = replace(best, read=sum(a.read for a in found))
        if say and not streamer and best.text:
            say(best.text)
        return best

    @torch.inference_mode()
    def answer(self, question: str, window: Span, streamer: "CallbackStreamer | None") -> Answer:
        """The answer in one window, told to `streamer` as it comes.

        Raises:
            ValueError: the question is too long for the room that was left.
        """
        kept = self.kept(window) is not None
        prefix, cache = self.read(window)
        asked = self.question_ids(question)
        tokens = prefix + asked
        if len(tokens) + self.max_new_tokens > self.context:
            raise ValueError(
                f"the question has {len(asked)} tokens, and {self.context - self.max_new_tokens - len(prefix)} are left for it"
            )
        tokens_BL = torch.tensor([tokens], device=self.model.device)
        parts = rooms(self.model, length=len(tokens), room=self.max_new_tokens)
        steps: list[torch.Tensor] = []
        try:
            for room in parts:
                out = self.model.generate(
                    tokens_BL,
                    attention_mask=torch.ones_like(tokens_BL),
                    past_key_values=cache,
                    generation_config=self.greedy(room),
                    streamer=streamer if len(parts) == 1 else None,
                    stopping_criteria=StoppingCriteriaList([LineEnd(self, len(tokens))]),
                )
                tokens_BL, steps = out.sequences, [*steps, *out.logits]
                if self.ended(tokens_BL[0, len(tokens) :]) or len(out.logits) < room:
                    break
        except BaseException:
            self.cached = None  # it may hold half a step
            raise
        if cache is not None:
            cut(cache, len(prefix))
        new_N = tokens_BL[0, len(tokens) :]
        logits_NV = torch.stack([step[0] for step in steps]).float()
        certainty = logits_NV.log_softmax(dim=-1).gather(1, new_N[:, None]).mean().item()
        said = without_end(new_N.tolist(), ends=self.ends)
        text = str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()
        if streamer and text and len(parts) > 1:  # each part would begin its words anew
            streamer.say(text)
        return Answer(text, window, certainty, len(self.windows), read=len(asked) if kept else len(tokens))

    def ended(self, new_N: torch.Tensor) -> bool:
        """Whether an answer of these tokens goes on no further: a plain one ends with its line, the first that is not empty."""
        return int(new_N[-1]) in self.ends or (
            self.prompt == "plain" and "\n" in str(self.tokenizer.decode(new_N)).lstrip()
        )

    def greedy(self, room: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=self.ends or None,
            pad_token_id=self.ends[0] if self.ends else None,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def kept(self, window: Span) -> tuple[list[int], DynamicCache] | None:
        return self.cached[1:] if self.cached and self.cached[0] == window else None

    def read(self, window: Span) -> tuple[list[int], DynamicCache | None]:
        """The tokens before any question, and their cache, kept for the next one; None where a model's cache cannot be cut."""
        if kept := self.kept(window):
            return kept
        prefix = self.prefix_ids(self.text[slice(*window)])
        if not shareable(self.model):
            return prefix, None
        self.cached = None  # free the last window's before the next is read
        cache = DynamicCache(config=self.model.config)
        read(self.model, torch.tensor([prefix], device=self.model.device), cache=cache, keep=1)
        self.cached = (window, prefix, cache)
        return prefix, cache


class LineEnd(StoppingCriteria):
    """Ends an answer, which begins behind `start` tokens, where its session says."""

    def __init__(self, session: Session, start: int) -> None:
        self.session, self.start = session, start

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        done = torch.tensor([self.session.ended(input_ids[0, self.start :])], device=input_ids.device)
        return cast(torch.BoolTensor, done)


def ends(model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The marks at which an answer ends: those that the model names, and what it was taught. A base that learnt a template mostly
    names another."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({*listed(named), *taught_ends(tokenizer, prompt)})


def without_end(answer: list[int], *, ends: list[int]) -> list[int]:
    """The tokens before the mark that ends an answer: where that is a word of the tokenizer, it would be read as one."""
    return answer[:-1] if answer and answer[-1] in ends else answer


class CallbackStreamer(TextStreamer):
    """Passes an answer on as soon as words are whole, without the white space around it and the mark that ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None], *, ends: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say, self.ends = say, ends
        self.begun, self.held = False, ""

    def put(self, value: torch.Tensor) -> None:
        """As transformers', but each token is decoded with all before it: a line's first one loses the space before it alone."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache += without_end(value.flatten().tolist(), ends=self.ends)
        text = str(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))
        whole = (
            text
            if text and self._is_chinese_char(ord(text[-1]))
            else text[: len(text) - len(re.split(r"\s", text)[-1])]
        )
        self.on_finalized_text(whole[self.print_len :])
        self.print_len = max(self.print_len, len(whole))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self.held + text if self.begun else text.lstrip()
        self.held = text[len(text.rstrip()) :]  # said only if more follows
        if whole := text.rstrip():
            self.begun = True
            self.say(whole)


def windows(text: str, *, tokenizer: PreTrainedTokenizerBase, space: int) -> tuple[list[Span], int]:
    """The whole text as one window if it has at most `space` tokens, else overlapping ones; and its length in tokens."""
    offsets = places(tokenizer, text)
    length = len(offsets)
    if length <= space:
        return [Span(0, len(text))], length
    step = max(1, space - space // OVERLAP)
    starts = [*range(0, length - space, step), length - space]
    return [Span(offsets[a][0], offsets[a + space - 1][1]) for a in starts], length
