"""A run in a few lines of Markdown: the verdict, and a table per measure."""

from longlora.report.findings import Figure, Findings, Table, heading, written


def summary(findings: Findings) -> str:
    """The verdict, what was refused and why, and a table per measure, in Markdown."""
    return "\n".join([f"**{headline(findings)}**", "", *refusals(findings), *tables(findings), ""])


def headline(findings: Findings) -> str:
    rules = findings.verdict["rules"]
    held = sum(rule["passed"] for rule in rules)
    word = "passed" if findings.verdict["passed"] else "refused"
    hold = "holds" if held == 1 else "hold"
    return f"{findings.span.capitalize()}: {word}, {held} of {len(rules)} rules {hold}{findings.left_out}"


def refusals(findings: Findings) -> list[str]:
    """What does not hold, and what was not asked, with the reasons."""
    lines = [
        f"- **not so: {rule['name']}.** {rule['reason']}" for rule in findings.verdict["rules"] if not rule["passed"]
    ]
    lines += [f"- not asked: {rule['name']}. {rule['why']}" for rule in findings.verdict["not_asked"]]
    return [*lines, ""] if lines else []


def tables(findings: Findings) -> list[str]:
    return [line for table in findings.tables() for line in (*rows(findings, table), "")][:-1]


def rows(findings: Findings, table: Table) -> list[str]:
    """A row per model, a column per length (or what else a measure has); the extended model's row is bold. Above, what it is of."""
    columns = table.columns()
    lines = [
        *([f"{table.note[0].upper()}{table.note[1:]}", ""] if table.note else []),
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
    return "not a number" if figure.value is None else written(figure.value, form)
