"""What `longlora gc` may delete: folders of old runs, cached data that no kept run needs, models that were fetched to be asked, the
locks of flow runs that are over, and checkpoints, if it is told so: a training that ends deletes its own, so what there is, is of
trainings that may go on.

It keeps the newest runs, every run that a registered version points to, everything that a branch, a tag or a checkout of this
repository names, and whatever a process is reading. It never touches a record's ref in git or the data on the DVC remote, so a run
whose folder was deleted can be brought back. Without a DVC remote the cache is the only copy, and every recorded run is kept.
A cache outside of the project is left alone: other projects may share it.
"""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks import storage
from tasks.config import cache_of, remote_of
from tasks.locks import FLOW, delete, if_free, is_held, unpinned
from tasks.workspace import RUNS, Project, git, record_ref

HASH = re.compile(r"md5: ([0-9a-f]{32}(?:\.dir)?)\b")
YOUNG = 3600.0  # seconds: a younger file may belong to a run that has not recorded it yet


@dataclass(frozen=True)
class Leftover:
    kind: Literal["worktree", "checkpoints", "cache", "model", "locks"]
    paths: tuple[Path, ...]
    size: int
    """Bytes."""
    why: str


def leftovers(where: Project, *, keep: int, versions: set[str], checkpoints: bool = False) -> list[Leftover]:
    """What may go, largest first.

    Args:
        keep: this many of the newest runs stay.
        versions: the commits that versions in the registry point to.
        checkpoints: those of trainings that did not end may go, too.

    Raises:
        ValueError: a negative `keep`, or a version's commit is not in this clone, so that what it needs is not known.
    """
    if keep < 0:
        raise ValueError(f"--keep {keep}: must be 0 or more")
    if away := versions - storage.at_hand(where, versions):
        storage.must_be_here(where, min(away), of="a registered version")
    folders = {path.name: path for path in (where.state / "worktrees").glob("*") if path.is_dir()}
    read = {path.name for path in being_read(where)}
    kept = kept_keys(where, folders, keep, versions) | read
    busy = at_work(where)
    found = [
        Leftover(
            "worktree", (path,), size_of(path), "computed again and differed" if "-" in key else "not of the newest"
        )
        for key, path in folders.items()
        if key not in kept and key not in busy
    ]
    found += [
        Leftover("model", (path,), size_of(path), "brought to be asked, and brought again when it is")
        for path in (where.state / "asked").glob("*")
        if path.name not in read and not young(path)
    ]
    found += of_flows_that_ended(where)
    if not busy:
        found += cut_off(where) if checkpoints else []
        if not shared_cache(where):
            found += unused(where, kept, versions)
    return sorted((each for each in found if each.size or each.kind == "locks"), key=lambda each: -each.size)


def at_work(where: Project) -> set[str]:
    """The runs that a process of this machine works on."""
    return {path.name for path in (where.state / "worktrees").glob("*") if is_held(where, path.name)}


def cut_off(where: Project) -> list[Leftover]:
    """Checkpoints of trainings that did not end, lately."""
    return [
        Leftover("checkpoints", (path,), size_of(path), "of what did not end, and would begin anew")
        for path in (where.state / "checkpoints").glob("*")
        if path.is_dir() and not young(path)
    ]


def of_flows_that_ended(where: Project) -> Iterator[Leftover]:
    """Of the locks of flow runs, one file each, those that no process holds."""
    files = sorted((where.state / "locks").glob(f"{FLOW}*.lock"))
    ended = tuple(path for path in files if not is_held(where, path.stem))
    if ended:
        yield Leftover(
            "locks", ended, sum(path.stat().st_size for path in ended), f"{len(ended)} of flow runs that ended"
        )


def being_read(where: Project) -> Iterator[Path]:
    """Folders of runs, and models brought to be asked, that a process of this machine reads from: `longlora serve` and the like."""
    for home in ("worktrees", "asked"):
        for path in sorted((where.state / home).glob("*")):
            with unpinned(where, path.name) as free:
                if not free:
                    yield path


def kept_keys(where: Project, folders: dict[str, Path], keep: int, versions: set[str]) -> set[str]:
    """The runs that stay."""
    records = storage.recorded(where)
    notes = {key: where.state / "finished" / f"{key}.json" for key in records}
    ages = {key: max(map(modified, (notes.get(key), path / "dvc.lock", path))) for key, path in folders.items()}
    newest = sorted((key for key in ages if "-" not in key), key=lambda key: -ages[key])[:keep]
    pointed = {key for key, commit in records.items() if commit in versions}
    return {*newest, *pointed, *([] if remote_of(where.tree) else records)}


def modified(path: Path | None) -> float:
    return path.stat().st_mtime if path and path.exists() else 0.0


def young(path: Path) -> bool:
    """Whether anything in it was written lately."""
    newest = max(map(modified, [path, *path.rglob("*")]))
    return newest > time.time() - YOUNG


def size_of(path: Path) -> int:
    """Bytes of its files, those below it that are links not counted."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def shared_cache(where: Project) -> Path | None:
    """DVC's cache, if it lies outside of the project: others may keep data there, and what they need is not known here."""
    cache = cache_of(where.tree, where.root).resolve()
    return None if cache.is_relative_to(where.root.resolve() / ".dvc") else cache


def unused(where: Project, kept: set[str], versions: set[str]) -> Iterator[Leftover]:
    """Objects of DVC's cache that nothing refers to."""
    cache = cache_of(where.tree, where.root) / "files" / "md5"
    needed = with_contents(cache, {*named_in_git(where, kept, versions), *named_on_disk(where, kept)})
    limit = time.time() - YOUNG
    objects = {path: path.stat() for path in cache.glob("??/*") if path.is_file()}
    gone = [p for p, about in objects.items() if p.parent.name + p.name not in needed and about.st_ctime < limit]
    if gone:
        yield Leftover(
            "cache",
            tuple(gone),
            sum(objects[p].st_size for p in gone),
            f"{len(gone)} object{'s' * (len(gone) != 1)} that no kept run has",
        )


def named_in_git(where: Project, kept: set[str], versions: set[str]) -> set[str]:
    """Hashes in dvc.lock and *.dvc at every branch, tag and other ref (of records only the kept ones), HEAD, and `versions`.

    Without a DVC remote all records are kept, also those that their run's ref has moved away from.
    """
    refs = git("for-each-ref", "--format=%(refname)", cwd=where.root).splitlines()
    ours = (RUNS, storage.RECORDS) if remote_of(where.tree) else RUNS
    revs = [ref for ref in refs if not ref.startswith(ours) or ref in set(map(record_ref, kept))]
    found: set[str] = set()
    for rev in {*revs, *versions, "HEAD"}:
        names = git("ls-tree", "-r", "-z", "--name-only", rev, cwd=where.root).split("\0")  # without -z, é is quoted
        for name in names:
            if Path(name).name == "dvc.lock" or name.endswith(".dvc"):
                found |= set(HASH.findall(git("show", f"{rev}:{name}", cwd=where.root)))
    return found


def named_on_disk(where: Project, kept: set[str]) -> set[str]:
    """The same in every checkout of the repository; of runs only in the kept ones' folders."""
    ours = where.state / "worktrees"
    found: set[str] = set()
    for tree in checkouts(where):
        if tree.is_dir() and (not tree.is_relative_to(ours) or tree.name in kept):
            wanted = ("--cached", "--others", "--exclude-standard", "--", "*dvc.lock", "*.dvc")
            for name in {*git("ls-files", "-z", *wanted, cwd=tree).split("\0"), "dvc.lock"}:
                if (tree / name).is_file():
                    found |= set(HASH.findall((tree / name).read_text()))
    return found


def checkouts(where: Project) -> list[Path]:
    """The folders of all worktrees that git knows, also of those on a drive that is not there now."""
    lines = git("worktree", "list", "--porcelain", cwd=where.root).splitlines()
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


def with_contents(cache: Path, hashes: set[str]) -> set[str]:
    """`hashes`, and those of the files in each that is a folder."""
    inner: set[str] = set()
    for folder in (each for each in hashes if each.endswith(".dir")):
        listing = cache / folder[:2] / folder[2:]
        if listing.exists():
            inner |= set(re.findall(r'"md5": "([0-9a-f]{32})"', listing.read_text()))
    return hashes | inner


def remove(where: Project, found: list[Leftover]) -> None:
    """Delete what `leftovers` found, but no folder that a run works in, or that a process reads from, by now; and of the cache
    and of checkpoints nothing if any run is at work by now, for what it needs was not asked."""
    known = checkouts(where)
    for each in found:
        if each.kind in ("cache", "checkpoints") and at_work(where):
            what = "" if each.kind == "cache" else f"{each.kind} "
            print(f"left, for a run began meanwhile: {what}{each.why}")
            continue
        for path in each.paths:
            if each.kind == "cache":
                path.unlink(missing_ok=True)
            elif each.kind == "locks":
                delete(where, path.stem)
            else:
                remove_folder(where, path, known)


def remove_folder(where: Project, path: Path, known: list[Path]) -> None:
    """Delete `path`, and git's entry if it is among the worktrees that git knows; unless a run works in it, or a process reads from
    it."""
    with if_free(where, path.name) as idle, unpinned(where, path.name) as unread:
        if not (idle and unread):
            return
        shutil.rmtree(path)
        if path.resolve() in known:  # its entry alone: `prune` forgets those on a drive that is away, too
            git("worktree", "remove", "--force", "--force", str(path), cwd=where.root)
