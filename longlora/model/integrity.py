"""Whether a merged model is whole: facts about its files, each a number and a sentence, for the gate to judge.

What LongLoRA's users ran into (weights that are NaN, an adapter that never trained, RoPE scaling missing from the merged
config, a tokenizer of another model, a file cut off in copying) is asked of the folder itself, as any user would open it.
A broken folder is a fact with value 0, not a crash: the gate has to say what is wrong. What it raises may be anything:
transformers looks at little of what it reads, and the tokenizers library raises plain Exceptions.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from longlora.model.ending import answers, due_ends, ends
from longlora.model.position import Position, extend, reach
from longlora.model.seal import broken
from longlora.section import first_line

PROBE = "The pass key is 90417.\n\tNaïve café, §12: «Ω» 東京 🙂  two  spaces; don't ALL-CAPS e=mc^2 </s>"
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Fact:
    """1 for yes, 0 for no, or a quantity; and why, in words."""

    value: float
    reason: str


def measure(base: Path, *, extended: Path, position: Position) -> dict[str, Any]:
    """All facts about the model `extended`, made from `base` under `position`.

    Raises:
        ValueError: `position` cannot extend `base`, or `base` cannot be read: no facts about the merged model.
    """
    own = AutoConfig.from_pretrained(base, local_files_only=True)
    expected = extend(own, method=position.method, context=position.context)
    whole, model = opened(extended)
    facts = {
        "window": Fact(reach(own.get_text_config()), "positions that the base reaches"),
        "target": Fact(position.context, "position.context"),
        "whole": whole,
        "sealed": sealed(extended),
        "context": context(extended, expected=expected),
        "rope": rope(extended, expected=expected, method=position.method),
        "tokenizer": reading(base, extended=extended, context=expected.get_text_config().max_position_embeddings),
    }
    if model is None:
        skipped = Fact(0, "not looked at: the model does not open")
        facts |= {"finite": skipped, "trained": skipped, "logits": skipped}
    else:
        facts |= {
            "finite": finite(extended),
            "trained": trained(base, extended=extended, prefix=f"{model.base_model_prefix}."),
            "logits": logits(model, length=position.context),
        }
    return {"integrity": {name: asdict(fact) for name, fact in facts.items()}}


def opened(folder: Path) -> tuple[Fact, PreTrainedModel | None]:
    """Whether plain transformers opens the model with every weight it needs, of the right shape, and none to spare; and the model,
    in the precision that its config names: what is finite in float32, in which it is measured on a CPU, may overflow in float16."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        if asked := config.get(
            "quantization_config"
        ):  # a CPU reads some as if this were not there, and measures them so
            return Fact(0, f"its config asks for quantised weights: {json.dumps(asked)[:80]}"), None
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, because loading info is asked for
            folder, local_files_only=True, dtype="auto", output_loading_info=True
        )
    except Exception as error:
        return Fact(0, f"does not open: {first_line(error)}"), None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            named = ", ".join(sorted(map(str, report[kind]))[:3])
            return Fact(0, f"{len(report[kind])} {kind.replace('_', ' ')}: {named}"), None
    return Fact(1, f"opens with all {len(model.state_dict())} tensors"), model.eval()


def sealed(folder: Path) -> Fact:
    """Whether the files are, byte for byte, those that the merge wrote, and no other is there."""
    found = broken(folder)
    return Fact(0, "; ".join(found)) if found else Fact(1, "every file has the digest that it was written with")


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model's files, one at a time, sorted by name within each file."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in names(file):
                yield name, stored.get_tensor(name)


def names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return sorted(stored.keys())


def finite(folder: Path) -> Fact:
    total, bad = 0, []
    for name, tensor in tensors(folder):
        total += 1
        if not torch.isfinite(tensor.float()).all():  # which 8 bits cannot be asked
            bad.append(name)
    if bad:
        return Fact(
            0, f"{len(bad)} of {total} tensors {'holds' if len(bad) == 1 else 'hold'} NaN or infinity, {bad[0]} first"
        )
    return Fact(1, f"all {total} tensors are finite")


def trained(base: Path, *, extended: Path, prefix: str) -> Fact:
    """Whether any weight differs from the base's. A base that was saved without its head has names without `prefix`."""
    before = {
        name.removeprefix(prefix): (file, name) for file in sorted(base.glob("*.safetensors")) for name in names(file)
    }
    changed, squares, squares_before = 0, 0.0, 0.0
    for name, tensor in tensors(extended):
        if name.removeprefix(prefix) not in before:
            continue
        file, own = before[name.removeprefix(prefix)]
        with safe_open(file, framework="pt") as stored:
            # A base kept in more bits than its config says is rounded by the merge: that is no training.
            old = stored.get_tensor(own).to(tensor.dtype).double()
        if old.shape != tensor.shape:
            return Fact(1, f"{name} has another shape than the base's")
        squares += (tensor.double() - old).square().sum().item()
        squares_before += old.square().sum().item()
        changed += not torch.equal(tensor.double(), old)
    if not changed:
        return Fact(0, "every weight is the base's: the adapter changes nothing")
    share = math.sqrt(squares / squares_before) if squares_before else math.inf
    differ = "differs" if changed == 1 else "differ"
    return Fact(
        1, f"{changed} of {len(before)} tensors {differ} from the base's, together by {share:.2%} of their norm"
    )


def context(folder: Path, *, expected: PreTrainedConfig) -> Fact:
    """Whether the config says the length that was trained for (under dynamic scaling: the base's, which that method needs)."""
    try:
        stated = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().max_position_embeddings
    except Exception as error:
        return Fact(0, f"the config does not open: {first_line(error)}")
    due = expected.get_text_config().max_position_embeddings
    if stated != due:
        return Fact(0, f"the config says {stated} positions, and should say {due}")
    return Fact(1, f"the config says {stated} positions")


def rope(folder: Path, *, expected: PreTrainedConfig, method: str) -> Fact:
    """Whether the rotary settings in the config are those that the model was trained under."""
    due = rotary_settings(expected)
    try:
        found = rotary_settings(AutoConfig.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        return Fact(0, f"the config does not open: {first_line(error)}")
    if found != due:
        return Fact(0, f"the config has {json.dumps(found)}, trained under was {json.dumps(due)}")
    return Fact(1, f"the config has the settings of method {method}, which were trained under")


def rotary_settings(config: PreTrainedConfig) -> Any:
    """As the model is built by them: an original window beside the settings counts before the one among them."""
    said = config.get_text_config().to_dict()
    settings, window = said.get("rope_parameters"), said.get("original_max_position_embeddings")
    return {**settings, "original_max_position_embeddings": window} if settings and window else settings


def reading(base: Path, *, extended: Path, context: int) -> Fact:
    """Whether texts and turns of a talk are read as the base reads them, and whole up to `context` tokens: a length at which to cut
    stands in two files, of which transformers asks one, and other clients the other; and whether answers end where the base and its
    chat template say, which perplexity and keys do not show."""
    fact = tokenizer(base, extended=extended)
    if not fact.value:
        return fact
    own, found = (AutoTokenizer.from_pretrained(folder, local_files_only=True) for folder in (base, extended))
    if found.chat_template != own.chat_template:
        return Fact(0, "not the base's tokenizer: another chat template")
    file = extended / "tokenizer.json"
    cut = (json.loads(file.read_text("utf-8")).get("truncation") or {}) if file.is_file() else {}
    if (longest := min(found.model_max_length, cut.get("max_length", math.inf))) < context:
        return Fact(0, f"the tokenizer cuts texts at {longest:,} tokens, and should read {context:,}")
    due = due_ends(base)
    try:
        stated, longest = ends(extended), answers(extended).max_length or context
    except Exception as error:
        return Fact(0, f"generation_config.json does not open: {first_line(error)}")
    if stated != due:
        return Fact(0, f"an answer ends at the tokens {stated}, and should end at {due}")
    if longest < context:
        return Fact(
            0, f"generation_config.json allows {longest:,} tokens of text and answer, and should allow {context:,}"
        )
    return fact


def tokenizer(base: Path, *, extended: Path) -> Fact:
    """Whether the tokenizer is the base's: same vocabulary, same special tokens, same ids for a probe, same rules."""
    own = AutoTokenizer.from_pretrained(base, local_files_only=True)
    try:
        found = AutoTokenizer.from_pretrained(extended, local_files_only=True)
        same = {
            "vocabulary": found.get_vocab() == own.get_vocab(),
            "special tokens": found.special_tokens_map == own.special_tokens_map,
            "ids of a probe text": found(PROBE)["input_ids"] == own(PROBE)["input_ids"],
            "rules": rules(found) == rules(own),
        }
    except Exception as error:
        return Fact(0, f"the tokenizer does not open: {first_line(error)}")
    other = [what for what, equal in same.items() if not equal]
    if other:
        return Fact(0, f"not the base's tokenizer: other {', other '.join(other)}")
    return Fact(1, f"the base's tokenizer, {len(own)} tokens")


def rules(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """By what a text is cut into pieces of the vocabulary, and put together again: a probe shows a few of them."""
    if not getattr(tokenizer, "backend_tokenizer", None):  # one in Python: its class is its rules
        return [type(tokenizer).__name__]
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return [parts[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")]


@torch.inference_mode()
def logits(model: PreTrainedModel, *, length: int) -> Fact:
    """Whether a probe text has finite logits at the first and at the last positions of the context."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens_BL = torch.arange(PROBE_TOKENS)[None] % vocabulary
    for first in (0, length - PROBE_TOKENS):
        positions_BL = torch.arange(first, first + PROBE_TOKENS)[None]
        found_BLV = model(input_ids=tokens_BL, position_ids=positions_BL, use_cache=False).logits
        if not torch.isfinite(found_BLV).all():
            return Fact(0, f"logits at positions {first} to {first + PROBE_TOKENS - 1} are not finite")
    return Fact(1, f"finite at positions 0 to {PROBE_TOKENS - 1} and {length - PROBE_TOKENS} to {length - 1}")
