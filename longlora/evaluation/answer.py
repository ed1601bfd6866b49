"""What a model writes when it is asked: the greedy continuation of prompts, in batches of one length.

Long answers take hours on real models. With a folder to keep them in, answers that were given are not asked for again: a run
that was cut off goes on where it was. The folder belongs to the model, weights and configuration, and to the scores that it is
asked for, and the file in it to the prompts, so nobody else finds or removes them.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from longlora.data.prompt import listed
from longlora.model.cache import beginning, read, shareable, steady
from longlora.model.load import batch_tokens, must_reach
from longlora.model.seal import WEIGHTS, sha256
from longlora.parallel.sharding import merged, ours, rank, say

ANSWERING = (WEIGHTS, "config.json", "generation_config.json")
"""What of a model's folder decides its answers: rotary scaling is in the config alone, end marks in the last."""

TELL = 60.0
"""Seconds between two words on how far it is."""


@contextmanager
def keeping(folder: Path, model: PreTrainedModel, *, scores: Path) -> Generator[Path, None, None]:
    """Where the answers of `model`, opened from `folder`, are kept until the file `scores` is written, and no longer. What ends in
    an error leaves them to the next try."""
    files = sorted(file for pattern in ANSWERING for file in folder.glob(pattern))
    identity = [*map(sha256, files), str(model.dtype), model.device.type, str(scores)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    kept = Path(os.environ.get("LONGLORA_CHECKPOINTS") or ".longlora/checkpoints") / f"answers-{digest}"
    yield kept
    if rank() == 0:
        shutil.rmtree(kept, ignore_errors=True)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    *,
    prompts: list[list[int]],
    max_new_tokens: list[int],
    kept: Path | None = None,
    documents: Sequence[str] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, as ids, without the mark that ends it and what fills up a batch behind that; prompts
    of one length and room go together. Those on one of `documents` (one per prompt) go in turn, and what they begin with is read
    once. Those that are `kept` in that folder are taken from there, and new ones put there."""
    must_reach(model, max((len(p) + r for p, r in zip(prompts, max_new_tokens, strict=True)), default=0))
    file = None if kept is None else kept / hashlib.sha256(json.dumps([prompts, max_new_tokens]).encode()).hexdigest()
    # What the first process finds is known to all, so that their batches agree.
    written = merged(read_kept(file) if file is not None and rank() == 0 else {})
    left = [number for number in range(len(prompts)) if number not in written]
    families = alike(left, documents) if documents is not None and shareable(model) else []
    read_together = {number for family in families for number in family}
    groups: dict[tuple[int, int], list[int]] = {}
    for number in left:
        if number not in read_together:
            groups.setdefault((len(prompts[number]), max_new_tokens[number]), []).append(number)
    batches: list[list[int]] = []
    for (length, room), numbers in groups.items():
        size = max(1, batch_tokens(model) // (length + room))
        batches += [numbers[first : first + size] for first in range(0, len(numbers), size)]
    work = [
        *(in_turn(model, family, prompts=prompts, max_new_tokens=max_new_tokens) for family in families),
        *(at_once(model, batch, prompts=prompts, room=max_new_tokens[batch[0]]) for batch in batches),
    ]
    share = sum(len(numbers) for number, numbers in enumerate([*families, *batches]) if ours(number))
    given: dict[int, list[int]] = {}
    told = time.monotonic()
    for new in (new for number, part in enumerate(work) if ours(number) for new in part):
        given |= new
        if file is not None:
            keep(file, new)
        if time.monotonic() > told + TELL:
            told = time.monotonic()
            say(f"{len(given):,} of {share:,} answers")
    written |= merged(given)
    ends = ends_of(model)
    return [[*takewhile(lambda token: token not in ends, written[number])] for number in range(len(prompts))]


def ends_of(model: PreTrainedModel) -> list[int]:
    """The tokens at which its answers end."""
    return listed(model.generation_config.eos_token_id) if model.generation_config else []


def alike(numbers: list[int], documents: Sequence[str]) -> list[list[int]]:
    """The numbers that have a document in common with another."""
    of: dict[str, list[int]] = {}
    for number in numbers:
        of.setdefault(documents[number], []).append(number)
    return [family for family in of.values() if len(family) > 1]


def at_once(
    model: PreTrainedModel, batch: list[int], *, prompts: list[list[int]], room: int
) -> Iterator[dict[int, list[int]]]:
    """The answers to prompts of one length, by number."""
    tokens_BL = torch.tensor([prompts[number] for number in batch], device=model.device)
    out_BL = greedy(model, tokens_BL, room=room)
    yield dict(zip(batch, out_BL[:, tokens_BL.shape[1] :].tolist(), strict=True))


def in_turn(
    model: PreTrainedModel, family: list[int], *, prompts: list[list[int]], max_new_tokens: list[int]
) -> Iterator[dict[int, list[int]]]:
    """The answers to prompts that begin alike, each by its number as it is given. Their beginning is read once."""
    columns = zip(*(prompts[number][:-1] for number in family), strict=False)  # the last token is asked after
    known = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    cache = DynamicCache(config=model.config)
    if known:
        read(model, torch.tensor([prompts[family[0]][:known]], device=model.device), cache=cache, keep=1)
    for number in family:
        tokens_BL = torch.tensor([prompts[number]], device=model.device)
        own = beginning(cache, length=known, rows=1) if known else None
        out_BL = greedy(model, tokens_BL, room=max_new_tokens[number], cache=own)
        yield {number: out_BL[0, tokens_BL.shape[1] :].tolist()}


def greedy(
    model: PreTrainedModel, tokens_BL: torch.Tensor, *, room: int, cache: DynamicCache | None = None
) -> torch.Tensor:
    """Prompts and their continuations of up to `room` tokens (B, L + room). The tokens in the `cache` are not read again."""
    end = ends_of(model)
    first, *later = rooms(model, length=tokens_BL.shape[1], room=room)
    if later:
        begun_BL = greedy(model, tokens_BL, room=first)
        ends = torch.tensor(end, device=model.device)
        going_B = ~torch.isin(begun_BL[:, tokens_BL.shape[1] :], ends).any(dim=1)
        if not going_B.any():
            return begun_BL
        rest_BL = greedy(model, begun_BL[going_B], room=room - first)
        whole_BL = F.pad(begun_BL, (0, rest_BL.shape[1] - begun_BL.shape[1]))
        whole_BL[going_B] = rest_BL
        return whole_BL
    plain = GenerationConfig(do_sample=False, max_new_tokens=room, eos_token_id=end or None, pad_token_id=0)
    out_BL = model.generate(  # type: ignore[reportCallIssue]  # nn.Module's attributes hide the method from the checker
        tokens_BL, attention_mask=torch.ones_like(tokens_BL), generation_config=plain, past_key_values=cache
    )
    assert isinstance(out_BL, torch.Tensor)
    return out_BL


def rooms(model: PreTrainedModel, *, length: int, room: int) -> list[int]:
    """The `room` behind a prompt of `length` tokens, in the parts that may be written over one cache each. Under longrope a text
    that grows beyond the base's window has all of its keys turned otherwise, those that a cache holds too, so it is read again."""
    rope = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    border = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    if border is None or steady(model) or not length <= border < length + room - 1:
        return [room]
    return [border + 1 - length, length + room - border - 1]  # the last token before it is chosen by `border` others


def text_of(ids: list[int], *, tokenizer: PreTrainedTokenizerBase) -> str:
    """What an answer says up to its first mark: a template may end a turn with one that no generation config names."""
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return str(tokenizer.decode(list(takewhile(lambda token: token not in marks, ids))))


def keep(file: Path, given: dict[int, list[int]]) -> None:
    """Add answers to this process's file, one line each; a line that a sudden end left unfinished is not read again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(f".{rank()}.jsonl").open("a") as stream:
        stream.writelines(f"{json.dumps([number, ids])}\n" for number, ids in given.items())


def read_kept(file: Path) -> dict[int, list[int]]:
    """The answers that all processes kept, by the number of their prompt, up to the last whole line of each."""
    found: dict[int, list[int]] = {}
    for part in sorted(file.parent.glob(f"{file.name}.*.jsonl")):
        lines, _, rest = part.read_text().rpartition("\n")
        if rest:
            part.write_text(lines + "\n" if lines else "")
        found |= dict(map(json.loads, lines.splitlines()))
    return found
