"""What a run found, gathered from its files: scores of every model, the verdict, the training history, and the lineage."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora.gate import read

NAMES = {
    "base": "base",
    "linear": "linear, untrained",
    "yarn": "YaRN, untrained",
    "extended": "extended",
}
"""The pipeline's own models, in the order of tables; any other model goes by its label, before the extended one."""
HELD = 0.8
"""Share of keys that counts as retrieving."""


@dataclass(frozen=True)
class Figure:
    """A score with its 95 % interval; None where it is not a number."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Model:
    """One model's scores, by length in tokens; `depths` by length and depth (the share of filler before the key). What was
    not scored is empty."""

    label: str
    perplexity: dict[int, Figure]
    passkey: dict[int, Figure]
    depths: dict[int, dict[float, float]]
    ruler: dict[int, Figure]

    @property
    def name(self) -> str:
        return NAMES.get(self.label, self.label)

    def retrieves_to(self) -> int:
        """The longest length at which, and below which, at least 80 % of the keys are found; 0 for none."""
        reached = 0
        for length, figure in sorted(self.passkey.items()):
            if figure.value is None or figure.value < HELD:
                break
            reached = length
        return reached


@dataclass(frozen=True)
class Table:
    """A measure of all models: its title, how its numbers are written, and the figures by label and length."""

    title: str
    form: str
    rows: dict[str, dict[int, Figure]]

    def lengths(self) -> list[int]:
        return sorted({n for row in self.rows.values() for n in row})


@dataclass(frozen=True)
class Findings:
    models: list[Model]
    window: int
    target: int
    prompt: str
    verdict: dict[str, Any]
    history: list[dict[str, float]]
    base: dict[str, Any]
    texts: dict[str, Any]
    recipe: dict[str, dict[str, Any]]
    forbidden: list[str]
    """Why commercial use is not allowed, or not known to be; empty where it is."""

    def model(self, label: str) -> Model:
        """Raises ValueError where no model of that label was scored."""
        for model in self.models:
            if model.label == label:
                return model
        raise ValueError(f"no scores of a model '{label}'; there are {', '.join(m.label for m in self.models)}")

    def tables(self) -> list[Table]:
        """What was scored, model by model: perplexity, passkeys, and RULER where it was asked."""
        measures = (
            Table("Perplexity at", "{:.4g}", {m.label: m.perplexity for m in self.models}),
            Table("Passkeys found at", "{:.0%}", {m.label: m.passkey for m in self.models}),
            Table("RULER's tasks solved at", "{:.0%}", {m.label: m.ruler for m in self.models}),
        )
        return [table for table in measures if table.lengths()]

    def lengths(self) -> list[int]:
        """Every length at which the perplexity of any model was scored."""
        return sorted({n for m in self.models for n in m.perplexity})


def gather(scores: Path, *, verdict: Path, history: Path, base: Path, texts: Path, recipe: Path) -> Findings:
    """Everything that the report tells; `base` and `texts` are provenance files.

    Raises:
        ValueError: there are no scores, or none of the extended model.
    """
    tree = read(scores).tree
    found = [
        model(label, tree)
        for label in order({name for measure in ("perplexity", "passkey", "ruler") for name in tree.get(measure, {})})
    ]
    with history.open(newline="") as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    findings = Findings(
        models=found,
        window=int(tree["integrity"]["window"]["value"]),
        target=int(tree["integrity"]["target"]["value"]),
        prompt=next((scored["prompt"] for scored in tree.get("passkey", {}).values()), ""),
        verdict=json.loads(verdict.read_text()),
        history=rows,
        base=json.loads(base.read_text()),
        texts=json.loads(texts.read_text()),
        recipe=json.loads(recipe.read_text()),
        forbidden=[fact["reason"] for fact in tree.get("licence", {}).values() if not fact["value"]],
    )
    findings.model("extended")
    return findings


def order(labels: set[str]) -> list[str]:
    """The baselines, then others by name, then the model in question."""
    known = list(NAMES)
    return sorted(labels, key=lambda label: (known.index(label) if label in known else len(known) - 1.5, label))


def model(label: str, tree: dict[str, Any]) -> Model:
    passkey = tree.get("passkey", {}).get(label, {})
    return Model(
        label=label,
        perplexity=figures(tree.get("perplexity", {}).get(label, {})),
        passkey=figures(passkey),
        depths={
            int(length): {float(depth): cell["value"] for depth, cell in node["depth"].items()}
            for length, node in passkey.items()
            if length.isdigit()
        },
        ruler=figures(tree.get("ruler", {}).get(label, {})),
    )


def figures(node: dict[str, Any]) -> dict[int, Figure]:
    """The scores by length; the other entries of `node` say how they were made."""
    return {
        int(length): Figure(figure["value"], figure["low"], figure["high"])
        for length, figure in sorted(node.items(), key=lambda item: item[0].zfill(12))
        if length.isdigit()
    }


def named(names: list[str], *, most: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
