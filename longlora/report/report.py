"""The report of a run: a summary for the terminal, pictures, a page to show around, and the model card.

The same findings give the same bytes. What differs between two equal runs (times, memory) is on the page alone.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from longlora.model.licence import FORBIDDING, HUB, identifier
from longlora.report.findings import HELD, Figure, Findings, Table, heading, named
from longlora.report.page import page
from longlora.report.pictures import draw

PASSKEY_WORDS = ", the passkey prompt's own words among them"


def write(findings: Findings, *, out: Path) -> None:
    """Write summary.md, README.md (the model card), the pictures and index.html to the new folder `out`."""
    out.mkdir(parents=True)
    draw(findings, out=out)
    (out / "summary.md").write_text(summary(findings))
    (out / "README.md").write_text(card(findings))
    (out / "index.html").write_text(page(findings, pictures=out, recipe=recipe(findings)))


def summary(findings: Findings) -> str:
    """The verdict and two small tables, in Markdown."""
    return "\n".join([f"**{headline(findings)}**", "", *refusals(findings), *tables(findings), ""])


def headline(findings: Findings) -> str:
    rules = findings.verdict["rules"]
    held = sum(rule["passed"] for rule in rules)
    word = "passed" if findings.verdict["passed"] else "refused"
    return f"Context {findings.window:,} -> {findings.target:,} tokens: {word}, {held} of {len(rules)} rules hold"


def refusals(findings: Findings) -> list[str]:
    lines = [
        f"- **not so: {rule['name']}.** {rule['reason']}" for rule in findings.verdict["rules"] if not rule["passed"]
    ]
    return [*lines, ""] if lines else []


def tables(findings: Findings) -> list[str]:
    return [line for table in findings.tables() for line in (*rows(findings, table), "")][:-1]


def rows(findings: Findings, table: Table) -> list[str]:
    """A row per model, a column per length (or what else a measure has); the extended model's row is bold. Above, the prompt."""
    columns = table.columns()
    lines = [
        *([f"Prompt: {table.prompt}", ""] if table.prompt else []),
        f"| {table.title} | " + " | ".join(map(heading, columns)) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for model in (m for m in findings.models if m.label in table.rows):
        cells = [model.name, *(shown(table.rows[model.label].get(c), table.form) for c in columns)]
        bold = "**" if model.label == "extended" else ""
        lines.append("| " + " | ".join(f"{bold}{cell}{bold}" for cell in cells) + " |")
    return lines


def shown(figure: Figure | None, form: str) -> str:
    if figure is None:
        return "-"
    return "not a number" if figure.value is None else form.format(figure.value)


def card(findings: Findings) -> str:
    """The model card in the model hub's format: front matter, then what the model is, its recipe, results and limits."""
    head = OmegaConf.to_yaml(OmegaConf.create(front_matter(findings)))
    base, texts = findings.base, findings.texts
    verdict = "It passed every rule of the gate." if findings.verdict["passed"] else "**The gate refused it:**"
    lines = [
        f"---\n{head}---",
        "",
        f"# {base['name']}, context {findings.window:,} -> {findings.target:,} tokens",
        "",
        f"The base model `{base['name']}` with its context extended by LongLoRA (Chen et al., ICLR 2024): fine-tuned with shifted "
        "sparse attention, merged, and an ordinary model of its architecture again. Inference uses full attention and needs no "
        "code beyond transformers. " + verdict,
        "",
        *refusals(findings),
        "## Lineage and licences",
        "",
        "| | what | licence |",
        "| --- | --- | --- |",
        f"| base | `{base['name']}` ({base['source']}{revision(base)}) | {base['license']} |",
        f"| training texts | `{texts['name']}` ({texts['source']}) | {texts['license']} |",
        *(f"| training pairs | `{p['name']}` ({p['source']}) | {p['license']} |" for p in findings.pairs),
        "",
        "Weights of the base, sha256: "
        + ", ".join(f"`{name}` {digest}" for name, digest in sorted(base["sha256"].items())),
        "",
        f"Held out from training and used for the scores below, of `{texts['held_out_of']}`: {named(texts['held_out'], most=8)}.",
        "",
        "## Recipe",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in recipe(findings)),
        "",
        "## Results",
        "",
        "Perplexity is of the same last tokens of held-out documents while only the window before them grows; passkeys are "
        f"answered greedily and exactly ({findings.prompts['passkey']} prompt). Full attention throughout.",
        "",
        *tables(findings),
        "",
        "![Perplexity by context length](perplexity.png)",
        "",
        "![Passkey retrieval by length and depth](passkey.png)",
        "",
        *(
            ["![Needles in held-out text by length and depth](needle.png)", ""]
            if any(m.needles for m in findings.models)
            else []
        ),
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits(findings)),
        "",
    ]
    return "\n".join(lines)


def front_matter(findings: Findings) -> dict[str, Any]:
    """What the model hub reads. A base or data set is linked only where it is the hub's own."""
    base, data = findings.base, [findings.texts, *findings.pairs]
    datasets = [each["name"] for each in data if each["source"] == "hub"]
    return {
        **licence(findings),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base["name"]} if base["source"] == "hub" else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["long-context", "longlora", *(["non-commercial"] if findings.forbidden else [])],
        "model-index": [{"name": f"{Path(base['name']).name}-{findings.target}", "results": results(findings)}],
    }


def licence(findings: Findings) -> dict[str, str]:
    """The base's, unless what was trained on forbids more than it does: the hub's filters read nothing else."""
    if findings.forbidden.keys() - {"base"}:
        stated = [each["license"] for each in (findings.base, findings.texts, *findings.pairs)]
        return {"license": "other", "license_name": " AND ".join(dict.fromkeys(stated)), "license_link": "README.md"}
    return hub_licence(findings.base["license"])


def hub_licence(stated: str) -> dict[str, str]:
    """As the hub calls it; one that it does not know is `other`, with its own name beside it."""
    name = identifier(stated)
    return {"license": name} if name in HUB | FORBIDDING else {"license": "other", "license_name": stated}


def results(findings: Findings) -> list[dict[str, Any]]:
    """The extended model's scores as the hub's model index holds them."""
    ours = findings.model("extended")
    kinds = (("perplexity", findings.texts["held_out_of"], ours.perplexity), ("accuracy", "passkey", ours.passkey))
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{data} at {length} tokens", "type": data},
            "metrics": [{"type": kind, "value": figure.value}],
        }
        for kind, data, by_length in kinds
        for length, figure in by_length.items()
        if figure.value is not None
    ]


def recipe(findings: Findings) -> list[tuple[str, str]]:
    """The recipe in a few lines: what, and how much."""
    position, attention, adapter, fit = (findings.recipe[part] for part in ("position", "attention", "adapter", "fit"))
    pattern = {"s2": f"shifted sparse (S2-Attn, {attention['shift']})", "full": "full"}.get(
        attention["pattern"], str(attention["pattern"])
    )
    sparse = attention["pattern"] != "full"
    return [
        ("position", f"{position['method']}, {findings.window:,} -> {position['context']:,} tokens"),
        (
            "attention in training",
            pattern + (f", groups of {attention['group_ratio']:g} of the context" if sparse else ""),
        ),
        ("full attention at the end", f"last {attention['full_attention_last']:.0%} of the steps"),
        ("trained", trained(adapter)),
        ("steps", f"{fit['steps']:,} of {fit['global_batch_size']:,} x {position['context']:,} tokens"),
        ("of these, recall exercises", f"{fit['recall_share']:.0%}{PASSKEY_WORDS if knows_passkey(findings) else ''}"),
        *pairs(fit),
        (
            "learning rate",
            f"{fit['learning_rate']:g}, {fit['lr_scheduler_type'].replace('_', ' ')} ({fit['warmup_steps']} steps)",
        ),
        ("precision", str(fit["dtype"])),
        ("seed", str(fit["seed"])),
    ]


def knows_passkey(findings: Findings) -> bool:
    """Whether the words that passkeys are asked in were trained on."""
    return bool(findings.texts["passkey_words"] and findings.recipe["fit"]["recall_share"])


def pairs(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """The row about supervised fine-tuning, where there was some."""
    share = fit["pairs_share"]
    return [("of these, questions with answers", f"{share:.0%}, loss on the answers alone")] if share else []


def trained(adapter: dict[str, Any]) -> str:
    if adapter["method"] == "full":
        return "every weight"
    whole = "".join(f", all {kind}" for kind in adapter["trainable"])
    return (
        f"LoRA of rank {adapter['rank']} (alpha {adapter['alpha']:g}) on {', '.join(adapter['target_modules'])}{whole}"
    )


def limits(findings: Findings) -> list[str]:
    """What the scores do not show, and what they show against the model."""
    ours, base = findings.model("extended"), findings.models[0]
    reached = ours.retrieves_to()
    said = (
        f"{HELD:.0%} of the passkeys or more are found up to {reached:,} tokens"
        if reached
        else "passkeys are not found"
    )
    return [
        f"{said}; the base reaches {base.retrieves_to():,}. Retrieval of one key is the easiest of long-context tasks: it says "
        "little about aggregation, reasoning over many places, or questions in other words.",
        *(
            [
                "The passkey prompt's own words were trained on, with other keys: passkeys do not show retrieval in new words."
            ]
            if knows_passkey(findings)
            else []
        ),
        "Independent studies found LongLoRA models weak at retrieval whose perplexity looked fine, so look at both tables.",
        "Scores come from few documents and seeded prompts; their intervals are in the run's score files.",
        "Everything the base does wrong, this model may do wrong as well; it was not aligned or filtered further.",
        *(f"**Commercial use is not cleared**: {reason}." for reason in findings.forbidden.values()),
        "Use is bound by the licences of the base and of all training data, as they stand above.",
    ]


def revision(provenance: dict[str, Any]) -> str:
    return f", revision {provenance['revision']}" if provenance["revision"] else ""
