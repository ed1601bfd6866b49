"""What a run found, gathered from its files: scores of every model, the verdict, the training history, and the lineage."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora.report.notes import note
from longlora.report.scores import Scores, read

NAMES = {
    "base": "base",
    "linear": "linear, untrained",
    "yarn": "YaRN, untrained",
    "ntk": "NTK, untrained",
    "dynamic": "dynamic NTK, untrained",
    "llama3": "Llama 3's scaling, untrained",
    "longrope": "longrope, untrained",
    "s2": "shifted sparse attention",
    "full": "full attention",
    "extended": "extended",
}
"""The pipeline's own models, in the order of tables; any other model goes by its label, before those trained by it."""
MEASURES = {
    "perplexity": ("Perplexity at", "{:#.4g}"),
    "sliding_perplexity": ("Perplexity of sliding windows of", "{:#.4g}"),
    "longppl": ("LongPPL, tokens picked by", "{:#.4g}"),
    "passkey": ("Passkeys found at", "{:.1%}"),
    "needle": ("Needles found at", "{:.1%}"),
    "ruler": ("RULER's tasks solved at", "{:.1%}"),
    "ruler_effective": ("Effective context by RULER's tasks", "{:,.0f}"),
    "longeval_lines": ("LongEval's lines found at", "{:.1%}"),
    "longeval_topics": ("LongEval's topics found at", "{:.1%}"),
    "longqa": ("Questions on documents", "{:.3f}"),
    "longqa_exact": ("Exact matches, documents up to", "{:.3f}"),
    "longqa_f1": ("F1, documents up to", "{:.3f}"),
    "longqa_evidence": ("Evidence found, documents up to", "{:.3f}"),
    "longqa_evidence_floor": ("By the question alone, documents up to", "{:.3f}"),
    "harness": ("lm-evaluation-harness", "{:.4g}"),
}
"""The measures that have a table, in its order: what it is called, and how its numbers are written."""
HELD = 0.8
"""Share of keys that counts as retrieving."""


def written(value: float, form: str) -> str:
    """`value` as its table has it: 3.210 beside 3.217, but no dot behind four whole digits, where `#` leaves one; and 100% where
    all were found, but 79.6% of what asks for 80, and 80.0% of what almost has it."""
    said = form.format(value).rstrip(".")
    return said if round(100 * value, 4) % 1 else said.replace(".0%", "%")


@dataclass(frozen=True)
class Figure:
    """A score with its 95 % interval; None where it is not a number."""

    value: float | None
    low: float | None
    high: float | None


Column = int | str
"""What scores of one measure differ in: mostly the length in tokens."""


@dataclass(frozen=True)
class Cell:
    """A score at one length and depth, and of how many trials."""

    value: float
    trials: int


Cells = dict[int, dict[float, Cell]]
"""By length, then by depth."""


@dataclass(frozen=True)
class Model:
    """One model's scores. What was not scored is empty."""

    label: str
    scores: dict[str, dict[Column, Figure]]
    """By measure and column."""
    depths: Cells
    """Passkeys; the depth is the share of filler before the key."""
    needles: Cells
    questions: Cells
    """F1 of answers, by length of the document and depth of the evidence."""
    positions: dict[int, Figure]
    """Nats per token, by the end of a band of positions."""
    by_yarn: dict[int, Figure]
    """Perplexity over untrained YaRN's at the same places, by length."""

    @property
    def perplexity(self) -> dict[Column, Figure]:
        return self.scores["perplexity"]

    @property
    def passkey(self) -> dict[Column, Figure]:
        return self.scores["passkey"]

    @property
    def name(self) -> str:
        return NAMES.get(self.label, self.label)

    def retrieves_to(self) -> int | None:
        """The longest length at which, and below which, at least 80 % of the keys are found; 0 for none, None where the model was
        not asked."""
        asked = sorted(lengths(self.passkey).items())
        reached = 0 if asked else None
        for length, figure in asked:
            if figure.value is None or figure.value < HELD:
                break
            reached = length
        return reached


@dataclass(frozen=True)
class Table:
    """A measure of the models that it was asked of: its title, how its numbers are written, and the figures by label and column."""

    title: str
    note: str
    """What the scores were made on."""
    form: str
    rows: dict[str, dict[Column, Figure]]

    def columns(self) -> list[Column]:
        """Lengths by size, then names as they come."""
        found = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        return [*sorted(c for c in found if isinstance(c, int)), *(c for c in found if isinstance(c, str))]


@dataclass(frozen=True)
class Findings:
    models: list[Model]
    window: int
    target: int
    prompts: dict[str, str]
    """The prompt that models were asked with, by measure; '' where nothing was asked."""
    notes: dict[str, str]
    """What the scores were made on, by measure."""
    verdict: dict[str, Any]
    history: list[dict[str, float]]
    cost: dict[str, Any]
    """What the training took, as longlora/training/history.py writes it."""
    base: dict[str, Any]
    texts: dict[str, Any]
    pairs: list[dict[str, Any]]
    """Where question-answer pairs came from, if any did."""
    recipe: dict[str, dict[str, Any]]
    forbidden: dict[str, str]
    """Why commercial use is not allowed, or not known to be, by what forbids it (base, texts, pairs); empty where it is."""

    @property
    def extends(self) -> bool:
        """Whether it was trained beyond the base's window, and not tuned inside of it."""
        return self.target > self.window

    @property
    def left_out(self) -> str:
        """Of how many rules the verdict says nothing, to stand behind how many hold; '' for none."""
        return f", {len(self.verdict['not_asked'])} not asked" if self.verdict["not_asked"] else ""

    @property
    def span(self) -> str:
        """What it was trained for, beside what the base reads."""
        if self.extends:
            return f"context {self.window:,} -> {self.target:,} tokens"
        return f"tuned at {self.target:,} of {self.window:,} tokens"

    @property
    def training(self) -> str:
        """What trained it. LongLoRA's name is for adapters and sparse attention together."""
        sparse, adapters = self.recipe["attention"]["pattern"] == "s2", self.recipe["adapter"]["method"] == "lora"
        if sparse and adapters:
            return "LongLoRA (Chen et al., ICLR 2024), adapters trained in shifted sparse attention"
        return f"{'LoRA' if adapters else 'full fine-tuning'} in {'shifted sparse' if sparse else 'full'} attention"

    def model(self, label: str) -> Model:
        """Raises ValueError where no model of that label was scored."""
        for model in self.models:
            if model.label == label:
                return model
        raise ValueError(f"no scores of a model '{label}'; there are {', '.join(m.label for m in self.models)}")

    def tables(self) -> list[Table]:
        """What was scored, model by model, a table per measure."""
        all_tables = [
            Table(
                title,
                self.notes[measure],
                form,
                {m.label: m.scores[measure] for m in self.models if m.scores[measure]},
            )
            for measure, (title, form) in MEASURES.items()
        ]
        return [table for table in all_tables if table.columns()]

    def lengths(self) -> list[int]:
        """Every length at which the perplexity of any model was scored."""
        return sorted({n for m in self.models for n in lengths(m.perplexity)})


def gather(
    scores: Path, *, verdict: Path, history: Path, cost: Path, base: Path, texts: Path, pairs: Path, recipe: Path
) -> Findings:
    """Everything that the report tells; `base`, `texts` and `pairs` are provenance files.

    Raises:
        ValueError: there are no scores, or none of the extended model.
    """
    everything = read(scores)
    tree = everything.tree
    labels = order({name for measure in MEASURES for name in tree.get(measure, {})})
    found = [model(label, everything) for label in labels]
    prompts = {measure: prompt_of(measure, tree) for measure in MEASURES}
    with history.open(newline="") as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    findings = Findings(
        models=found,
        window=int(tree["integrity"]["window"]["value"]),
        target=int(tree["integrity"]["target"]["value"]),
        prompts=prompts,
        notes={measure: note(measure, tree, prompt=prompt) for measure, prompt in prompts.items()},
        verdict=json.loads(verdict.read_text()),
        history=rows,
        cost=json.loads(cost.read_text())["cost"],
        base=json.loads(base.read_text()),
        texts=json.loads(texts.read_text()),
        pairs=json.loads(pairs.read_text())["sources"],
        recipe=json.loads(recipe.read_text()),
        forbidden={what: fact["reason"] for what, fact in tree.get("licence", {}).items() if not fact["value"]},
    )
    findings.model("extended")
    return findings


def order(labels: set[str]) -> list[str]:
    """The untrained baselines, then others by name, then the retrained ones, then the model in question."""
    known = list(NAMES)
    others = known.index("s2") - 0.5
    return sorted(labels, key=lambda label: (known.index(label) if label in known else others, label))


def model(label: str, everything: Scores) -> Model:
    def of(measure: str) -> dict[str, Any]:
        return everything.tree.get(measure, {}).get(label, {})

    scores = {measure: figures(of(measure)) for measure in MEASURES}
    scores["ruler_effective"] = effective(of("ruler"))
    return Model(
        label=label,
        scores=scores,
        depths=cells(of("passkey")),
        needles=cells(of("needle")),
        questions=cells(of("longqa_f1")),
        positions=lengths(figures(of("position_nats"))),
        by_yarn={
            length: Figure(*(end if math.isfinite(end) else None for end in ratio))
            for length in lengths(scores["perplexity"])
            if (ratio := everything.ratio([f"perplexity/{label}/{length}"], [f"perplexity/yarn/{length}"]))
        },
    )


def prompt_of(measure: str, tree: dict[str, Any]) -> str:
    """Parts of a measure (longqa_f1) have its prompt; a floor is found without a model."""
    whole = "" if measure.endswith("_floor") else measure.split("_")[0]
    nodes = [node for name in (measure, whole) for node in tree.get(name, {}).values()]
    return next((str(node["prompt"]) for node in nodes if "prompt" in node), "")


def figures(node: dict[str, Any]) -> dict[Column, Figure]:
    """The scores by column, lengths first; one level down where there are tasks with metrics. The other entries of `node` say
    how they were made."""
    found: dict[Column, Figure] = {}
    for name, entry in sorted(node.items(), key=lambda item: item[0].zfill(12) if item[0].isdigit() else "~"):
        if not isinstance(entry, dict):
            continue
        if entry.keys() >= {"value", "low", "high"}:
            found[int(name) if name.isdigit() else name] = Figure(entry["value"], entry["low"], entry["high"])
        elif "value" not in entry:
            found |= {f"{name} {metric}": figure for metric, figure in figures(entry).items()}
    return found


def effective(node: dict[str, Any]) -> dict[Column, Figure]:
    """The longest length at which RULER's threshold is reached: it follows from scores, and so has no interval of its own."""
    return {"tokens": Figure(node["effective"]["value"], None, None)} if node else {}


def cells(node: dict[str, Any]) -> Cells:
    """The scores by length and depth; a length that was not scored by depth is left out."""
    return {
        int(length): {float(depth): Cell(cell["value"], cell["trials"]) for depth, cell in entry["depth"].items()}
        for length, entry in node.items()
        if length.isdigit() and entry["depth"]
    }


def lengths(scores: dict[Column, Figure]) -> dict[int, Figure]:
    """The scores whose column is a length."""
    return {column: figure for column, figure in scores.items() if isinstance(column, int)}


def heading(column: Column) -> str:
    return f"{column:,}" if isinstance(column, int) else column


def named(names: list[str], *, most: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
