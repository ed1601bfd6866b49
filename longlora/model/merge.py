"""The adapter folded into the base: an ordinary model of its architecture, with a longer context.

W <- W + B A alpha / rank, and the trained embeddings and norms in place of the base's. The authors' script merges with
`strict=False` and forgets the RoPE scaling in the config, after which the model answers blanks; here nothing is written
unless the merged model gives the adapter model's logits in float32. Then its weights are rounded to the base's number format, as
the base's were, and how much that moves them is told.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from longlora.model.ending import due_ends
from longlora.model.quiet_peft import PeftModel
from longlora.model.seal import seal
from longlora.section import write_json

TOLERANCE = 1e-4
"""Largest difference of two logits in float32, relative to the largest logit: rounding of W + BA, measured about 1e-6."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
OLDER = ("vocab.json", "vocab.txt", "tokenizer.model")
"""Where a tokenizer has its vocabulary that has no tokenizer.json; the backbone stage writes one, a publisher may not."""
PROBE_TOKENS = 256
"""Tokens whose logits are compared."""


class Differences(NamedTuple):
    """The largest difference of a merged model's logits from those of base and adapter, relative to the largest logit."""

    folded: float
    """Of the sum W + BA in float32."""
    written: float
    """Of the weights as they are written, in the base's number format."""


def merge(base: Path | str, adapter_folder: Path | str, *, out: Path | str) -> Differences:
    """Write the merged model to the new folder `out`; return how far its logits are off.

    Raises:
        ValueError: the logits differ by more than the tolerance, or are not finite, or no config is beside the adapter, or `out`
            is there already; then nothing is written.
    """
    base, adapter_folder, out = Path(base), Path(adapter_folder), Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already: the merged model goes into a new folder")
    if not (adapter_folder / "config.json").is_file():
        raise ValueError(
            f"{adapter_folder} has no config.json, which says how far it reaches: `save` of longlora.model.adapter writes it "
            "beside the adapter, peft does not"
        )
    config = AutoConfig.from_pretrained(adapter_folder, local_files_only=True)
    dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype or torch.float32
    if not (adapter_folder / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(adapter_folder, local_files_only=True, dtype=torch.float32)
        before_BLV, folded = logits(model, PROBE_TOKENS), 0.0
    else:
        model = AutoModelForCausalLM.from_pretrained(base, config=config, local_files_only=True, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, adapter_folder).eval()
        before_BLV = logits(adapted, PROBE_TOKENS)
        model = adapted.merge_and_unload()
        assert isinstance(model, PreTrainedModel)
        model.tie_weights()
        broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(
                f"merged weights hold NaN or infinity in {len(broken)} tensors, first in {broken[0]}: not written"
            )
        folded = difference(logits(model, PROBE_TOKENS), before_BLV)
        if not folded <= TOLERANCE:  # also when it is NaN
            raise ValueError(
                f"merged logits differ by {folded:.2g} of the largest, at most {TOLERANCE:g} may be: not written"
            )
    written = folded
    if dtype != torch.float32:
        round_weights(model, dtype=dtype)
        written = difference(logits(model, PROBE_TOKENS), before_BLV)
    write(model.to(dtype=dtype), base=base, out=out)
    return Differences(folded, written)


def round_weights(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """To the numbers of `dtype`, what is written: not the rotary frequencies, which every reader computes in float32."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def difference(found_BLV: torch.Tensor, wanted_BLV: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((found_BLV - wanted_BLV).abs().max() / wanted_BLV.abs().max()).item()


@torch.inference_mode()
def logits(model: torch.nn.Module, length: int) -> torch.Tensor:
    """Logits on fixed pseudo-random tokens, float32."""
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    return model(input_ids=tokens_BL).logits.float()


def write(model: PreTrainedModel, *, base: Path, out: Path) -> None:
    """Weights, config and the base's tokenizer, if it has one, with the new length, and the digests of all; whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    length = model.config.max_position_embeddings
    answers = model.generation_config
    if answers and (answers.max_length or length) < length:
        answers.max_length = length  # Llama 2 says 4096, beyond which transformers refuses a text
    if answers and (due := due_ends(base)):
        answers.eos_token_id = due if len(due) > 1 else due[0]
    model.save_pretrained(partial)
    bring_tokenizer(base, out=partial)
    lengthen_tokenizer(partial, length=length)
    seal(partial)
    partial.rename(out)


def bring_tokenizer(base: Path, *, out: Path) -> None:
    """The base's own files; what lies in files of other names (vocab.json, merges.txt) is saved as a tokenizer.json."""
    if not (base / "tokenizer.json").exists() and any((base / name).exists() for name in OLDER):
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(out)
        return
    for name in TOKENIZER:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)


def lengthen_tokenizer(folder: Path, *, length: int) -> None:
    """`model_max_length`, at which transformers cuts texts, and no cut by the rules themselves, which other clients obey."""
    file, rules = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if file.exists():
        write_json({**json.loads(file.read_text()), "model_max_length": length}, file)
    if rules.exists() and (raw := json.loads(rules.read_text("utf-8"))).get("truncation"):
        rules.write_text(json.dumps(raw | {"truncation": None}, ensure_ascii=False), "utf-8")
