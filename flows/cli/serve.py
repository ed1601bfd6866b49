"""A model behind an OpenAI-compatible endpoint: transformers' own server, on 127.0.0.1, told what the command line says.

What is served is a folder of links below the state folder, under the name by which clients ask for it; a chat template that
is lent to a model lies there, and the model's own folder stays as it is.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from flows.cli.ask import model_folder
from flows.cli.options import PromptName, must_hold_model, state_below

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
TOKENIZER = "tokenizer_config.json"
NEEDED = ("openai", "uvicorn", "fastapi")


def serve(model: str, *, port: int, prompt: PromptName | None) -> NoReturn:
    """Become the server of `model`, until interrupted.

    Raises:
        ValueError: the model is wrong, the port is taken, a package is missing; the model has no chat template
            and no prompt was named.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install -c constraints.txt -e '.[serve]'")
    from tasks.listening import LOCAL, LOOPBACK, must_be_free

    must_be_free(LOCAL, port, "--port")
    folder = model_folder(model).resolve()
    name = folder.name if Path(model).is_dir() else model
    # whoever else serves a model of this name has another port
    home = state_below(Path.cwd(), model=folder) / "served" / str(port)
    lay_out(folder, home / name, prompt=prompt)
    hub = hub_of(home / name)
    from torch.cuda import is_available

    from longlora.data.prompt import AT_ONCE

    place = ["--device", "auto", "--dtype", "bfloat16"] if is_available() else ["--device", "cpu", "--dtype", "float32"]
    ways = "/v1/completions" if prompt == "plain" else "/v1/chat/completions, /v1/completions"
    print(f"model '{name}' at http://{LOOPBACK}:{port}/v1 ({ways}; Ctrl-C ends it)", flush=True)
    quiet = {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    where = ["--host", LOOPBACK, "--port", str(port), "--log-level", "error", "--no-trust-remote-code"]
    asked = ["--chat-template-kwargs", json.dumps(AT_ONCE)]  # as it was taught, unless a request says otherwise
    command = [sys.executable, "-m", "flows.cli.server", "serve", name, *where, *place, *asked]
    os.chdir(home)  # so that the folder's name is the model's
    os.execve(sys.executable, [*command, "--attn-implementation", "sdpa"], os.environ | quiet)


def lay_out(folder: Path, served: Path, *, prompt: PromptName | None) -> None:
    """Links to the model's files in `served`, and the chat template that `prompt` asks for: an own one may also stand in the
    tokenizer's configuration, which then is a copy without it."""
    must_hold_model(folder)
    from longlora.model.load import open_tokenizer
    from longlora.model.template import authors_template

    tokenizer = open_tokenizer(folder)
    if prompt in (None, "chat") and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {folder} has no chat template: --prompt authors lends it [INST]...[/INST], for a model that was "
            "fine-tuned on pairs with it; --prompt plain serves text to be continued, /v1/completions alone"
        )
    shutil.rmtree(served, ignore_errors=True)
    served.mkdir(parents=True)
    for file in folder.iterdir():
        if prompt in (None, "chat") or file.name not in TEMPLATES:
            (served / file.name).symlink_to(file)
    if prompt == "plain":
        configured = json.loads((folder / TOKENIZER).read_text())
        (served / TOKENIZER).unlink()
        (served / TOKENIZER).write_text(json.dumps(configured | {"chat_template": None}, indent=2) + "\n")
    if prompt == "authors":
        (served / TEMPLATES[0]).write_text(authors_template(tokenizer))


def hub_of(served: Path) -> Path:
    """A cache as the hub's library keeps it, with the model in `served` alone, beside it: /v1/models lists the cache's models, and
    fails without a cache."""
    hub = served.with_name(f"{served.name}.hub")
    shutil.rmtree(hub, ignore_errors=True)
    for part in ("refs", "snapshots"):
        (hub / f"models--{served.name}" / part).mkdir(parents=True)
    (hub / f"models--{served.name}" / "refs" / "main").write_text("served")
    (hub / f"models--{served.name}" / "snapshots" / "served").symlink_to(served)
    return hub
