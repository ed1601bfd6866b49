"""What a model writes when it is asked: the greedy continuation of prompts, in batches of one length.

Long answers take hours on real models. With a folder to keep them in, answers that were given are not asked for again: a run
that was cut off goes on where it was. The folder belongs to the weights and the file in it to the prompts, so no other run
finds them.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from longlora.plain import batch_tokens
from longlora.seal import WEIGHTS, sha256


def kept_folder(model: Path) -> Path:
    """Where the answers of the model in the folder `model` are kept, whatever its name."""
    identity = hashlib.sha256("".join(sha256(f) for f in sorted(model.glob(WEIGHTS))).encode()).hexdigest()[:16]
    return Path(os.environ.get("LONGLORA_CHECKPOINTS", ".longlora/checkpoints")) / f"answers-{identity}"


@torch.inference_mode()
def answers(
    model: PreTrainedModel, *, prompts: list[list[int]], rooms: list[int], kept: Path | None = None
) -> list[list[int]]:
    """The greedy continuation of each prompt, as ids; prompts of one length and room go together. Those that are `kept` in that
    folder are taken from there, and new ones put there."""
    file = (
        None if kept is None else kept / (hashlib.sha256(json.dumps([prompts, rooms]).encode()).hexdigest() + ".jsonl")
    )
    written = {} if file is None else read_kept(file)
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
        if number not in written:
            groups.setdefault((len(prompt), room), []).append(number)
    for (length, room), numbers in groups.items():
        size = max(1, batch_tokens(model) // (length + room))
        for first in range(0, len(numbers), size):
            group = numbers[first : first + size]
            tokens_BL = torch.tensor([prompts[i] for i in group], device=model.device)
            out_BL = greedy(model, tokens_BL, room=room)
            given = dict(zip(group, out_BL[:, length:].tolist(), strict=True))
            written |= given
            if file is not None:
                keep(file, given)
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
    """Add answers to the file, one line each; a line that a sudden end left unfinished is not read again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(f"{json.dumps([number, ids])}\n" for number, ids in given.items())


def read_kept(file: Path) -> dict[int, list[int]]:
    """The answers in the file by the number of their prompt, up to the last whole line."""
    if not file.exists():
        return {}
    whole, _, rest = file.read_text().rpartition("\n")
    if rest:
        file.write_text(whole + "\n" if whole else "")
    return {number: ids for number, ids in map(json.loads, whole.splitlines())}
