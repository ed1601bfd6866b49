"""Which files of scores the stages write, by dvc.yaml and params.yaml: DVC leaves the others where an earlier run put them, and
the gate and the report would take them for this model's."""

from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

SCORES = "${scores}/"
READ = (".json", ".csv")


def written(pipeline: dict[str, Any], *, params: dict[str, Any]) -> set[str]:
    """The files below the folder `scores` that the stages of dvc.yaml write, each stage once per item of its matrix."""
    files: set[str] = set()
    for stage in pipeline["stages"].values():
        outs = [out for kind in ("outs", "metrics") for out in stage.get(kind, []) if str(out).startswith(SCORES)]
        matrix = resolved(stage.get("matrix", {}), params)
        for values in product(*matrix.values()):
            item = dict(zip(matrix, values, strict=True))
            files |= {*resolved([out.removeprefix(SCORES) for out in outs], params | {"item": item})}
    return files


def resolved(node: Any, names: dict[str, Any]) -> Any:
    """`node` with each `${name}` in it replaced: DVC's templates and OmegaConf's interpolations look the same."""
    return OmegaConf.to_container(OmegaConf.create(names | {"node": node}), resolve=True)["node"]  # type: ignore[index, call-overload]


def refuse_others(scores: Path, *, files: set[str]) -> None:
    """Raise ValueError where the folder `scores` holds a file of scores that is not among `files`."""
    for file in sorted(scores.rglob("*")):
        if file.suffix in READ and file.relative_to(scores).as_posix() not in files:
            raise ValueError(
                f"{file} is of no stage that dvc.yaml has under these params, so its scores are another model's: delete it"
            )
