"""What a model writes when it is asked: the greedy continuation of prompts, in batches of one length.

Long answers take hours on real models. With a folder to keep them in, answers that were given are not asked for again: a run
that was cut off goes on where it was. The folder belongs to the model, weights and configuration, and to the scores that it is
asked for, and the file in it to the prompts, so nobody else finds or removes them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from longlora.model.load import batch_tokens, must_reach
from longlora.model.seal import WEIGHTS, sha256
from longlora.parallel.sharding import merged, ours, rank

ANSWERING = (WEIGHTS, "config.json", "generation_config.json")
"""What of a model's folder decides its answers: rotary scaling is in the config alone, end marks in the last."""


@contextmanager
def keeping(folder: Path, model: PreTrainedModel, *, scores: Path) -> Generator[Path, None, None]:
    """Where the answers of `model`, opened from `folder`, are kept until the file `scores` is written, and no longer. What ends in
    an error leaves them to the next try."""
    files = sorted(file for pattern in ANSWERING for file in folder.glob(pattern))
    identity = [*map(sha256, files), str(model.dtype), model.device.type, str(scores)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    kept = Path(os.environ.get("LONGLORA_CHECKPOINTS", ".longlora/checkpoints")) / f"answers-{digest}"
    yield kept
    if rank() == 0:
        shutil.rmtree(kept, ignore_errors=True)


@torch.inference_mode()
def answers(
    model: PreTrainedModel, *, prompts: list[list[int]], max_new_tokens: list[int], kept: Path | None = None
) -> list[list[int]]:
    """The greedy continuation of each prompt, as ids; prompts of one length and room go together. Those that are `kept` in that
    folder are taken from there, and new ones put there."""
    must_reach(model, max((len(p) + r for p, r in zip(prompts, max_new_tokens, strict=True)), default=0))
    file = None if kept is None else kept / hashlib.sha256(json.dumps([prompts, max_new_tokens]).encode()).hexdigest()
    # What the first process finds is known to all, so that their batches agree.
    written = merged(read_kept(file) if file is not None and rank() == 0 else {})
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (prompt, room) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        if number not in written:
            groups.setdefault((len(prompt), room), []).append(number)
    batches = []
    for (length, room), numbers in groups.items():
        size = max(1, batch_tokens(model) // (length + room))
        batches += [numbers[first : first + size] for first in range(0, len(numbers), size)]
    given: dict[int, list[int]] = {}
    for batch in (batch for number, batch in enumerate(batches) if ours(number)):
        tokens_BL = torch.tensor([prompts[i] for i in batch], device=model.device)
        out_BL = greedy(model, tokens_BL, room=max_new_tokens[batch[0]])
        new = dict(zip(batch, out_BL[:, tokens_BL.shape[1] :].tolist(), strict=True))
        given |= new
        if file is not None:
            keep(file, new)
    written |= merged(given)
    return [written[number] for number in range(len(prompts))]


def greedy(model: PreTrainedModel, tokens_BL: torch.Tensor, *, room: int) -> torch.Tensor:
    """Prompts and their continuations of up to `room` tokens (B, L + room)."""
    end = model.generation_config.eos_token_id if model.generation_config else None
    plain = GenerationConfig(do_sample=False, max_new_tokens=room, eos_token_id=end, pad_token_id=0)
    out_BL = model.generate(  # type: ignore[reportCallIssue]  # nn.Module's attributes hide the method from the checker
        tokens_BL, attention_mask=torch.ones_like(tokens_BL), generation_config=plain
    )
    assert isinstance(out_BL, torch.Tensor)
    return out_BL


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
