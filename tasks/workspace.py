"""Git: the project, a snapshot of it, and a worktree of its own for every run.

A run never works in the user's folder. Its tree (the files as they are now, the recipe and overrides written into params.yaml) is
stored as a git object, and checked out under .longlora/worktrees. The key of a run is the id of that tree: the same files and the
same numbers are the same run, which is how a run is resumed.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tasks.overlay import appended, merged, read_text, recipe_file
from tasks.sources import SOURCES, hashed

RUNS = "refs/longlora/runs/"
LARGEST_UNTRACKED = 50_000_000  # bytes; a snapshot stores new files in git, and data belongs in DVC
IDENTITY = {f"GIT_{who}_{what}": "longlora" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@dataclass(frozen=True)
class Project:
    """A git repository with a dvc.yaml at its top."""

    tree: Path
    """The checkout that was asked about."""
    root: Path
    """The main checkout: the home of .longlora and of DVC's cache, shared by all worktrees."""

    @property
    def state(self) -> Path:
        """Real paths, should it be a link to another drive: git and DVC have to agree on where a file is."""
        return (self.root / ".longlora").resolve()


@dataclass(frozen=True)
class Snapshot:
    """What a run computes from, as git objects."""

    key: str
    """The first 12 digits of the tree's id."""
    commit: str
    head: str
    """The commit that was checked out when the snapshot was made."""
    branch: str
    """Its branch, or 'detached'."""
    dirty: bool
    """Whether files differed from `head` (recipe and overrides apart)."""
    recipe: str | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """A checkout as it was at one moment."""

    content: str
    """The id of its tree, as a git object."""
    head: str
    """The commit that was checked out."""
    branch: str
    """Its branch, or 'detached'."""
    params: str
    """The text of params.yaml."""
    recipe: str | None
    """The text of the recipe that was asked for: it need not be a file that git knows."""
    sources: str
    """The text of sources.yaml, '' without one."""
    data: dict[str, str] = field(default_factory=dict)
    """The hash of the data at each path that a snapshot of these files named, as it was when it was first named."""


@dataclass(frozen=True)
class Addition:
    """What is asked of a snapshot beyond the user's own files and words."""

    appended: dict[str, str] = field(default_factory=dict)
    """By a list's key in params.yaml, such as rivals.models: what stands in it besides what the user has there."""
    files: dict[str, str] = field(default_factory=dict)


def git(
    *arguments: str, cwd: Path, stdin: str | None = None, env: dict[str, str] | None = None, stored: bool = False
) -> str:
    """Run git, without the user's hooks (they are for the user's commits and checkouts) and without split indices (DVC does not
    read those), and return what it prints.

    Args:
        stored: write files byte for byte as they are stored, whatever ends of lines the user wants in his own: stages depend on
            their hashes.

    Raises:
        ValueError: there is no git, or it ended with an error; from its `fatal:` on, and the first of its errors before that, which
            is the cause; else its last line.
    """
    config = [f"core.hooksPath={os.devnull}", "core.splitIndex=false"]
    config += ["core.autocrlf=false", "core.eol=lf"] if stored else []
    command = ["git", *(word for setting in config for word in ("-c", setting)), *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            input=stdin,
            env={**os.environ, **(env or {})},
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # a file's name may be any bytes
        )
    except FileNotFoundError as error:
        if error.filename != "git":  # `cwd` is gone
            raise
        raise ValueError(
            "there is no program `git` on the PATH: install it, for every run is recorded with it"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
        errors, _, rest = said.partition("fatal: ")
        fatal = " ".join(rest.replace("fatal: ", "").split())
        cause = next((f" ({line[7:]})" for line in errors.splitlines() if line.startswith("error: ")), "")
        raise ValueError(f"git {arguments[0]}: {f'{fatal}{cause}' if fatal else said.splitlines()[-1]}")
    return done.stdout.strip("\n")


def project(folder: Path) -> Project:
    """The project that `folder` is in.

    Raises:
        ValueError: not in a git repository, or one that git does not open, or without commit, dvc.yaml, params.yaml or .dvc at
            its top; or a file is where the state folder belongs.
    """
    forget_callers_repository(folder)
    try:
        tree = Path(git("rev-parse", "--show-toplevel", cwd=folder))
    except ValueError as error:
        if "not a git repository" not in str(error):
            raise
        raise ValueError(
            f"{folder} is not in a git repository: clone the project with git, or run `git init`"
        ) from None
    for needed in ("dvc.yaml", "params.yaml", ".dvc"):
        if not (tree / needed).exists():
            raise ValueError(f"{tree} has no {needed}: it must stand at the top of the git repository")
        if needed.endswith(".yaml") and (tree / needed).is_dir():
            raise ValueError(f"{tree / needed} is a folder, and must be a file")
    if not has_commit(tree):
        raise ValueError(f"{tree} has no commit yet: a run is recorded on top of one")
    found = Project(tree=tree, root=main_checkout(tree))
    if found.state.is_file():
        raise ValueError(f"{found.state} is a file, and must be a folder: runs keep what they need there")
    return found


def has_commit(tree: Path) -> bool:
    """Whether the repository holds a commit; `--all` would also look at worktrees that another run just makes, half made."""
    if git("for-each-ref", "--count=1", cwd=tree):
        return True
    try:
        return bool(git("rev-parse", "--verify", "HEAD^{commit}", cwd=tree))  # detached, as a server checks out
    except ValueError:
        return False


def forget_callers_repository(folder: Path) -> None:
    """Drop the variables that git sets for a hook, if one started us: GIT_DIR and GIT_INDEX_FILE would hold for any folder, and in
    stages."""
    for name in git("rev-parse", "--local-env-vars", cwd=folder).split():
        if not name.startswith("GIT_CONFIG"):  # settings are the user's, and for whatever repository
            os.environ.pop(name, None)


def main_checkout(tree: Path) -> Path:
    """The main checkout of `tree`'s repository; `tree` itself where git names none: for a bare repository, and in the linked
    worktrees of a submodule or of a repository made with --separate-git-dir."""
    ours, shared = git("rev-parse", "--path-format=absolute", "--git-dir", "--git-common-dir", cwd=tree).splitlines()
    if ours == shared:
        return tree
    first, second = git("worktree", "list", "--porcelain", cwd=tree).splitlines()[:2]
    main = Path(first.removeprefix("worktree "))
    return main if (main / ".git").exists() and second != "bare" else tree


def snapshot(
    where: Project,
    *,
    recipe: str | None = None,
    overrides: list[str] | None = None,
    additions: Sequence[Addition] = (),
    files: Files | None = None,
) -> Snapshot:
    """Store the tree as it is now, with `recipe` and `overrides` in its params.yaml, and what these name by a path in its
    sources.yaml; the folder itself is not touched.

    Args:
        additions: what lists of params.yaml have besides, and texts of further files, by path.
        files: the tree as it was before, with the same recipe, instead.

    Raises:
        ValueError: an unknown recipe or key, a file too large for git, or data is not what snapshots of `files` had.
    """
    tree = where.tree
    now = files or files_now(where, recipe=recipe)
    asked = merged(now.params, recipe=now.recipe, overrides=overrides)
    added = [appended(asked, key, word) for each in additions for key, word in each.appended.items()]
    overrides = [*(overrides or []), *added]
    params = merged(now.params, recipe=now.recipe, overrides=overrides)
    sources = hashed(now.sources, params, tree, now.data)
    head = git("rev-parse", f"{now.head}^{{tree}}", cwd=tree)
    with scratch_index(tree, now.content) as index:
        if params != now.params:
            stage_file(tree, "params.yaml", params, index)
        if sources != now.sources:
            stage_file(tree, SOURCES, sources, index)
        for each in additions:
            for name, text in each.files.items():
                stage_file(tree, name, text, index)
        content = git("write-tree", cwd=tree, env=index)
    return Snapshot(
        key=content[:12],
        commit=now.head if content == head else commit_tree(tree, content, now.head, "snapshot"),
        head=now.head,
        branch=now.branch,
        dirty=now.content != head,
        recipe=recipe,
        overrides=tuple(overrides),
    )


def files_now(where: Project, *, recipe: str | None = None) -> Files:
    """Store the tree as it is now, and read what a snapshot changes; the folder itself is not touched.

    Raises:
        ValueError: an unknown recipe, or a file too large for git.
    """
    tree = where.tree
    refuse_large_files(tree)
    head, branch = (git("rev-parse", *words, "HEAD", cwd=tree) for words in ([], ["--abbrev-ref"]))
    with scratch_index(tree, head) as index:
        # dvc.lock is what a run makes, not what it starts from: HEAD's stays
        git("add", "--all", "--", ".", ":(exclude)dvc.lock", cwd=tree, env=index)
        content = git("write-tree", cwd=tree, env=index)
    return Files(
        content=content,
        head=head,
        branch="detached" if branch == "HEAD" else branch,
        params=read_text(tree / "params.yaml"),
        recipe=read_text(recipe_file(tree, recipe)) if recipe is not None else None,
        sources=read_text(tree / SOURCES) if (tree / SOURCES).exists() else "",
    )


@contextmanager
def scratch_index(tree: Path, content: str) -> Generator[dict[str, str]]:
    """An index with what the tree or commit `content` has, beside the user's own; yields git's setting for it."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git("read-tree", content, cwd=tree, env=index)
        yield index


def refuse_large_files(tree: Path) -> None:
    for name in filter(None, git("ls-files", "--others", "--exclude-standard", "-z", cwd=tree).split("\0")):
        size = (tree / name).lstat().st_size
        if size > LARGEST_UNTRACKED:
            rule = f"new files up to {LARGEST_UNTRACKED // 10**6} MB become part of a run"
            raise ValueError(f"{name} has {size // 10**6} MB: {rule}; ignore it (.gitignore) or track it (dvc add)")


def stage_file(tree: Path, name: str, text: str, index: dict[str, str]) -> None:
    """Put `text` as file `name` into the index."""
    blob = git("hash-object", "-w", "--stdin", cwd=tree, stdin=text)
    git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", cwd=tree, env=index)


def commit_tree(tree: Path, content: str, parent: str, message: str) -> str:
    """A commit whose id depends on nothing but its content and parent."""
    date = git("show", "--no-patch", "--no-show-signature", "--format=%cI", parent, cwd=tree)
    fixed = {**IDENTITY, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    return git("commit-tree", content, "-p", parent, "-m", f"longlora: {message}", cwd=tree, env=fixed)


def home(where: Project) -> str:
    """This machine and folder: whose locks tell whether a run that began here is still at work."""
    return f"{platform.node()}:{where.root}"


def was_used(where: Project) -> bool:
    """Whether a run ever began here."""
    return (where.state / "worktrees").exists()


def worktree(where: Project, snapshot: Snapshot) -> Path:
    """The folder of a run, made or found again, its tracked files exactly the snapshot's. Call it under `locks.hold`.

    dvc.lock is left as an earlier attempt wrote it. Without one, it is the recorded run's if there is such a record, else HEAD's.
    """
    folder = where.state / "worktrees" / snapshot.key
    ready = folder / ".dvc" / "tmp" / "ready"  # .dvc/tmp is ignored by git
    entry = entry_of(folder, where)
    if ready.exists() and entry:
        (entry / "index.lock").unlink(missing_ok=True)  # left by a git that was killed: nobody else is in here
        git("checkout", "--force", snapshot.commit, "--", ".", ":(exclude)dvc.lock", cwd=folder, stored=True)
        return folder
    if folder.exists():  # half made, or of the project where it was before
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # twice: git may know a folder that is gone, and a git that was killed here left it locked
    git("worktree", "add", "--force", "--force", "--detach", str(folder), snapshot.commit, cwd=where.root, stored=True)
    record = git("for-each-ref", "--format=%(objectname)", record_ref(snapshot.key), cwd=where.root)
    if record:
        git("checkout", record, "--", "dvc.lock", cwd=folder, stored=True)
    ready.parent.mkdir(parents=True, exist_ok=True)
    ready.touch()
    return folder


def entry_of(folder: Path, where: Project) -> Path | None:
    """What git keeps of worktree `folder` in this repository; None if that is nothing or elsewhere: the project was moved, or was
    copied with its runs, where git would work on the original's."""
    file = folder / ".git"
    if not file.exists():
        return None
    entry = (folder / file.read_text().removeprefix("gitdir: ").strip()).resolve()
    ours = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir", cwd=where.root)).resolve()
    return entry if entry.is_dir() and entry.is_relative_to(ours) else None


def record_ref(key: str) -> str:
    """Where the finished run `key` is kept in git."""
    return f"{RUNS}{key}"


def person(where: Project) -> str:
    """Who is at work, as git knows them."""
    return git("config", "--default", "", "--get", "user.name", cwd=where.tree) or os.environ.get("USER") or "unknown"
