"""The hash that DVC gives a file or folder, or gave it."""

from pathlib import Path
from typing import Any

import yaml


def hash_of(path: Path, known: Any = None) -> str:
    """The hash of `path` as DVC gives it, read from its bytes; '' if it is not there. Nothing is stored.

    Args:
        known: a DVC repository's database: what it remembers by a file's time and size is not read again.
    """
    # DVC takes half a second to import
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    if not path.exists():
        return ""
    disk = LocalFileSystem()
    database = known if known is not None else HashFileDB(disk, str(path))
    _, _, found = build(database, str(path), disk, "md5", dry_run=True)
    return str(found.hash_info.value)


def named(file: Path) -> str | None:
    """The hash that a `.dvc` file gives what it is called after; None where there is no such file, or DVC 2 made it, which hashed
    texts otherwise."""
    if not file.is_file():
        return None
    outs = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["outs"]
    return next((out["md5"] for out in outs if out["path"] == file.stem and out.get("hash") == "md5"), None)
