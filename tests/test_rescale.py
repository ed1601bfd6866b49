"""The untrained baselines: scaled where the context is beyond the base's window, the base itself where it is not."""

import pytest
from specimens import folder
from transformers import AutoConfig

from longlora.model.position import Position
from longlora.stages.rescale import stage


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_beyond_the_window_the_base_is_scaled(method, tmp_path):
    base = folder(tmp_path / "base", window=64)
    stage(base, tmp_path / method, Position(method="yarn", context=256))
    found = AutoConfig.from_pretrained(tmp_path / method)
    assert (found.rope_parameters["rope_type"], found.rope_parameters["factor"]) == (method, 4.0)
    assert (tmp_path / method / "model.safetensors").samefile(base / "model.safetensors")


@pytest.mark.parametrize("method", ["linear", "yarn"])
@pytest.mark.parametrize("context", [32, 64])
def test_inside_the_window_the_baseline_is_the_base(method, context, tmp_path):
    base = folder(tmp_path / "base", window=64)
    stage(base, tmp_path / method, Position(method="none", context=context))
    assert AutoConfig.from_pretrained(tmp_path / method).to_dict() == AutoConfig.from_pretrained(base).to_dict() | {
        "_name_or_path": str(tmp_path / method)
    }
