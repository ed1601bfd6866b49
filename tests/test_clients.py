"""What docs/clients.md shows is run as it stands there: each client opens what a run leaves, and computes the same."""

import json
import re
import runpy
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from specimens import ADAPTER, folder, llama
from test_adapter import nudged
from transformers import AutoModelForCausalLM, PreTrainedModel

from longlora.model.adapter import attach, save
from longlora.model.gguf import write
from longlora.model.position import extend

PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text()


def run(section: str, place: Path) -> dict[str, Any]:
    """The page's Python on this client; what it leaves in its variables."""
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    (place / "script.py").write_text(script)
    return runpy.run_path(str(place / "script.py"))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(2, 120)[None]).logits


def test_transformers_opens_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mine")
    found = run("transformers", tmp_path)
    torch.testing.assert_close(logits(found["model"]), logits(AutoModelForCausalLM.from_pretrained("mine")))
    assert "\nThe state of the Union" in "\n" + capsys.readouterr().out


def test_peft_opens_the_adapter_on_its_base_with_the_adapters_rotary_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = llama()
    base.save_pretrained("models/base")
    longer = type(base)(extend(base.config, method="yarn", context=128)).eval()
    longer.load_state_dict(base.state_dict())
    ours = nudged(attach(longer, ADAPTER))
    save(ours, tmp_path / "models" / "adapter")
    longer.config.save_pretrained("models/adapter")
    theirs = run("peft", tmp_path)["model"].eval()
    torch.testing.assert_close(logits(theirs), logits(ours))


def test_llama_cpp_opens_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(folder(tmp_path / "mine", window=4096), out=tmp_path / "mine.gguf")
    model = run("llama.cpp", tmp_path)["model"]
    with urlopen(model.listening_address + "/props") as told:
        assert json.load(told)["default_generation_settings"]["n_ctx"] == 4096
    assert capsys.readouterr().out


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/\w+\.py)`", PAGE)
    assert len(named) > 8
    assert all((Path(__file__).parent.parent / name).is_file() for name in named)
