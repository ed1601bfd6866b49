"""DVC: the graph, what is stale, and one stage brought up to date.

`dvc.repo.Repo` is no stable interface, so its engine is used here alone (and, in the process of one stage, in tasks/single.py).
Whether a stage is stale is for DVC to say, by dvc.lock, its cache, its run cache and its remote; nothing else keeps track of that.
"""

import logging
import os
import re
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import networkx
import yaml
from dvc.dvcfile import Lockfile, load_file
from dvc.exceptions import CheckoutError, DvcException, OutputDuplicationError
from dvc.repo import Repo, lock_repo

from tasks.config import remote_of
from tasks.declared import Artifact, artifacts_in
from tasks.errors import UserError, one_line
from tasks.hashes import hash_of
from tasks.single import RunCache, drop_cut_off_locks, must_be_whole, write_lock
from tasks.stage_process import StageRunner
from tasks.storage import without_credentials

Status = Literal["unchanged", "restored", "stale"]
VARIES = "varies"
GPU = "gpu"
BUCKETS = ("s3", "gs", "azure")  # where folders are but names, and what is told to be missing is the bucket


@dataclass(frozen=True)
class Out:
    """One output of a stage, as dvc.lock says it."""

    path: str
    """Relative to the project."""
    kind: Literal["out", "metric", "plot"]
    options: dict[str, Any] = field(default_factory=dict)
    """A plot's own keys (x, y, title)."""
    md5: str | None = None
    size: int | None = None
    """Bytes."""
    varies: bool = False
    """Labelled so in dvc.yaml: it holds times or memory, which no two runs agree on."""


@dataclass(frozen=True)
class Stage:
    name: str
    desc: str
    meta: dict[str, Any]
    upstream: tuple[str, ...]
    sources: tuple[str, ...]
    """The `.dvc` files of data that it reads."""
    outs: tuple[Out, ...]
    """Without hashes where it is stale: `DvcRepo.outs` has them when it is done."""
    status: Status
    """`restored`: computed before, by another run; its outputs came from the cache or the remote."""


class DvcRepo:
    """dvc.yaml of one worktree. Its calls may come from several threads."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str], afresh: bool = False) -> None:
        """`environment`: what its stages are told beyond their files; `afresh`: compute what is known too, and cache nothing."""
        logging.getLogger("dvc").setLevel(logging.ERROR)
        logging.getLogger("dvc_data").setLevel(logging.ERROR)
        self.folder = folder
        self._afresh = afresh
        self._lock = threading.RLock()
        self._parsed: dict[str, Any] = {}
        self._runner = StageRunner(folder, environment=environment, afresh=afresh)
        self._repo = Repo(str(folder), _wait_for_lock=True)
        self._repo.stage_cache = self._run_cache = RunCache(self._repo)
        try:
            Lockfile(self._repo, str(folder / "dvc.lock")).load()
        except DvcException:  # cut off by a kill: DVC writes it in place; what was computed is in the run cache
            (folder / "dvc.lock").unlink()
        drop_cut_off_locks(self._repo)

    @contextmanager
    def _engine(self) -> Generator[None]:
        """DVC's own lock, its memory of files dropped, and its folder current: the run cache takes "dvc.yaml" from there."""
        with self._lock, chdir(self.folder), lock_repo(self._repo):
            yield

    def plan(self) -> list[Stage]:
        """Every stage, upstream first, after restoring what was computed before.

        Raises:
            ValueError: there is no stage, or two write one file; data that a `.dvc` file names is nowhere; a matrix has values that
                are no names.
        """
        with self._engine(), self._restoring() as restored:
            try:
                graph = self._repo.index.graph
            except OutputDuplicationError as error:  # DVC advises to remove a stage, and means a list of params.yaml
                names = " and ".join(sorted(stage.addressing for stage in error.stages))  # a set
                raise ValueError(f"{error.output} is written by two stages, {names}: leave one of them out") from None
            stages = self._stages()
            if not stages:
                raise ValueError("dvc.yaml has no stages: there is nothing to run")
            _ = self.artifacts  # kept from now on: the next call would read the whole index again for them
            loaded: list[Any] = self._repo.stage.load_all("dvc.yaml")
            again = {each.name: each for each in loaded}
            self.bring_sources()
            upstream = {
                stage.name: tuple(above.name for above in graph.successors(stage) if not above.is_data_source)
                for stage in stages
            }
            statuses: dict[str, Status] = {}
            for stage in stages:
                waits = any(statuses[above] == "stale" for above in upstream[stage.name])
                statuses[stage.name] = "stale" if waits else self._settled(stage, again[stage.name], restored)
            return [
                Stage(
                    name=stage.name,
                    desc=stage.desc or "",
                    meta=dict(stage.meta or {}),
                    upstream=upstream[stage.name],
                    sources=tuple(each.addressing for each in graph.successors(stage) if each.is_data_source),
                    outs=tuple(self._out(out) for out in stage.outs),
                    status=statuses[stage.name],
                )
                for stage in stages
            ]

    def names(self) -> list[str]:
        """Every stage, upstream first."""
        with self._engine():
            return [stage.name for stage in self._stages()]

    def _stages(self) -> list[Any]:
        """Every stage, upstream first. Data that a `.dvc` file names is a stage to DVC, and none to us.

        Raises:
            ValueError: a value of a matrix could be more than a word to the shell that runs the command it stands in.
        """
        stages = [each for each in networkx.dfs_postorder_nodes(self._repo.index.graph) if not each.is_data_source]
        for stage in stages:  # a matrix's values are part of the name
            if not re.fullmatch(r"[\w.@+-]+", stage.name):
                raise ValueError(
                    f"stage '{stage.name}': the values of its matrix stand in a command: letters, digits and . _ + - only"
                )
        return stages

    def bring_sources(self) -> None:
        """Put the data of every `.dvc` file in its place.

        Raises:
            ValueError: it is nowhere.
        """
        with self._engine():
            for source in self._repo.index.graph:
                if source.is_data_source:
                    self._bring_source(source)

    def _bring_source(self, source: Any) -> None:
        """Put the data of a `.dvc` file in its place, from the cache or the remote. What somebody changed there is overwritten."""
        if not source.changed():
            return
        reason = ""
        try:
            if not source.outs_cached():
                self._repo.fetch(source.addressing)
            self._repo.checkout(source.addressing, force=True)
        except DvcException as error:
            reason = f" ({one_line(error)})"
        if reason or source.changed():
            raise ValueError(f"{source.addressing}: its data is neither in the cache nor on a remote{reason}")

    def settle(self, name: str) -> Status:
        """Whether `name` is up to date; if it is not, but its outputs are known for these very inputs, fetch them."""
        with self._engine(), self._restoring() as restored:
            stages = self._dvc_yaml().stages  # dvc.lock read once, a new object each time one is asked for
            return self._settled(stages[name], stages[name], restored)

    def _dvc_yaml(self) -> Any:
        """dvc.yaml, with dvc.lock as it is now. dvc.yaml itself is read only once, because it does not change in a run's folder."""
        file: Any = load_file(self._repo, str(self.folder / "dvc.yaml"))
        vars(file).update(self._parsed)
        self._parsed = {"contents": file.contents, "resolver": file.resolver}
        return file

    @contextmanager
    def _restoring(self) -> Generator[list[Any]]:
        """A list for stages whose outputs were restored: at the end, all of them are written to dvc.lock together."""
        restored: list[Any] = []
        with self._repo.scm_context(quiet=True):
            yield restored
            if restored:
                write_lock(restored)

    def _settled(self, seen: Any, stage: Any, restored: list[Any]) -> Status:
        """The status of a stage. Outputs that are known for its inputs are put in place.

        `seen` and `stage` are two objects for the same stage: one of DVC's remembers what it saw when it was first asked.
        """
        if not seen.changed():
            return "unchanged"
        if in_lock := self._is_in_lock(stage):
            must_be_whole(stage.checkout(force=True))
        elif known := self._in_run_cache(stage):
            stage.remove_outs()
            known.checkout()
        else:
            return "stale"
        # The rest of what `stage.reproduce` does. That itself would run the command of a stage that the run cache cannot hold.
        # What came from the run cache need not be saved there again.
        stage.save(run_cache=in_lock and all(out.use_cache for out in stage.outs))
        stage.commit()
        for out in stage.outs:
            # DVC trusts its cache, and somebody may have written into it. Scores are small, and decide a promotion: hash them.
            file = Path(out.fs_path)
            if (out.metric or file.suffix == ".csv") and (found := hash_of(file)) != out.hash_info.value:
                raise ValueError(
                    f"{out} is damaged in the cache: its hash is {found}, and must be {out.hash_info.value}"
                )
        restored.append(stage)
        return "restored"

    def _is_in_lock(self, stage: Any) -> bool:
        """Whether nothing but files of `stage`'s outputs is missing, and DVC has them."""
        if stage.changed(allow_missing=True) or not all(dep.exists for dep in stage.deps):
            return False
        try:
            if not stage.outs_cached():
                self._repo.fetch(stage.name)
            return bool(stage.outs_cached())
        except DvcException:
            return False

    def _in_run_cache(self, stage: Any) -> Any | None:
        """A stage that was computed from these very inputs, and whose outputs DVC has."""
        try:
            stage.save_deps()
            return self._run_cache.known(stage)
        except DvcException:
            return None

    def _out(self, out: Any) -> Out:
        return Out(
            path=out.fs.relpath(out.fs_path, str(self.folder)),
            kind="plot" if out.plot else "metric" if out.metric else "out",
            options=dict(out.plot) if isinstance(out.plot, dict) else {},
            varies=VARIES in out.annot.labels,
        )

    def outs(self, stage: Stage) -> list[Out]:
        """The outputs of `stage`, with the hashes that dvc.lock has now."""
        lock = yaml.load((self.folder / "dvc.lock").read_text(), Loader=yaml.CSafeLoader)
        entries = {entry["path"]: entry for entry in lock["stages"].get(stage.name, {}).get("outs", [])}
        known = [(out, entries.get(out.path, {})) for out in stage.outs]
        return [replace(out, md5=entry.get("md5"), size=entry.get("size")) for out, entry in known]

    def bring(self) -> str:
        """Put every output that dvc.lock says where it belongs, from the cache or the remote; which could not be had, or ''."""
        with self._engine():
            reason = ""
            try:
                self._repo.fetch()
            except (DvcException, OSError) as error:  # what was not fetched is what the checkout then misses
                reason = f" ({one_line(error)})"
            try:
                self._repo.checkout(force=True)
            except CheckoutError as error:
                first, *rest = sorted(
                    os.path.relpath(self.folder / target, self.folder) for target in error.target_infos
                )
                others = f" and {len(rest)} more output{'s' * (len(rest) > 1)}" if rest else ""
                return f"{first}{others}{reason}"
            return ""

    def push(self) -> str:
        """Send the data of dvc.lock to the default remote; its address, or '' if there is none.

        Raises:
            UserError: it does not take it.
        """
        with self._engine(), self._remote() as address:
            if address:
                self._repo.push()
            return address

    def must_reach_remote(self) -> None:
        """Check that the default remote answers, if it is none of this machine's folders.

        Raises:
            UserError: it does not.
        """
        with self._engine(), self._remote() as address:
            if urlsplit(address).scheme:
                place = self._repo.cloud.get_remote_odb()
                files: Any = place.fs
                try:
                    files.ls(place.path)
                except FileNotFoundError as error:
                    # a folder may be made later, a bucket not; who sees a part of it alone may write there
                    if files.protocol in BUCKETS and error.__cause__:
                        raise

    @contextmanager
    def _remote(self) -> Generator[str]:
        """The address of the default remote, or ''. What its client says inside is told in one line."""
        address = remote_of(self.folder)
        try:
            yield address
        except Exception as error:  # each kind of remote has a client of its own, with errors of its own
            said = f"the DVC remote {without_credentials(address)}: {one_line(error)}"
            raise UserError(f"{said}: the same command goes on from here when that is mended") from error

    @cached_property
    def artifacts(self) -> list[Artifact]:
        with self._engine():
            return artifacts_in(self._repo)

    def bring_up_to_date(
        self, name: str, *, log: Callable[[str], None] = lambda line: None, on_tick: Callable[[], None] = lambda: None
    ) -> Status:
        """Run one stage, unless it is up to date or its outputs are known; each line of its output is printed behind its name,
        and given to `log`. Returns what the stage was.

        Raises:
            StageError: as `run_stage`.
        """

        def hear(line: str) -> None:
            log(line)
            print(f"{name} | {line}", flush=True)

        status = "stale" if self._afresh else self.settle(name)
        if status == "stale":
            self.run_stage(name, on_line=hear, on_tick=on_tick)
        return status

    def run_stage(self, name: str, *, on_line: Callable[[str], None], on_tick: Callable[[], None]) -> None:
        """Run one stage, on a slot of the GPUs if it is tagged so.

        Raises:
            StageError: as `StageRunner.run`.
        """
        self._runner.run(name, queues=name in self._queueing, on_line=on_line, on_tick=on_tick)

    @cached_property
    def _queueing(self) -> set[str]:
        """The stages that are tagged for a GPU."""
        with self._engine():
            stages: list[Any] = self._repo.stage.load_all("dvc.yaml")
            return {stage.name for stage in stages if GPU in (stage.meta or {}).get("tags", [])}

    def warm(self) -> None:
        """Have a process ready for the next stage."""
        self._runner.warm()

    def close(self) -> None:
        """Start no stage any more."""
        self._runner.close()
