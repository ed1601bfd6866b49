"""This machine: its GPUs by nvidia-smi, its memory, and how many processes a launcher starts on it. One GB is 2^30 bytes."""

import argparse
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import psutil

GB = 2**30
PATIENCE = 30.0  # seconds for nvidia-smi, which takes one


def gpu_names() -> str:
    """The GPUs' names by nvidia-smi; 'none' without it."""
    return ", ".join(map(", ".join, nvidia_smi("name"))) or "none"


def launched(launcher: str, *, gpus: int) -> int:
    """Processes that the launcher starts here; 1 without one.

    Raises:
        LookupError: it may start them on other machines.
        ValueError: a quotation in it has no end.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise ValueError(f"LONGLORA_LAUNCHER={launcher}: {error}") from None
    if not words or (Path(words[0]).name.startswith("python") and len(words) == 1):
        return 1
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--nnodes", default="1")
    options.add_argument("--nproc-per-node", "--nproc_per_node", default="1")
    known, _ = options.parse_known_args(words)
    if Path(words[0]).name != "torchrun" or known.nnodes not in ("1", "1:1"):
        raise LookupError(f"`{launcher}` may compute on other machines (`longlora plan` says what it would take there)")
    if known.nproc_per_node.isdecimal():
        return max(1, int(known.nproc_per_node))
    return max(1, gpus)


def gpu_memory_gb() -> list[float]:
    """GB of each GPU that a process sees; empty without one.

    Raises:
        LookupError: as `visible_gpus`.
    """
    return [memory for _, memory in visible_gpus()]


def visible_gpus() -> list[tuple[str, float]]:
    """UUID and GB of each GPU that a process sees, by nvidia-smi and CUDA_VISIBLE_DEVICES; empty without one.

    Raises:
        LookupError: CUDA_VISIBLE_DEVICES names what nvidia-smi does not list, such as a part of a GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    listed = nvidia_smi("index,uuid,memory.total")
    cards = [(index, uuid, float(mib) / 1024) for index, uuid, mib in listed if mib.isdecimal()]
    if visible is None:
        return [(uuid, memory) for _, uuid, memory in cards]
    seen = []
    for word in (each.strip() for each in visible.split(",")):
        named = [(uuid, memory) for index, uuid, memory in cards if word == index or (word and uuid.startswith(word))]
        if len(named) != 1:
            raise LookupError(f"CUDA_VISIBLE_DEVICES={visible}: nvidia-smi lists no one GPU '{word}'")
        seen += named
    return seen


def host_memory_gb() -> float:
    """GB of this machine, or of the container around, if that allows less."""
    allowed = Path("/sys/fs/cgroup/memory.max")
    limit = allowed.read_text().strip() if allowed.exists() else "max"
    memory = psutil.virtual_memory().total
    return min(memory, int(limit) if limit.isdecimal() else memory) / GB


def nvidia_smi(columns: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU, a cell per column; empty without it, or where it finds no driver or no GPU.

    Raises:
        ValueError: it says nothing.
    """
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"nvidia-smi did not answer in {PATIENCE:g} s: see whether the GPUs' driver hangs") from None
    if done.returncode or done.stdout.startswith("No devices"):  # which it says on its standard output, too
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
