"""The run's page: one HTML file with everything inside it, verdict first, to be mailed or shown around."""

import base64
from html import escape
from pathlib import Path

from longlora.report.findings import MEASURES, Figure, Findings, Model, Table, heading, named, written
from longlora.report.style import colour

NOT_SCORED = "&ndash;"
WHOLE = 0.95
"""Share of the steps that counts as all of them: time and pace are rounded, which is more only for a training of a second."""
STYLE = """
:root { --ink: #1f2933; --faint: #6b7785; --rule: #e3e7eb; --good: #1f7a4d; --bad: #b3382c; --ours: #0b6bb0; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f5f7; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
header h1 { margin: 0 0 4px; font-size: 30px; letter-spacing: -.01em; }
header p { margin: 0; color: var(--faint); }
section { background: white; border: 1px solid var(--rule); border-radius: 10px; padding: 24px 28px; margin-top: 20px; }
h2 { margin: 0 0 12px; font-size: 18px; }
.verdict { border-left: 6px solid var(--good); }
.verdict.refused { border-left-color: var(--bad); }
.verdict h2 { font-size: 22px; margin: 0; color: var(--good); }
.verdict.refused h2 { color: var(--bad); }
.verdict p { margin: 4px 0 0; color: var(--faint); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 20px; margin-top: 20px; }
.figures div { background: white; border: 1px solid var(--rule); border-radius: 10px; padding: 18px 22px; }
.figures strong { display: block; font-size: 30px; line-height: 1.2; font-weight: 650; color: var(--ours); }
.figures span { color: var(--faint); font-size: 14px; }
.picture { padding: 12px 14px; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 10px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--faint); font-weight: 500; font-size: 14px; }
tr:last-child td { border-bottom: 0; }
.scores td:not(:first-child), .scores th:not(:first-child) { text-align: right; padding-right: 0; padding-left: 16px; }
.scores small { display: block; color: var(--faint); font-size: 12px; white-space: nowrap; }
.scores caption { text-align: left; color: var(--faint); font-size: 13px; }
.scores .ours td { font-weight: 650; }
.scores .ours small { font-weight: 400; }
.scores td:first-child { white-space: nowrap; }
.scores th { width: calc(68% / var(--columns)); } /* so that the same lengths stand below each other */
.scores th:first-child { width: 32%; }
.scroll + .scroll { margin-top: 22px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
.mark { white-space: nowrap; font-weight: 600; width: 86px; }
.passed .mark { color: var(--good); }
.refused .mark { color: var(--bad); }
.rules small { display: block; color: var(--faint); font-size: 13px; overflow-wrap: anywhere; }
.plain td { overflow-wrap: anywhere; }
.plain td:first-child { color: var(--faint); width: 230px; }
.scroll { overflow-x: auto; background: linear-gradient(to left, white 40%, #fff0) right / 48px 100% no-repeat local,
  linear-gradient(to left, #1f293326, #1f293300) right / 12px 100% no-repeat scroll; }
@media (max-width: 640px) {
  main { padding: 20px 12px 40px; }
  header h1 { font-size: 24px; }
  section { padding: 16px; margin-top: 14px; }
  .figures { grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 14px; }
  .figures div { padding: 12px 14px; }
  .figures strong { font-size: 24px; }
  .picture { padding: 6px; overflow-x: auto; }
  .picture::before { content: "swipe \\2192"; position: sticky; left: 0; display: block; width: 6em; padding: 4px 10px 0;
    color: var(--faint); font-size: 12px; }
  .picture img { width: 680px; }
  .scores td:first-child, .scores th:first-child { position: sticky; left: 0; background: white; }
  .mark { width: 56px; }
  .plain td:first-child { width: 104px; }
}
@media print { body { background: white; } section, .figures div { break-inside: avoid; } }
"""


def page(findings: Findings, *, pictures: Path, recipe: list[tuple[str, str]]) -> str:
    """The page; the pictures are read from the folder `pictures`."""
    name = escape(findings.base["name"])
    title = f"{name}: {findings.span.replace('->', '&rarr;')}"
    made = f"{'Extended' if findings.extends else 'Tuned'} by {escape(findings.training)}"
    others = [model.name for model in findings.models if model.label != "extended"]
    measured = f"; measured beside: {escape('; '.join(others))}" if others else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p>{made}{measured}</p></header>
{verdict(findings)}
{figures(findings)}
{perhaps(pictures / "perplexity.png", "Perplexity by context length, a line per model")}
{perhaps(pictures / "passkey.png", "Passkeys found by length and depth, a map per model")}
{perhaps(pictures / "by_yarn.png", "Perplexity relative to untrained YaRN over the same tokens, with intervals")}
{perhaps(pictures / "needle.png", "Needles found by length and depth, a map per model")}
{perhaps(pictures / "positions.png", "Nats per token by position in the context, a line per model")}
{perhaps(pictures / "questions.png", "F1 of answers by length of the document and depth of the evidence, a map per model")}
<section><h2>Scores</h2>{scores(findings)}</section>
<section><h2>The gate's rules</h2>{rules(findings)}</section>
<section class="picture">{picture(pictures / "history.png", "Training loss by step")}</section>
<section><h2>Recipe</h2>{plain(recipe)}</section>
<section><h2>Cost of the training</h2>{plain(cost(findings))}</section>
<section><h2>Lineage</h2>{plain(lineage(findings))}</section>
</main>
</body>
</html>
"""


def verdict(findings: Findings) -> str:
    rules_ = findings.verdict["rules"]
    refused = [rule["name"] for rule in rules_ if not rule["passed"]]
    if not refused:
        said = f"All {len(rules_)} rules of the gate hold{findings.left_out}."
        return f'<section class="verdict"><h2>Passed</h2><p>{said}</p></section>'
    do = "does" if len(refused) == 1 else "do"
    said = f"{len(refused)} of {len(rules_)} rules of the gate {do} not hold{findings.left_out}."
    reasons = escape("; ".join(refused))
    return f'<section class="verdict refused"><h2>Refused</h2><p>{said} Not so: {reasons}.</p></section>'


def figures(findings: Findings) -> str:
    """The three numbers that matter, each beside what it has to be compared with."""
    ours, target = findings.model("extended"), findings.target
    cards = [
        (f"{target / findings.window:.3g}&times;", f"the context: {findings.window:,} to {target:,} tokens")
        if findings.extends
        else (f"{target:,}", f"tokens of context in training; the base reads {findings.window:,}"),
        (
            number(ours.perplexity.get(target), MEASURES["perplexity"][1]),
            f"perplexity at {target:,} tokens{beside(findings, 'perplexity')}",
        ),
        (
            number(ours.passkey.get(target), MEASURES["passkey"][1]),
            f"of passkeys found at {target:,} tokens{beside(findings, 'passkey')}",
        ),
        (
            reached(ours),
            "tokens to which it retrieves 80% or more"
            + "".join(f"; {escape(base.name)} {reached(base)}" for base in others(findings)[:1]),
        ),
    ]
    return (
        '<div class="figures">'
        + "".join(f"<div><strong>{n}</strong><span>{t}</span></div>" for n, t in cards)
        + "</div>"
    )


def others(findings: Findings) -> list[Model]:
    """The models that ours is compared with, the base first if it was asked."""
    return [m for m in findings.models if m.label != "extended"]


def beside(findings: Findings, measure: str) -> str:
    """The scores at the target length that ours has to be compared with: the base's, and untrained YaRN's where it was measured;
    '' where no other model was."""
    rivals = {m.label: "untrained YaRN" if m.label == "yarn" else m.name for m in others(findings)}
    labels = dict.fromkeys([*list(rivals)[:1], *(["yarn"] if "yarn" in rivals else [])])
    scores = {label: findings.model(label).scores[measure].get(findings.target) for label in labels}
    told = [f"{escape(rivals[label])} {number(score, MEASURES[measure][1])}" for label, score in scores.items()]
    return f"; {', '.join(told)}" if told else ""


def reached(model: Model) -> str:
    length = model.retrieves_to()
    return NOT_SCORED if length is None else f"{length:,}"


def number(figure: Figure | None, form: str) -> str:
    return NOT_SCORED if figure is None else "NaN" if figure.value is None else written(figure.value, form)


def perhaps(file: Path, text: str) -> str:
    """The picture, where it was drawn."""
    return f'<section class="picture">{picture(file, text)}</section>' if file.exists() else ""


def picture(file: Path, text: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def scores(findings: Findings) -> str:
    """Every table, with 95 % intervals."""
    return "".join(scored(findings, table) for table in findings.tables())


def scored(findings: Findings, table: Table) -> str:
    columns = table.columns()
    head = "".join(f"<th>{escape(heading(c))}</th>" for c in columns)
    asked = [m for m in findings.models if m.label in table.rows]
    body = "".join(line(m, [cell(table.rows[m.label].get(c), table.form) for c in columns], findings) for m in asked)
    caption = f"<caption>{escape(table.note)}</caption>" if table.note else ""
    return (
        f'<div class="scroll" style="--columns: {len(columns)}"><table class="scores">{caption}'
        f"<tr><th>{escape(table.title)}</th>{head}</tr>{body}</table></div>"
    )


def line(model: Model, cells: list[str], findings: Findings) -> str:
    hue = colour(model.label, [m.label for m in findings.models])
    dot = f'<span class="dot" style="background: {hue}"></span>'
    kind = ' class="ours"' if model.label == "extended" else ""
    return f"<tr{kind}><td>{dot}{escape(model.name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def cell(figure: Figure | None, form: str) -> str:
    if figure is None or figure.value is None or figure.low is None or figure.high is None:
        return number(figure, form)
    value, low, high = (written(end, form) for end in (figure.value, figure.low, figure.high))
    return f"{value}<small>{low} &ndash; {high}</small>"


def rules(findings: Findings) -> str:
    rows = "".join(
        f'<tr class="{"passed" if rule["passed"] else "refused"}"><td class="mark">{"holds" if rule["passed"] else "fails"}</td>'
        f"<td>{escape(rule['name'])}<small>{escape(rule['reason'])}</small></td></tr>"
        for rule in findings.verdict["rules"]
    )
    rows += "".join(
        f'<tr><td class="mark">not asked</td><td>{escape(rule["name"])}<small>{escape(rule["why"])}</small></td></tr>'
        for rule in findings.verdict["not_asked"]
    )
    return f'<table class="rules">{rows}</table>'


def plain(rows: list[tuple[str, str]]) -> str:
    return (
        '<table class="plain">'
        + "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
        + "</table>"
    )


def cost(findings: Findings) -> list[tuple[str, str]]:
    """What the training took, and of what; of a training that was resumed, what it took since then."""
    spent, fit, context = findings.cost, findings.recipe["fit"], findings.recipe["position"]["context"]
    tokens = spent["tokens_per_second"] * spent["seconds"]
    share = tokens / (fit["steps"] * fit["global_batch_size"] * context)
    since = f", for the last {share:.0%} of the steps: it was resumed" if share < WHOLE else ""
    energy = [(kind, spent.get(f"{kind}_energy_wh")) for kind in ("cpu", "gpu")]
    counted = [
        f"{used:,.{0 if used >= 100 else 2}f} Wh of the {kind.upper()}s" for kind, used in energy if used is not None
    ]
    return [
        ("time", duration(spent["seconds"]) + since),
        ("tokens per second", f"{spent['tokens_per_second']:,.0f}"),
        ("peak memory", f"{spent['peak_memory_gb']:,.3g} GB in the first process"),
        ("trained parameters", f"{spent['trainable_parameters']:,}"),
        ("energy", ", ".join(counted) or str(spent.get("energy", "not measured"))),
    ]


def duration(seconds: float) -> str:
    """48 s, 3 min 12 s, 5 h 40 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def lineage(findings: Findings) -> list[tuple[str, str]]:
    base, texts = findings.base, findings.texts
    return [
        ("base", f"{base['name']} ({base['source']})"),
        ("revision", str(base["revision"] or "not pinned")),
        ("weights, sha256", named(list(base["sha256"].values()), most=2)),
        ("licence of the base", base["license"]),
        ("texts", f"{texts['name']} ({texts['source']})"),
        ("licence of the texts", texts["license"]),
        *(("pairs", f"{each['name']} ({each['source']}), licence {each['license']}") for each in findings.pairs),
        ("held out", named(texts["held_out"], most=12)),
    ]
