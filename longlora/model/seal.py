"""The digests of a model's files, beside them: what was written is what is judged, and what users download.

A damaged file that still opens, with weights that are finite and wrong, shows in no header. And a file more, which transformers
passes over, is what another client reads first: weights of another format or name, a `tokenizer.model`, code that a config names.
`sha256sum --check SHA256SUMS` reads the same file.
"""

import hashlib
from pathlib import Path

SEAL = "SHA256SUMS"
WEIGHTS = "*.safetensors"


def seal(folder: Path) -> None:
    """Write the digests of the files of `folder` into it."""
    lines = [f"{sha256(file)}  {name}\n" for name, file in files(folder).items()]
    (folder / SEAL).write_text("".join(lines))


def broken(folder: Path) -> list[str]:
    """What does not agree with the seal, one sentence each: a file that is gone, new or different, or no seal at all."""
    if not (folder / SEAL).is_file():
        return [f"there is no {SEAL}"]
    lines = (folder / SEAL).read_text(errors="replace").splitlines()
    stated = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = files(folder)
    return [
        *(f"{name} is missing" for name in stated if name not in there),
        *(f"{name} is not in {SEAL}" for name in there if name not in stated),
        *(f"{name} is not the file that was written" for name in stated if name in there and sha256(there[name]) != stated[name]),
    ]  # fmt: skip


def files(folder: Path) -> dict[str, Path]:
    """The files that have a digest, all but the seal's own, by their paths below `folder`."""
    found = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file for name, file in found.items() if name != SEAL}


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
