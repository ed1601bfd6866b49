"""What a piece of work took: seconds, and the energy of the machine's processors meanwhile, where they count it.

CPUs: Intel's RAPL counters of whole packages, as Linux shows them (AMD's too). GPUs: NVIDIA's counters through NVML, for the
GPUs that this process sees. It is the energy of this machine, whoever used it: other programs count in, power supply, fans and
(mostly) memory do not.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
EVERY = 20.0
"""Seconds between two looks: a package's counter starts again at zero within minutes on a large machine, and may do so only
once between two looks."""
JOULES_PER_WH = 3600.0


@dataclass
class Counter:
    """A counter of energy that only grows, but for starting again at `span`."""

    kind: str
    """cpu or gpu"""
    look: Callable[[], float]
    """Its present value in joules."""
    span: float
    """Joules at which it starts again; infinite where it does not."""
    last: float = field(init=False)
    total: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.last = self.look()

    def add(self) -> None:
        """Count what was used since the last look."""
        now = self.look()
        self.total += now - self.last if now >= self.last else now - self.last + self.span
        self.last = now


class Meter:
    """Seconds and energy since it was made."""

    def __init__(self, *, powercap: Path = POWERCAP, every: float = EVERY) -> None:
        self.started = time.monotonic()
        self.counters = [*packages(powercap), *gpus()]
        self.stopped = threading.Event()
        self.every = every
        self.watch = threading.Thread(target=self._look_again, daemon=True)
        if self.counters:
            self.watch.start()

    def _look_again(self) -> None:
        while not self.stopped.wait(self.every):
            for counter in self.counters:
                counter.add()

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds, and Wh by kind of processor; a kind that is not counted here is not there."""
        self.stopped.set()
        if self.counters:
            self.watch.join()
        for counter in self.counters:
            counter.add()
        kinds = dict.fromkeys(counter.kind for counter in self.counters)
        used = {kind: sum(c.total for c in self.counters if c.kind == kind) / JOULES_PER_WH for kind in kinds}
        return time.monotonic() - self.started, used


def packages(powercap: Path) -> Iterator[Counter]:
    """A counter per CPU package that Linux shows, and lets this user read (often only root)."""
    for zone in sorted(powercap.glob("intel-rapl:*")):
        with suppress(OSError):
            # intel-rapl:0:0 is a part of intel-rapl:0, and psys the whole machine, packages and all
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                span = microjoules(zone / "max_energy_range_uj")
                yield Counter("cpu", lambda file=zone / "energy_uj": microjoules(file), span)


def microjoules(file: Path) -> float:
    """In joules."""
    return int(file.read_text()) / 1e6


def gpus() -> Iterator[Counter]:
    """A counter per GPU that this process sees, where the package nvidia-ml-py is installed and the GPU counts."""
    if not torch.cuda.is_available():
        return
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        return
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for number in range(torch.cuda.device_count()):
            device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(number).uuid}")
            yield Counter("gpu", lambda d=device: pynvml.nvmlDeviceGetTotalEnergyConsumption(d) / 1e3, float("inf"))
