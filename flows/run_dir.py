"""Where one run happens: its project, its snapshot, its worktree, and what dvc.yaml says of its results."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tasks import storage
from tasks.config import link
from tasks.declared import Artifact
from tasks.stages import DvcRepo, Stage
from tasks.workspace import Addition, Project, Snapshot, worktree


@dataclass(frozen=True)
class RunDir:
    where: Project
    snapshot: Snapshot
    folder: Path
    dvc: DvcRepo
    stages: list[Stage]
    """As they were when it was opened."""

    @property
    def name(self) -> str:
        """The registered model's name, which names the experiment too; the folder's name if dvc.yaml has none."""
        model = self.artifact("model")
        return model.name if model else self.where.root.name

    def artifact(self, kind: str) -> Artifact | None:
        """The first of dvc.yaml's `artifacts:` of this type."""
        return next((artifact for artifact in self.dvc.artifacts if artifact.type == kind), None)

    def verdict(self) -> str:
        """The path of the gate's verdict: the metric called verdict.json; '' without one."""
        metrics = [out.path for stage in self.stages for out in stage.outs if out.kind == "metric"]
        return next((path for path in metrics if Path(path).name == "verdict.json"), "")

    def report(self) -> list[Path]:
        """The files of the artifact of type report: the summary (Markdown) first, then pictures and pages."""
        artifact = self.artifact("report")
        if not artifact:
            return []
        path = self.folder / artifact.path
        files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        return sorted(files, key=lambda file: (file.name != "summary.md", file.suffix != ".md", str(file)))

    def summary(self) -> str:
        """The report's Markdown, or ''."""
        files = [file for file in self.report() if file.suffix == ".md"]
        return files[0].read_text() if files else ""

    def picture(self) -> str:
        """The path of the report's main picture, the first that its texts show, else the first there is; '' without one."""
        files = self.report()
        images = [file for file in files if file.suffix in (".png", ".svg", ".jpg")]
        texts = [file for file in files if file.suffix == ".md"]
        shown = [
            text.parent / name for text in texts for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text.read_text())
        ]
        main = next((file for file in [*shown, *images] if file in images), None)
        return str(main.relative_to(self.folder)) if main else ""


def brought(where: Project, beside: str | None) -> list[Addition]:
    """What a snapshot needs so that model `beside` (champion, candidate, or a run) is measured too; nothing without one.

    Raises:
        ValueError: there is no such model.
    """
    if beside is None:
        return []
    from tasks import tracking  # MLflow takes seconds to import, and only this needs it before the first stage runs
    from tasks.beside import addition

    return [addition(tracking.connect(), where, beside)]


def open_run_dir(where: Project, snapshot: Snapshot) -> RunDir:
    """The folder of a run, made or found again, what was computed before restored. Call it under the lock of its key."""
    folder = worktree(where, snapshot)
    link(folder, to=where.tree, cache_home=where.root)
    dvc = DvcRepo(folder, environment=stage_settings(checkpoint_home(where)))
    return RunDir(where, snapshot, folder, dvc, dvc.plan())


def is_finished(run_dir: RunDir) -> bool:
    """Whether there is nothing to do: no stage is stale, and what they made is recorded, and finished in this MLflow.

    Raises:
        ValueError: nobody answers there.
    """
    noted = storage.noted(run_dir.where, run_dir.snapshot.key)
    if (
        noted is None
        or any(stage.status == "stale" for stage in run_dir.stages)
        or noted.record != storage.record_commit(run_dir.where, run_dir.snapshot, run_dir.folder)
        or noted.tracking != storage.without_credentials(os.environ["MLFLOW_TRACKING_URI"])
    ):
        return False
    from tasks import tracking  # MLflow takes seconds to import, and only a run that is done needs it here

    return tracking.is_finished(tracking.connect(), noted.run_id, record=noted.record)


def checkpoint_home(where: Project) -> Path:
    """Where runs leave checkpoints: LONGLORA_CHECKPOINTS, relative to the current folder, else a place in the state folder."""
    return Path(os.environ.get("LONGLORA_CHECKPOINTS") or where.state / "checkpoints").absolute()


def stage_settings(checkpoints: Path) -> dict[str, str]:
    """What stages are told beyond their files."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # this interpreter
        "PYTHONUNBUFFERED": "1",
        "SHELL": "/bin/sh",  # DVC runs commands by the user's shell, and dvc.yaml is written for sh
        "LONGLORA_CHECKPOINTS": str(checkpoints),
    }
