"""The base model, whatever it comes from, as one plain folder: safetensors, config.json, tokenizer, provenance.json.

Sources: a hub id at a revision, a local folder, or a GGUF file inside a Python package (SmolLM2-135M is published so).
Weights are never read from pickles and no code of a model's repository is run.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from longlora.model.seal import WEIGHTS, sha256
from longlora.section import Section, first_line, write_json

T = TypeVar("T")
PLAIN_FILES = ("*.json", "tokenizer.model", "*.txt", "*.jinja")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
"""Files of which a folder with a tokenizer has at least one."""


class Backbone(Section):
    source: Literal["folder", "hub", "gguf"]
    """folder: a local path; hub: a model hub id; gguf: a Python package, `name==version`, that carries one GGUF file."""
    name: str
    """The path, hub id or package."""
    revision: str | None
    """hub: a commit. folder and gguf: the sha256 of the one file of weights; null takes what is there, unchecked."""
    license: str
    """Of the weights; carried into the model card and to the gate."""


def fetch(backbone: Backbone, *, out: Path) -> None:
    """Write the base model to the new folder `out`.

    Raises:
        ValueError: the source is not there, has no safetensors, its digest is not the pinned one, or the pin is for one of several
            files; it does not open, lacks a weight, ties two that differ, says no context or wrong kinds of ends, is no decoder of
            text, or its tokenizer is slow or has tokens that the model does not know.
        ConnectionError: the hub cannot be reached now.
    """
    bring = {"folder": from_folder, "hub": from_hub, "gguf": from_gguf}[backbone.source]
    bring(backbone, out=out)
    config = opened(lambda: AutoConfig.from_pretrained(out, local_files_only=True), what="config.json")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone.name: a {config.model_type} model is none that transformers opens as a decoder of text "
            "(AutoModelForCausalLM): take its text model alone"
        )
    if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"backbone.name: the text model of a {config.model_type} model, which is all that is trained and saved, is none that "
            "AutoModelForCausalLM opens again: take another base"
        )
    whole, config = config, config.get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise ValueError(
            f"backbone.name: a {config.model_type} model's config has no max_position_embeddings, the context that is extended"
        )
    must_be_whole(out)
    if (out / "generation_config.json").exists():  # which transformers passes over, until the merge
        answers = opened(
            lambda: GenerationConfig.from_pretrained(out, local_files_only=True), what="generation_config.json"
        )
        must_say_ends(answers)
    tokenizer = opened(lambda: AutoTokenizer.from_pretrained(out, local_files_only=True), what="tokenizer")
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ValueError(
            f"backbone.name: its tokenizer, a {type(tokenizer).__name__}, has no form that the tokenizers library runs "
            "(tokenizer.json), by which texts are tokenised here"
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= config.vocab_size:
        raise ValueError(
            f"backbone.name: its tokenizer has a token {largest} ('{token}'), and the model knows {config.vocab_size} tokens, 0 to "
            f"{config.vocab_size - 1}: take the token out of the tokenizer, or give the model more embeddings"
        )
    if (
        tokenizer.model_max_length != config.max_position_embeddings
        or not (out / "tokenizer.json").exists()
        or whole is not config
    ):
        # Tokenizers converted from GGUF say 1e30 here; older ones have their vocabulary in files of other names; beside a text
        # model alone, as it will be saved, transformers may take the files for another class (Qwen3.5), unless they name it.
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(out)
    provenance = {**backbone.model_dump(), "sha256": {f.name: sha256(f) for f in sorted(out.glob(WEIGHTS))}}
    write_json(provenance, out / "provenance.json")


def opened(reader: Callable[[], T], *, what: str) -> T:
    """What transformers' `reader` makes of the folder."""
    try:
        return reader()
    except Exception as error:  # it looks at little of what it reads, and the tokenizers library raises no other
        raise ValueError(f"backbone.name: its {what} does not open: {first_line(error)}") from error


def must_say_ends(answers: GenerationConfig) -> None:
    """Raises ValueError: of what the merge reads in generation_config.json, something is of another kind; transformers looks at
    neither."""
    ends, longest = answers.eos_token_id, answers.max_length
    listed = ends if isinstance(ends, list) else [ends]
    wrong = {
        "eos_token_id": ends is not None and any(type(each) is not int for each in listed),
        "max_length": longest is not None and type(longest) is not int,
    }
    rules = {"eos_token_id": "a token's number, a list of such, or null", "max_length": "a whole number, or null"}
    for key in (key for key, is_wrong in wrong.items() if is_wrong):
        raise ValueError(
            f"backbone.name: its generation_config.json says {key} = {getattr(answers, key)!r}: must be {rules[key]}"
        )


def must_be_whole(folder: Path) -> None:
    """Loads no weight, but where the files hold both of two that are to be one: then all, to compare these.

    Raises:
        ValueError: a weight is not there, in whose place transformers would put one by chance; or the config ties two weights that
            differ, which transformers leaves apart, and an adapter with trained embeddings would make one of.
    """
    where = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = opened(lambda: load(folder, **where), what="model")
    if lacking := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ValueError(
            f"backbone.name: it lacks weights that its config.json asks for, or has them in other sizes: {len(lacking)}, "
            f"{lacking[0]} first"
        )
    if apart(model) and (differ := apart(opened(lambda: load(folder), what="model"))):
        raise ValueError(
            f"backbone.name: its config.json ties {' to '.join(differ[0])}, and its files hold two different matrices: say "
            '"tie_word_embeddings": false there (of a model of the hub, in a folder of your own)'
        )


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **how)


def apart(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Names of the weights that the config ties, and that are two."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    return [pair for pair in pairs if model.get_parameter(pair[0]) is not model.get_parameter(pair[1])]


def from_folder(backbone: Backbone, *, out: Path) -> None:
    folder = Path(os.path.expanduser(backbone.name))
    if not folder.is_dir():
        raise ValueError(
            f"backbone.name: no folder {folder} below {Path.cwd()}; a run sees only what git tracks, "
            "so give an absolute path to a folder that git does not track"
        )
    weights = sorted(folder.glob(WEIGHTS))
    if backbone.revision is not None and len(weights) > 1:
        raise ValueError(
            f"backbone.revision is the sha256 of one file, and {folder} holds {len(weights)} of weights, of which it would check "
            "the first alone: null"
        )
    if backbone.revision is not None and weights:
        expect_digest(weights[0], backbone.revision)
    copy_model(folder, out=out)


def from_hub(backbone: Backbone, *, out: Path) -> None:
    patterns = [WEIGHTS, *PLAIN_FILES]
    try:
        folder = snapshot_download(backbone.name, revision=backbone.revision, allow_patterns=patterns)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:  # gated ones among the first
        raise ValueError(f"backbone.name: '{backbone.name}' on the hub: {str(error).strip().splitlines()[0]}") from None
    except LocalEntryNotFoundError as error:
        kind = ValueError if constants.HF_HUB_OFFLINE else ConnectionError  # what is switched off stays so
        raise kind(f"backbone.name: '{backbone.name}' on the hub: {first_line(error)}") from None
    copy_model(Path(folder), out=out)


def copy_model(folder: Path, *, out: Path) -> None:
    """Copy the model files of `folder`, and nothing else that lies there.

    Raises:
        ValueError: it holds no config.json, no safetensors, an adapter, or no tokenizer; then nothing is copied.
    """
    if not any(folder.glob(WEIGHTS)):
        raise ValueError(
            f"{folder} holds no {WEIGHTS}; weights in other formats (.bin, .pth) are pickles and are not read"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, which says what model the weights are of")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which transformers would put on the weights unasked: merge the two, "
            "or take it away"
        )
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise ValueError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZERS)}): save the model's own beside it (tokenizer.save_pretrained)"
        )
    out.mkdir(parents=True)
    for pattern in (WEIGHTS, *PLAIN_FILES):
        for file in folder.glob(pattern):
            shutil.copyfile(file, out / file.name)


def from_gguf(backbone: Backbone, *, out: Path) -> None:
    """Dequantise a GGUF file into float32 safetensors."""
    with tempfile.TemporaryDirectory() as scratch:
        file = find_gguf(backbone.name, scratch=Path(scratch))
        if backbone.revision is not None:
            expect_digest(file, backbone.revision)
        folder = str(file.parent)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, so its tensors move into one built from the same config.
    config = type(quantised.config).from_dict(
        {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def find_gguf(requirement: str, *, scratch: Path) -> Path:
    """The one GGUF file of an installed package, else of its wheel, fetched without its dependencies into `scratch`.

    Raises:
        ValueError: the package cannot be had, or does not hold one GGUF file.
    """
    package = requirement.partition("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        found = [f for place in spec.submodule_search_locations for f in Path(place).rglob("*.gguf")]
    else:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
        if subprocess.run([*download, "--", requirement], check=False).returncode:
            raise ValueError(f"backbone.name: package '{requirement}' is not installed and could not be downloaded")
        wheel = next(scratch.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.endswith(".gguf")]
            found = [scratch / Path(m).name for m in members]
            for member, file in zip(members, found, strict=True):
                with archive.open(member) as source, file.open("wb") as target:
                    shutil.copyfileobj(source, target)
    if len(found) != 1:
        raise ValueError(f"package '{requirement}' must hold one GGUF file, it holds {len(found)}")
    return found[0]


def expect_digest(file: Path, digest: str) -> None:
    actual = sha256(file)
    if actual != digest:
        raise ValueError(f"{file.name} has sha256 {actual}, backbone.revision pins {digest}")
