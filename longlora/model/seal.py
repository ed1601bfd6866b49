"""The digests of a model's weight files, beside them: what was written is what is judged, and what users download. The index,
where there are several, is one of them: it says which holds what.

A damaged file that still opens, with weights that are finite and wrong, shows in no header. `sha256sum --check SHA256SUMS`
reads the same file.
"""

import hashlib
from pathlib import Path

SEAL = "SHA256SUMS"
WEIGHTS = "*.safetensors"
INDEX = "*.safetensors.index.json"


def seal(folder: Path) -> None:
    """Write the digests of the weight files of `folder` into it."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in files(folder)]
    (folder / SEAL).write_text("".join(lines))


def broken(folder: Path) -> list[str]:
    """What does not agree with the seal, one sentence each: a file that is gone, new or different, or no seal at all."""
    if not (folder / SEAL).is_file():
        return [f"there is no {SEAL}"]
    lines = (folder / SEAL).read_text(errors="replace").splitlines()
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = {file.name: file for file in files(folder)}
    return [
        *(f"{name} is missing" for name in stated if name not in there),
        *(f"{name} is not in {SEAL}" for name in there if name not in stated),
        *(f"{name} is not the file that was written" for name in stated if name in there and sha256(there[name]) != stated[name]),
    ]  # fmt: skip


def files(folder: Path) -> list[Path]:
    """The files of `folder` that have a digest."""
    return sorted([*folder.glob(WEIGHTS), *folder.glob(INDEX)])


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
