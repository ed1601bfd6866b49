"""DVC's configuration: where the data of a checkout and of its worktrees lies."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.config import Config
from dvc_objects.fs import get_fs_cls

from tasks.workspace import Project, git


def config_of(checkout: Path) -> Any:
    """DVC's own, as it holds for `checkout`. What it reads and edits are dicts of dicts, which its types do not say."""
    return Config(str(checkout / ".dvc"))


def remote_of(checkout: Path) -> str:
    """The address of the default DVC remote, or ''.

    Raises:
        ValueError: the name of the default is none of a remote.
    """
    config = config_of(checkout)
    name = config["core"].get("remote")
    if name and name not in config["remote"]:
        raise ValueError(f"the DVC remote: the default is '{name}', and there is none of this name: `dvc remote list`")
    return str(config["remote"][name]["url"]) if name else ""


def must_find_remote_folder(where: Project) -> None:
    """Check that a DVC remote which is a folder outside of the project is there: DVC would make a new one if its share is lost.

    Raises:
        ValueError: it is not, or a file is in its way.
    """
    address = remote_of(where.tree)
    place = Path(address)
    if not address or not place.is_absolute():
        return
    above = next(each for each in (place, *place.parents) if each.exists())
    if not above.is_dir():
        raise ValueError(f"the DVC remote {address}: {above} is a file, and must be a folder")
    ours = any(place.is_relative_to(folder) for folder in (where.root, where.tree))
    if not ours and above != place:
        raise ValueError(f"the DVC remote {address} is not there: bring it back, or make it if it is new")


def cache_of(checkout: Path, root: Path) -> Path:
    """The folder of the cache that `checkout` and the runs of its repository `root` share."""
    return Path(str(config_of(checkout)["cache"].get("dir") or root / ".dvc" / "cache"))


def link(folder: Path, *, to: Path, cache_home: Path, remote: str = "") -> None:
    """Give worktree `folder` the cache, remotes and credentials of checkout `to`, in its own .dvc/config.local.

    `remote`: another address for the default remote.

    A worktree has no config.local of the checkout's, and what is relative in .dvc/config would point beside it.

    Raises:
        ValueError: a package is missing that DVC needs for a remote of this kind, or an address is not ASCII.
    """
    theirs = config_of(to)
    try:
        get_fs_cls({"url": remote or remote_of(to)})
    except ImportError as error:
        raise ValueError(f"the DVC remote: {error}") from None
    local = folder / ".dvc" / "config.local"
    local.unlink(missing_ok=True)  # a kill may have cut it off, and it has what the checkout's may have no more
    local.touch(mode=0o600)
    with ascii_alone(), config_of(folder).edit("local") as ours:
        for section, settings in theirs.read("local").items():
            ours[section] = settings
        ours["core"]["check_update"] = False  # no calls home
        # such a lock outlives a kill; whoever works here has one of ours, by flock
        ours["core"]["hardlink_lock"] = False
        # a submodule's, which DVC takes for ours, too
        if git("config", "--default", "", "--get", "core.worktree", cwd=folder):
            ours["core"]["no_scm"] = True
        ours["cache"]["dir"] = seen_from_here(str(theirs["cache"].get("dir") or cache_home / ".dvc" / "cache"))
        for name, known in theirs["remote"].items():
            ours["remote"].setdefault(name, {})["url"] = seen_from_here(str(known["url"]))
        if remote:
            name = theirs["core"].get("remote") or "recorded"
            ours["core"]["remote"] = name
            ours["remote"].setdefault(name, {})["url"] = seen_from_here(remote)


@contextmanager
def ascii_alone() -> Generator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        line = next(line for line in str(error.object).splitlines() if not line.isascii())
        raise ValueError(
            f"DVC's settings take ASCII alone, not '{line.strip()}': name a link that leads there"
        ) from None


def seen_from_here(address: str) -> str:
    """An absolute path made relative, as DVC then writes it: its file must be ASCII, and folders above a project need not be."""
    return os.path.relpath(address) if os.path.isabs(address) else address
