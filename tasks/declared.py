"""What dvc.yaml declares for us: `artifacts:`, and the entries of `meta:`, which DVC hands on as they are."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from dvc.repo import Repo

T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """An entry of dvc.yaml's `artifacts:`."""

    name: str
    path: str
    """Relative to the project."""
    type: str
    desc: str
    labels: list[str]
    meta: dict[str, Any]


@dataclass(frozen=True)
class TaskOptions:
    """`meta` of a stage: options of its Prefect task."""

    retries: int | None = None
    retry_delay_seconds: float | list[float] | None = None
    retry_jitter_factor: float | None = None
    timeout_seconds: float | None = None
    tags: list[str] | None = None


def declared(kind: type[T], entry: Any, *, at: str) -> T:
    """What dvc.yaml has at `at`, as the dataclass `kind`.

    Raises:
        ValueError: it has an unknown key, lacks one, or has a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError  # a tenth of a second, which not every command need spend

    known = [each.name for each in fields(kind)]  # pyright: ignore[reportArgumentType], a dataclass
    if not isinstance(entry, dict):
        raise ValueError(f"dvc.yaml: {at}: must be {{key: value}}, of {', '.join(known)}; not {entry!r}")
    types = get_type_hints(kind)
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"dvc.yaml: {at}: unknown key '{key}'; there are: {', '.join(known)}")
        try:
            TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"dvc.yaml: {at}: {key} = {value!r}: {error.errors()[0]['msg']}") from None
    needed = [each.name for each in fields(kind) if each.default is MISSING]  # pyright: ignore[reportArgumentType], as above
    if lacking := [key for key in needed if key not in entry]:
        raise ValueError(f"dvc.yaml: {at}: lacks {', '.join(lacking)}; there are: {', '.join(known)}")
    return kind(**entry)


def artifacts_in(repo: Repo) -> list[Artifact]:
    # repo.artifacts.read() gives the same, and takes a second to import a package that checks the names
    return [
        Artifact(
            name=name,
            path=entry["path"],
            type=entry.get("type", ""),
            desc=entry.get("desc", ""),
            labels=entry.get("labels", []),
            meta=entry.get("meta", {}),
        )
        for file in repo.index._artifacts.values()  # pyright: ignore[reportPrivateUsage], as said above
        for name, entry in file.items()
    ]
