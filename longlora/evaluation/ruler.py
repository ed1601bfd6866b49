"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654): what perplexity and one passkey do not show.

Needles (one; one among others like it; one key with several values; several keys asked at once), variable tracking, common
words and frequent words. The tasks, their sizes and their scoring are RULER's: the share of the right answers that occur in
what the model writes (`string_match_all`). The wording and the haystack (the held-out documents) are ours, so scores compare
models of one pipeline; for RULER's own table use its own texts.
"""

import random
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.data.prompt import WORD, Prompt, continuation, continuations, frame, haystack, hidden
from longlora.evaluation.answer import answers, text_of
from longlora.evaluation.interval import of_trials
from longlora.evaluation.ruler_tasks import Riddle, Task, common, frequent, needles, tracking
from longlora.parallel.sharding import say
from longlora.section import Once, Section, Seed

FEWEST = {"common": 110, "frequent": 49}
"""Words of the shortest list: ten words ten times and some others; three words that stand out, behind the dots."""
VOCABULARY = 24
"""Different words that the held-out documents must have."""


class Ruler(Section):
    lengths: Annotated[list[PositiveInt], Once] = Field(min_length=1)
    """Prompts in tokens, the room for the answer included."""
    tasks: Annotated[list[Task], Once] = Field(min_length=1)
    """Needles, tracking and word counts; longlora/evaluation/ruler_tasks.py describes each."""
    samples: int = Field(gt=0)
    """Prompts for each length and task."""
    threshold: float = Field(gt=0, le=1)
    """The effective context is the longest length at which, and below which, the mean over tasks reaches this; RULER's own is
    0.856, the score of Llama 2 7B at 4,096 tokens."""
    prompt: Literal["plain", "chat"]
    """plain: text to be continued; chat: a user's turn in the tokenizer's own template."""
    seed: Seed


class Writer:
    """Riddles as prompts of a length in tokens, the room for the answer included: of just that length, or up to 1 % shorter where
    a list is asked about, for it has whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, texts: list[str], prompt: Prompt) -> None:
        """Raises ValueError where the texts are too short for a haystack, or a chat template is missing."""
        self.tokenizer = tokenizer
        self.frame = frame(tokenizer, prompt, plain=" ")
        self.hay = haystack(tokenizer, texts)
        self.words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{5,9}\b", text)})
        if len(self.words) < VOCABULARY:
            raise ValueError(f"the held-out documents have {len(self.words)} words to ask for, {VOCABULARY} are needed")

    def write(self, task: Task, *, length: int, generator: random.Random) -> tuple[list[int], Riddle]:
        """The ids of a prompt, and the riddle it asks.

        Raises:
            ValueError: `length` has no room for the task.
        """
        if task in ("common", "frequent"):
            return self.longest(task, length=length, seed=generator.random())
        riddle = tracking(generator) if task == "tracking" else needles(task, generator, self.words)
        head, lines, end = self.pieces(riddle)
        spare = length - riddle.room - len(head) - len(end) - sum(map(len, lines))
        if spare < 0:
            raise ValueError(
                f"ruler.lengths: {length} tokens are too few for {task}, without filler it is {length - spare}"
            )
        return head + self.spread(lines, spare=spare, generator=generator) + end, riddle

    def longest(self, task: Task, *, length: int, seed: float) -> tuple[list[int], Riddle]:
        """The riddle of a list of words, with as many words as fit: bisection over lists made from the same random numbers."""

        def made(budget: int) -> tuple[list[int], Riddle]:
            generator = random.Random(seed)
            riddle = (
                common(generator, self.words, budget=budget) if task == "common" else frequent(generator, budget=budget)
            )
            head, lines, end = self.pieces(riddle)
            return head + [token for line in lines for token in line] + end, riddle

        low, high = FEWEST[task], length
        best = made(low)
        if len(best[0]) + best[1].room > length:
            raise ValueError(
                f"ruler.lengths: {length} tokens are too few for {task}, its shortest is {len(best[0]) + best[1].room}"
            )
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            tried = made(middle)
            if len(tried[0]) + tried[1].room <= length:
                low, best = middle, tried
            else:
                high = middle
        if task == "common" and len(best[1].lines) < low:
            raise ValueError(
                f"ruler.lengths: {length} tokens are too many for common, the {len(self.words)} words of the held-out documents "
                f"fill {len(best[0]) + best[1].room}: hold out more documents, or leave common out of ruler.tasks"
            )
        return best

    def pieces(self, riddle: Riddle) -> tuple[list[int], list[list[int]], list[int]]:
        """The ids of what stands before the text, of the lines, and of what stands after."""
        lines = continuations(self.tokenizer, [" " + line for line in riddle.lines], after=WORD)
        end = continuation(self.tokenizer, riddle.question + self.frame.after + riddle.lead, after=WORD)
        return self.frame.open(riddle.head), lines, end

    def spread(self, lines: list[list[int]], *, spare: int, generator: random.Random) -> list[int]:
        """`spare` tokens of running text from a random place on, with the lines put in, in order, at random places."""
        start = generator.randrange(len(self.hay))
        cuts = sorted(generator.randrange(spare + 1) for _ in lines)
        return hidden(lines, hay=self.hay, start=start, cuts=cuts, length=spare)


def match_all(text: str, wanted: list[str]) -> float:
    """RULER's `string_match_all`: the share of the answers that occur in the text, upper and lower case alike."""
    return sum(answer.lower() in text.lower() for answer in wanted) / len(wanted)


def measure(
    model: PreTrainedModel,
    *,
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    settings: Ruler,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Scores of the model `label` by length, and within it by task; and the effective context. Answers are kept in the
    folder `kept`.

    Raises:
        ValueError: a length has no room for a task, the texts are too short, or there is no chat template for a chat prompt.
    """
    writer = Writer(tokenizer, texts=texts, prompt=settings.prompt)
    result: dict[str, Any] = {"prompt": settings.prompt}
    for length in sorted(settings.lengths):
        made = [
            (
                task,
                *writer.write(
                    task, length=length, generator=random.Random(f"{settings.seed} {length} {task} {number}")
                ),
            )
            for task in settings.tasks
            for number in range(settings.samples)
        ]
        texts_ = answers(
            model, prompts=[ids for _, ids, _ in made], max_new_tokens=[e.room for _, _, e in made], kept=kept
        )
        scores = [
            (task, match_all(text_of(ids, tokenizer=tokenizer), e.answers))
            for (task, _, e), ids in zip(made, texts_, strict=True)
        ]
        by_task = {task: of_trials([s for t, s in scores if t == task]) for task in settings.tasks}
        result[str(length)] = of_trials([s for _, s in scores]) | {"task": by_task}
        say(f"{length} tokens: " + ", ".join(f"{t} {s['value']:.0%}" for t, s in by_task.items()))
    result["effective"] = {"value": effective(result, settings=settings), "threshold": settings.threshold}
    return {"ruler": {label: result}}


def effective(result: dict[str, Any], *, settings: Ruler) -> int:
    """The longest length at which, and below which, the threshold is reached; 0 for none."""
    reached = 0
    for length in sorted(settings.lengths):
        if result[str(length)]["value"] < settings.threshold:
            break
        reached = length
    return reached
