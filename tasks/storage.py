"""Where a finished run is kept: a git commit under its own ref, its data on the DVC remote.

The commit's tree is the run's snapshot with the dvc.lock it made, so `git show REF:dvc.lock` has every hash, and any clone that has
the ref and reaches the remote has the run. A run's ref moves when the same files give another lock, as they may where data lies
outside of git; each record has a ref of its own besides, which never moves, for the registry points to records.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import yaml

from tasks.hashes import named
from tasks.workspace import RUNS, Project, Snapshot, commit_tree, git, record_ref, scratch_index, stage_file

RECORDS = "refs/longlora/records/"
COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # its whole id
SSH = ("ssh", "git+ssh", "ssh+git")  # as git calls it


@dataclass(frozen=True)
class Finished:
    """That a run is recorded everywhere: written last, read first."""

    record: str
    run_id: str
    tracking: str


def record(where: Project, snapshot: Snapshot, folder: Path) -> str:
    """Commit `folder`'s dvc.lock on top of the snapshot, under the run's ref and its own. The same lock gives the same commit.
    Call it under the lock of the run's key."""
    commit = record_commit(where, snapshot, folder)
    for lock in ref_locks(where, kept_ref(commit), record_ref(snapshot.key)):
        lock.unlink(missing_ok=True)
    updates = "".join(f"update {ref} {commit}\n" for ref in (kept_ref(commit), record_ref(snapshot.key)))
    git("update-ref", "--stdin", cwd=where.root, stdin=updates)
    return commit


def must_agree(folder: Path, stages: list[str]) -> None:
    """Check by `folder`'s dvc.lock that each of `stages` read what the one before had written, or what a `.dvc` file names: the
    record says that these scores are of this model, and those of this champion.

    Raises:
        ValueError: somebody changed it between the two.
    """
    lock = yaml.load((folder / "dvc.lock").read_text(), Loader=yaml.CSafeLoader)["stages"]
    written = {out["path"]: out["md5"] for name in stages for out in lock[name].get("outs", [])}
    for name in stages:
        for dep in lock[name].get("deps", []):
            due = written.get(dep["path"]) or named(folder / f"{dep['path']}.dvc")
            if due and dep["md5"] != due:
                raise ValueError(
                    f"{dep['path']} was changed while the run was at work: stage '{name}' read {dep['md5']}, and {due} had been "
                    "there; the same command restores it, and measures again"
                )


def ref_locks(where: Project, *refs: str) -> list[Path]:
    """git's locks of `refs`. One that is there under the lock of their run was left by a git that was killed."""
    asked = [word for ref in refs for word in ("--git-path", f"{ref}.lock")]
    return [Path(line) for line in git("rev-parse", "--path-format=absolute", *asked, cwd=where.root).splitlines()]


def kept_ref(commit: str) -> str:
    """The ref of record `commit` alone, whatever becomes of its run's."""
    return f"{RECORDS}{commit}"


def record_commit(where: Project, snapshot: Snapshot, folder: Path) -> str:
    """The run's present record if it has these very files, on top of whatever commit; else a new one."""
    with scratch_index(where.root, snapshot.commit) as index:
        stage_file(where.root, "dvc.lock", in_order((folder / "dvc.lock").read_text()), index)
        content = git("write-tree", cwd=where.root, env=index)
    present = recorded(where).get(snapshot.key)
    if present and git("rev-parse", f"{present}^{{tree}}", cwd=where.root) == content:
        return present
    return commit_tree(where.root, content, snapshot.commit, f"run {snapshot.key}")


def in_order(lock: str) -> str:
    """The text of a dvc.lock with its stages sorted: DVC adds them as they finish, which a kill can change."""
    head, *stages = re.split(r"(?m)^(?=  \S)", lock)
    return head + "".join(sorted(stages))


def must_take(where: Project, snapshot: Snapshot) -> None:
    """Check that the git remote named by LONGLORA_GIT_REMOTE, if any, lets us push the record of a run, as far as git asks it
    before it sends anything: hooks there have their say at the end.

    Raises:
        ValueError: it does not, with what git says.
    """
    remote = os.environ.get("LONGLORA_GIT_REMOTE")
    if remote:
        ref = f"{snapshot.commit}:{record_ref(snapshot.key)}"
        try:
            git("push", "--dry-run", "--quiet", "--force", "--", remote, ref, cwd=where.root)
        except ValueError as error:
            known = without_credentials(remote)
            raise ValueError(f"LONGLORA_GIT_REMOTE={known}: {str(error).replace(remote, known)}") from None


def publish(where: Project, key: str, commit: str) -> str:
    """Push the run's ref and that of its record to the git remote named by LONGLORA_GIT_REMOTE; its address without credentials,
    or ''."""
    remote = os.environ.get("LONGLORA_GIT_REMOTE")
    if not remote:
        return ""
    refs = [f"{ref}:{ref}" for ref in (kept_ref(commit), record_ref(key))]
    git("push", "--quiet", "--force", "--", remote, *refs, cwd=where.root)
    names = git("remote", cwd=where.root).split()
    return without_credentials(git("remote", "get-url", "--", remote, cwd=where.root) if remote in names else remote)


def addresses(where: Project) -> set[str]:
    """Under what addresses records of this project may be found: its folder and its git remotes, without credentials."""
    remotes = [git("remote", "get-url", "--", name, cwd=where.root) for name in git("remote", cwd=where.root).split()]
    return {str(where.root), *map(without_credentials, [*remotes, os.environ.get("LONGLORA_GIT_REMOTE", "")])} - {""}


def at_hand(where: Project, commits: set[str]) -> set[str]:
    """Those of `commits` that this clone has. An id says what a commit holds, so it is ours, whatever address it was known by."""
    asked = "".join(f"{commit}\n" for commit in commits if COMMIT.fullmatch(commit))
    said = git("cat-file", "--batch-check", cwd=where.root, stdin=asked).splitlines() if asked else []
    return {name for name, kind, *_ in map(str.split, said) if kind == "commit"}


def must_be_here(where: Project, commit: str, *, of: str) -> None:
    """Raises ValueError: this clone lacks `commit`, the record of what `of` names: git fetches but branches and tags by itself."""
    if not at_hand(where, {commit}):
        raise ValueError(
            f"{of} points to {commit[:12]}, which is not in this clone: fetch it with "
            "`git fetch REMOTE 'refs/longlora/*:refs/longlora/*'`"
        )


def ours(where: Project, pointed: dict[str, set[str]]) -> set[str]:
    """Of commits and the addresses that each is said to be at, those of this project."""
    known = addresses(where)
    return at_hand(where, set(pointed)) | {commit for commit, repos in pointed.items() if repos & known}


def without_credentials(url: str) -> str:
    """`url` without user, password and query, which may hold a token. The user stays where it is part of the address: with ssh."""
    parts = urlsplit(url)
    if not parts.scheme or not ("@" in parts.netloc or parts.query):
        return url
    who, at, host = parts.netloc.rpartition("@")
    user = f"{who.partition(':')[0]}{at}" if parts.scheme in SSH else ""
    return urlunsplit(parts._replace(netloc=user + host, query=""))


def note(where: Project, key: str, finished: Finished) -> None:
    """Remember that run `key` is recorded everywhere, in one step."""
    path = where.state / "finished" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(finished)))
    scratch.replace(path)


def noted(where: Project, key: str) -> Finished | None:
    path = where.state / "finished" / f"{key}.json"
    return Finished(**json.loads(path.read_text())) if path.exists() else None


def recorded(where: Project) -> dict[str, str]:
    """The record of every run that this clone has, by key."""
    lines = git("for-each-ref", "--format=%(refname) %(objectname)", RUNS, cwd=where.root).splitlines()
    return {ref.removeprefix(RUNS): commit for ref, commit in map(str.split, lines)}


def bring_record(where: Project, wanted: str, addresses: list[str]) -> str:
    """The key of the run that begins with `wanted`, its record fetched from the first of `addresses` that has it, if need be.

    Raises:
        ValueError: no such run is recorded anywhere, more than one is, or what is there is no record.
    """
    if not re.fullmatch("[0-9a-f]{4,40}", wanted):
        raise ValueError(
            f"run '{wanted}': must be 4 to 12 digits of its key, such as 0123abcd, or those of its MLflow id"
        )
    unreachable = []
    keys = [key for key in recorded(where) if key.startswith(wanted)]
    for address in addresses if not keys else []:
        try:
            said = git("ls-remote", "--", address, f"{RUNS}*", cwd=where.root).splitlines()
        except ValueError as error:
            unreachable.append(f"{without_credentials(address)}: {error}")
            continue
        keys = [key for line in said if (key := line.split()[1].removeprefix(RUNS)).startswith(wanted)]
        if keys:
            refs = [f"{record_ref(key)}:{record_ref(key)}" for key in keys]
            git("fetch", "--quiet", "--no-write-fetch-head", "--", address, *refs, cwd=where.root)
            break
    if len(keys) == 1:
        must_be_record(where, keys[0])
        return keys[0]
    if keys:
        raise ValueError(f"'{wanted}' could be {', '.join(sorted(keys)[:5])}")
    asked = ", ".join(map(without_credentials, addresses)) or "no git remote (set LONGLORA_GIT_REMOTE)"
    raise ValueError(
        f"run '{wanted}' is not recorded here, nor on {asked}" + "".join(f"; {line}" for line in unreachable)
    )


def must_be_record(where: Project, key: str) -> None:
    """Check that the record of `key` is its snapshot plus dvc.lock: a ref can be pushed by anyone."""
    ref = record_ref(key)
    tree = git("rev-parse", f"{ref}~^{{tree}}", cwd=where.root)
    changed = git("diff", "--name-only", f"{ref}~", ref, cwd=where.root).split("\n")
    if not tree.startswith(key) or set(changed) - {"", "dvc.lock"}:
        raise ValueError(f"{ref} is not the record of run {key}: its files are not those the key was made from")


def recorded_snapshot(where: Project, key: str) -> Snapshot:
    """The snapshot that run `key` computed from, by its record; recipe and overrides are in its params.yaml already."""
    commit = git("rev-parse", f"{record_ref(key)}~", cwd=where.root)
    return Snapshot(key=key, commit=commit, head=commit, branch="detached", dirty=False, recipe=None, overrides=())
