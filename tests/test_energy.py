"""The meter adds up what the counters of a machine say, also when they start again at zero, and says so where there are none."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from longlora.training import energy
from longlora.training.energy import Meter, gpus, packages
from longlora.training.history import write_cost


def zone(powercap: Path, name: str, *, microjoules: int, span: int = 10_000_000, kind: str = "package-0") -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    one, two = (zone(tmp_path, f"intel-rapl:{n}", microjoules=5_000_000) for n in (0, 1))
    part = zone(tmp_path, "intel-rapl:0:0", microjoules=0)
    machine = zone(tmp_path, "intel-rapl:2", microjoules=0, kind="psys")
    meter = Meter(powercap=tmp_path)
    for file, value in ((one, 7_600_000), (two, 6_000_000), (part, 9_000_000), (machine, 9_500_000)):
        file.write_text(str(value))
    seconds, used = meter.stop()
    assert used == {"cpu": pytest.approx(3.6 / 3600)} and 0 <= seconds < 60


def test_a_counter_that_starts_again_goes_on(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", microjoules=9_000_000)
    (counter,) = packages(tmp_path)
    for value in (500_000, 4_000_000, 3_000_000):
        file.write_text(str(value))
        counter.add()
    assert counter.total == pytest.approx(1.5 + 3.5 + 9.0)


def put(file: Path, microjoules: str) -> None:
    """At once: who looks meanwhile must not find half of it."""
    (file.parent / "new").write_text(microjoules)
    (file.parent / "new").replace(file)


def test_it_looks_again_while_the_work_goes_on(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", microjoules=0)
    meter = Meter(powercap=tmp_path, every=0.01)
    put(file, "9000000")
    deadline = time.monotonic() + 10
    while meter.counters[0].total < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    put(file, "1000000")  # once around: without the look between it would be one joule
    assert meter.stop()[1]["cpu"] == pytest.approx(11 / 3600)


def test_what_this_user_may_not_read_is_not_counted(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", microjoules=0)

    def closed(file):
        raise PermissionError(file)

    monkeypatch.setattr(energy, "microjoules", closed)
    assert list(packages(tmp_path)) == []


def test_gpus_are_those_that_torch_sees_by_their_ids(monkeypatch):
    """NVML's calls by their documented names, with a card that is not there in their place."""
    used = {"GPU-aa": 1_000.0, "GPU-bb": 500.0}  # millijoules
    nvml = ModuleType("pynvml")
    nvml.NVMLError = RuntimeError  # type: ignore[attr-defined]
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByUUID = lambda name: name  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetTotalEnergyConsumption = used.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert list(gpus()) == []  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cards = [SimpleNamespace(uuid="aa"), SimpleNamespace(uuid="bb")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    meter = Meter(powercap=Path("/nowhere"))
    used |= {"GPU-aa": 5_000.0, "GPU-bb": 1_500.0}
    assert meter.stop()[1] == {"gpu": pytest.approx(5.0 / 3600)}


def test_the_names_of_nvml_are_its_own():
    nvml = pytest.importorskip("pynvml")
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption", "NVMLError"):
        assert hasattr(nvml, name)


def test_the_cost_file_tells_the_energy_or_that_it_is_not_counted(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", microjoules=0)
    for powercap, name in ((tmp_path, "counted"), (tmp_path / "none", "cost")):
        meter = Meter(powercap=powercap)
        file.write_text("7200000")
        write_cost(tmp_path / f"{name}.json", model=nn.Linear(3, 5), tokens=4, meter=meter)
    assert json.loads((tmp_path / "counted.json").read_text())["counted"]["cpu_energy_wh"] == 0.002
    cost = json.loads((tmp_path / "cost.json").read_text())["cost"]
    assert cost["energy"] == "not measurable here" and "cpu_energy_wh" not in cost
