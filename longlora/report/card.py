"""The model card: what the model is, where it comes from, its recipe, results and limits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from longlora.model.licence import FORBIDDING, HUB, identifier
from longlora.report.findings import HELD, Findings, lengths, named
from longlora.report.summary import refusals, tables

PASSKEY_WORDS = ", the passkey prompt's own words among them"


def card(findings: Findings, *, weights: str = "", pictures: Path = Path()) -> str:
    """The model card in the model hub's format: front matter, then what the model is, its recipe, results and limits.

    `weights` is the folder that holds them, if it is not the card's own; `pictures` that of the pictures.
    """
    findings = replace(
        findings,
        base=without_folders(findings.base),
        texts=without_folders(findings.texts),
        pairs=[without_folders(each) for each in findings.pairs],
    )
    head = OmegaConf.to_yaml(OmegaConf.create(front_matter(findings)))
    base, texts = findings.base, findings.texts
    rules = len(findings.verdict["rules"])  # fewer than those that ship, where a recipe replaced them
    verdict = (
        f"It passed all {rules} rules of the gate{findings.left_out}."
        if findings.verdict["passed"]
        else "**The gate refused it:**"
    )
    lines = [
        f"---\n{head}---",
        "",
        f"# {base['name']}, {findings.span}",
        "",
        f"The base model `{base['name']}`{' with its context extended' if findings.extends else ', fine-tuned'} by "
        f"{findings.training}: an ordinary model of its architecture. Inference uses full attention and needs no code beyond "
        "transformers. " + (f"Its weights are in [{weights}]({weights}). " if weights else "") + verdict,
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
        *(f"| {name} | {value} |" for name, value in recipe_of(findings)),
        "",
        "## Results",
        "",
        how_measured(findings),
        "",
        *tables(findings),
        "",
        *shown(findings, pictures),
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits(findings)),
        "",
    ]
    return "\n".join(lines)


def without_folders(provenance: dict[str, Any]) -> dict[str, Any]:
    """As it is, but of an absolute path the last part: a card goes where the machine's folders are nobody's business."""
    given = {key: str(provenance[key]) for key in ("name", "held_out_of") if key in provenance}
    short = {key: Path(name).name for key, name in given.items() if name.startswith(("/", "~"))}
    apart = provenance.get("held_out", [])
    for key, name in short.items():  # documents of another source have its name before their own
        apart = [document.replace(f"{given[key]}: ", f"{name}: ", 1) for document in apart]
    return provenance | short | ({"held_out": apart} if apart else {})


def how_measured(findings: Findings) -> str:
    said = []
    if findings.lengths():
        said.append(
            "perplexity is of the same last tokens of held-out documents while only the window before them grows"
        )
    if any(m.passkey for m in findings.models):
        said.append(f"passkeys are answered greedily and exactly ({findings.prompts['passkey']} prompt)")
    both = f"{'; '.join(said)}. " if said else ""
    return f"{both[:1].upper()}{both[1:]}Full attention throughout."


def shown(findings: Findings, pictures: Path) -> list[str]:
    """The pictures that there are (longlora/report/pictures.py), of the measures that the card speaks of."""
    there = [
        ("Perplexity by context length", "perplexity.png", bool(findings.lengths())),
        ("Passkey retrieval by length and depth", "passkey.png", any(m.depths for m in findings.models)),
        ("Needles in held-out text by length and depth", "needle.png", any(m.needles for m in findings.models)),
    ]
    return [line for title, name, drawn in there if drawn for line in (f"![{title}]({pictures / name})", "")]


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


def recipe_of(findings: Findings) -> list[tuple[str, str]]:
    """The recipe in a few lines: what, and how much."""
    position, attention, adapter, fit = (findings.recipe[part] for part in ("position", "attention", "adapter", "fit"))
    b_matrices = (
        "" if fit["loraplus_lr_ratio"] == 1 else f", {fit['loraplus_lr_ratio']:g} times as much for the B matrices"
    )
    four_bits = f", the frozen linear layers in {adapter['quantized']}" if adapter["quantized"] else ""
    return [
        ("position", f"{position['method']}, {findings.span}"),
        *attended(attention),
        ("trained", trained(adapter)),
        ("steps", f"{fit['steps']:,} of {fit['global_batch_size']:,} x {position['context']:,} tokens"),
        ("of these, recall exercises", f"{fit['recall_share']:.0%}{PASSKEY_WORDS if knows_passkey(findings) else ''}"),
        *pairs(fit),
        *noise(fit),
        (
            "learning rate",
            f"{fit['learning_rate']:g}{b_matrices}, {fit['lr_scheduler_type'].replace('_', ' ')} ({fit['warmup_steps']} steps)",
        ),
        ("precision", f"{fit['dtype']}{four_bits}"),
        ("seed", str(fit["seed"])),
    ]


def attended(attention: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows about attention while training; an end in full attention is one where the rest was not."""
    if attention["pattern"] == "full":
        return [("attention in training", "full")]
    sparse = f"shifted sparse (S2-Attn, {attention['shift']}), groups of {attention['group_ratio']:g} of the context"
    return [
        ("attention in training", sparse),
        ("full attention at the end", f"last {attention['full_attention_last']:.0%} of the steps"),
    ]


def knows_passkey(findings: Findings) -> bool:
    """Whether the words that passkeys are asked in were trained on."""
    return bool(findings.texts["passkey_words"] and findings.recipe["fit"]["recall_share"])


def noise(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """The row about NEFTune, where it was on."""
    alpha = fit["neftune_noise_alpha"]
    return [("noise on the embeddings (NEFTune)", f"{alpha:g}")] if alpha else []


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
    return [
        *retrieval(findings),
        "Scores come from few documents and seeded prompts; their intervals are in the run's score files.",
        "Everything the base does wrong, this model may do wrong as well; it was not aligned or filtered further.",
        *(f"**Commercial use is not cleared**: {reason}." for reason in findings.forbidden.values()),
        "Use is bound by the licences of the base and of all training data, as they stand above.",
    ]


def retrieval(findings: Findings) -> list[str]:
    """What passkeys show of the model, beside the base where that was asked, and what they do not."""
    weak = "Independent studies found LongLoRA models weak at retrieval whose perplexity looked fine"
    model, first = findings.model("extended"), findings.models[0]
    ours = model.retrieves_to()
    if ours is None:
        return [f"It was not asked for passkeys. {weak}."]
    if ours:
        said = f"{HELD:.0%} of the passkeys or more are found up to {ours:,} tokens"
    else:
        said = f"Fewer than {HELD:.0%} of the passkeys are found at {min(lengths(model.passkey)):,} tokens, the shortest asked"
    base = first.retrieves_to() if first.label == "base" else None
    beside = "" if base is None else f"; the base reaches {base:,}"
    words = (
        "The passkey prompt's own words were trained on, with other keys: passkeys do not show retrieval in new words."
    )
    return [
        f"{said}{beside}. Retrieval of one key is the easiest of long-context tasks: it says "
        "little about aggregation, reasoning over many places, or questions in other words.",
        *([words] if knows_passkey(findings) else []),
        f"{weak}, so look at both tables.",
    ]


def revision(provenance: dict[str, Any]) -> str:
    return f", revision {provenance['revision']}" if provenance["revision"] else ""
