"""What the scores of a measure were made on, in a line above their table: the prompt, how many trials of what, and what was left
out. As the files of scores say it; where models differ in it, each is named."""

from typing import Any


def note(measure: str, tree: dict[str, Any], *, prompt: str) -> str:
    """The line of a table, of all scores `tree`; '' where nothing was asked."""
    labels: dict[str, list[str]] = {}
    for label, node in tree.get(measure.removesuffix("_effective"), {}).items():
        labels.setdefault("; ".join(made_on(measure, node)), []).append(label)
    told = [f"{said} ({', '.join(names)})" if len(labels) > 1 else said for said, names in labels.items() if said]
    return "; ".join([*([f"prompt: {prompt}"] if prompt else []), *told])


def made_on(measure: str, node: dict[str, Any]) -> list[str]:
    """What one model's scores were made on."""
    scored = [entry for entry in node.values() if isinstance(entry, dict) and "low" in entry]
    first, trials, tokens = (scored or [{}])[0], counted(scored, "trials"), counted(scored, "tokens")
    match measure:
        case "perplexity":
            places, short = node["places"], node["documents_too_short"]
            said = f"the last {first['tokens'] // places:,} tokens at {places:,} places of {node['documents']:,} held-out documents"
            return [said, *([f"{short:,} more are too short"] if short else [])]
        case "sliding_perplexity":
            stride = [f"windows that move by {node['stride']:,}"] if "stride" in node else []
            return [f"{tokens} tokens of held-out documents", *stride]
        case "longppl":
            return [f"{tokens} key tokens in windows of {first['length']:,}"]
        case "passkey" | "needle":
            return [f"{trials} at each length, at {len(first['depth']):,} depths"]
        case "ruler":
            return [f"tasks: {', '.join(first['task'])}", f"{trials} prompts at each length"]
        case "ruler_effective":
            return [f"the longest length up to which {node['effective']['threshold']:.1%} are solved"]
        case "longqa":
            said = f"{node['cases']:,} questions"
            return [said, *([f"{node['cut']:,} of them on documents that lost their middle"] if node["cut"] else [])]
        case "harness":
            limit, examples, cut = (node.get(name) for name in ("limit", "num_fewshot", "cut"))
            return [
                *([f"{limit:,} questions of each task at most"] if limit else []),
                *([f"{examples:,} examples in each prompt"] if examples is not None else []),
                *([f"{cut:,} prompts lost their beginning"] if cut else []),
            ]
        case _ if measure.startswith(("longeval_", "longqa_")):
            return [f"{trials} questions in each column"]
        case _:
            return []


def counted(scored: list[dict[str, Any]], name: str) -> str:
    """How many, or from how many to how many."""
    counts = {entry[name] for entry in scored if name in entry}
    return " to ".join(f"{of(counts):,}" for of in (min, max)[: len(counts)])
