"""What docs/library.md shows is run as it stands there, as one script: it needs the packages it names, and leaves what it says."""

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from longlora.model.merge import merge
from longlora.training.checkpoint import code_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "library.md").read_text()
THEIRS = {"huggingface_hub", "numpy", "safetensors"}
"""What transformers and peft bring along."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "tiny").symlink_to(ROOT / "tiny")
    (folder / "script.py").write_text("".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    return folder


@pytest.fixture(scope="module")
def made(place) -> dict[str, Any]:
    """The script's variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return runpy.run_path("script.py")


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.cpu().eval()(input_ids=torch.arange(200)[None], use_cache=False).logits


def test_the_script_needs_the_packages_that_the_page_names(place):
    named = re.findall(r"`pip install -c constraints.txt ([^`]*)`", PAGE)[0].split()
    wanted = set()
    for file in code_of(place / "script.py"):
        for node in ast.parse(file.read_text()).body:  # at once; what is imported later is for those who have it
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            wanted |= {name.partition(".")[0] for name in names}
    assert wanted - sys.stdlib_module_names - {"longlora"} - THEIRS == set(named)


def test_it_evaluates_in_full_attention_and_ends_its_training_so(made):
    assert [row["step"] for row in made["trainer"].state.log_history if "eval_loss" in row] == [2, 4]
    assert made["at_end"].switched and made["scores"]["perplexity"]["mine"]["1024"]["value"] > 1


def test_its_adapter_opens_in_stock_peft_and_merges(made, place):
    config = AutoConfig.from_pretrained(place / "adapter")
    assert config.max_position_embeddings == 1024
    base = AutoModelForCausalLM.from_pretrained(place / "tiny" / "model", config=config)
    mine = logits(made["model"])
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, place / "adapter")), mine)
    merge(place / "tiny" / "model", place / "adapter", out=place / "extended")
    merged = AutoModelForCausalLM.from_pretrained(place / "extended")
    torch.testing.assert_close(logits(merged), mine, rtol=1e-3, atol=1e-3)


def test_what_the_page_says_of_its_packed_row_is_so(made):
    row, count = made["row"], 3
    assert row["input_ids"].shape == (1, sum(len(d["input_ids"]) for d in made["documents"][:count]))
    assert (row["position_ids"] == 0).sum() == count and "attention_mask" not in row
