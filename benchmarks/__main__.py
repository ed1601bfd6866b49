"""All benchmarks in one go: ratios measured side by side, as one JSON and one picture.

python -m benchmarks              # what the JSON does not hold yet, so that an interrupted one goes on
python -m benchmarks memory loss  # these anew
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, command, loss, memory, picture, preparation, step
from benchmarks.fresh import ROOT
from benchmarks.turns import SMALL, Sizes
from longlora.attention.cpu import half_is_emulated

PARTS = {
    "attention": attention,
    "step": step,
    "memory": memory,
    "loss": loss,
    "preparation": preparation,
    "command": command,
}


def machine() -> dict[str, Any]:
    """What the numbers depend on. No names of hosts or people."""
    return {
        "processor": torch.cpu.get_capabilities()["cpu_name"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16": "emulated" if half_is_emulated() else "by instructions",
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "dvc")},
    }


def write(results: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(results, indent=2) + "\n")
    scratch.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"measured anew: {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="the smallest sizes: that it works, not what it says")
    parser.add_argument(
        "--long", action="store_true", help="bfloat16 to 16384 where it is emulated, too: half an hour more"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench.json")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    sizes = Sizes() if half_is_emulated() and not chosen.long else Sizes(half_lengths=Sizes.lengths)
    sizes, here = SMALL if chosen.small else sizes, machine()
    results = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    if results.get("machine") not in (None, here):
        print(
            "another machine, or other versions, than those of the results that are there: everything anew", flush=True
        )
        results = {}
    results = {"machine": here, "parts": {n: p for n, p in results.get("parts", {}).items() if n not in chosen.parts}}
    for part in chosen.parts or PARTS:
        for name, measure in PARTS[part].cases(sizes).items():
            measured = results["parts"].setdefault(part, {})
            if name not in measured:
                started = time.monotonic()
                measured[name] = measure()
                print(f"{part}, {name}: {time.monotonic() - started:.0f} s", flush=True)
                write(results, chosen.out)
    picture.draw(results, chosen.out.with_suffix(".png"))
    print(f"written to {chosen.out} and {chosen.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
