"""A mistake in params.yaml gets one clear line; a defect of ours keeps its traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import model_validator

from longlora.evaluation.passkey import Passkey
from longlora.model.adapter import Adapter
from longlora.section import Section, call, read_params, section_of
from longlora.training.fit import Fit

ROOT = Path(__file__).parent.parent


class Wheel(Section):
    spokes: int
    rim: str

    @model_validator(mode="after")
    def enough(self) -> "Wheel":
        if self.spokes < 3:
            raise ValueError(f"a wheel with {self.spokes} spokes; at least 3")
        return self


class Knobs(Section):
    rate: float
    names: list[str]
    wheels: list[Wheel] | None


GOOD = {"rate": 2e-5, "names": ["a"], "wheels": None}


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    (tmp_path / "params.yaml").write_text("knobs: {rate: 2e-5, names: [a], wheels: null}\n")
    assert section_of(Knobs, read_params(tmp_path / "params.yaml"), "knobs").rate == 2e-5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({**GOOD, "rates": 1}, ["unknown key 'knobs.rates'", "did you mean 'rate'?"]),
        ({"rate": 1.0, "wheels": None}, ["key 'knobs.names' is missing"]),
        ({**GOOD, "rate": "fast"}, ["knobs.rate = 'fast'", "valid number"]),
        ({**GOOD, "rate": float("nan")}, ["knobs.rate", "finite"]),
        ({**GOOD, "names": [1]}, ["knobs.names.0 = 1: Input should be a valid string; put it in quotes"]),
        ({"rate": "x", "nmes": []}, ["knobs.rate", "knobs.names", "knobs.nmes"]),
        ({**GOOD, "wheels": [{"spoke": 3, "rim": "a"}]}, ["'knobs.wheels.0.spoke'", "did you mean 'spokes'?"]),
    ],
)
def test_every_mistake_is_named_in_one_line(section, words):
    with pytest.raises(ValueError) as raised:
        section_of(Knobs, {"knobs": section}, "knobs")
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_a_rule_between_keys_is_said_without_the_whole_section():
    with pytest.raises(ValueError) as raised:
        section_of(Knobs, {"knobs": {**GOOD, "wheels": [{"spokes": 2, "rim": "steel"}]}}, "knobs")
    assert str(raised.value) == "params: knobs.wheels.0: a wheel with 2 spokes; at least 3"


def test_a_missing_section_names_the_nearest():
    with pytest.raises(ValueError, match="section 'knobs' is missing; did you mean 'knob'"):
        section_of(Knobs, {"knob": {}}, "knobs")


def test_a_stage_gets_paths_in_order_and_sections_by_name():
    seen = {}

    def stage(first: Path, knobs: Knobs, second: Path) -> None:
        seen.update(first=first, second=second, rate=knobs.rate)

    call(stage, ["a", "b"], {"knobs": GOOD})
    assert seen == {"first": Path("a"), "second": Path("b"), "rate": 2e-5}
    with pytest.raises(ValueError, match=r"takes 2 paths \(first, second\), got 1"):
        call(stage, ["a"], {"knobs": GOOD})


def test_a_users_mistake_ends_in_one_line_and_status_two(tmp_path):
    (tmp_path / "params.yaml").write_text("position: {method: yarm, context: 1}\n")
    done = subprocess.run(
        [sys.executable, "-m", "longlora.stages.rescale", "base", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: params: position.method = 'yarm'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "name", "change", "said"),
    [
        (Fit, "fit", {"betas": [0.9, 1.0]}, r"fit.betas.1 = 1.0: Input should be less than 1"),
        (Fit, "fit", {"seed": -1}, r"fit.seed = -1: Input should be greater than or equal to 0"),
        (Passkey, "passkey", {"seed": 2**32}, r"passkey.seed = 4294967296: Input should be less than"),
        (
            Adapter,
            "adapter",
            {"target_modules": []},
            r"adapter.target_modules = \[\]: List should have at least 1 item",
        ),
    ],
)
def test_what_would_fail_later_on_is_out_of_range(kind, name, change, said):
    params = read_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match=said):
        section_of(kind, {name: params[name] | change}, name)
