"""A dialogue on the terminal that may outgrow the model's context."""

import sys
from typing import Any, get_args

from flows.cli.ask import check, model_folder, typed


def chat(model: str, *, window: int | None, prompt: str | None, max_new_tokens: int) -> None:
    """Answer every line that is typed.

    Raises:
        ValueError: the model or a choice is wrong.
    """
    folder = model_folder(model)
    from transformers.utils import logging

    from longlora.asking.asking import Prompt
    from longlora.asking.sinks import Dialogue
    from longlora.model.load import open_model, open_tokenizer

    if prompt is not None:
        check("prompt", prompt, get_args(Prompt))
    logging.disable_progress_bar()
    opened = open_model(folder)
    size = window or int(opened.config.get_text_config().max_position_embeddings)
    settings: Any = {"size": size, "max_new_tokens": max_new_tokens, "prompt": prompt}
    dialogue = Dialogue(opened, tokenizer=open_tokenizer(folder), **settings)
    told = False
    for line in typed():
        dialogue.say(line, tell=lambda words: print(words, end="", flush=True))
        print()
        if dialogue.forgotten and not told:
            told = True
            print(
                f"note: the dialogue has outgrown {size} tokens: from here on the model sees its first tokens and the last ones",
                file=sys.stderr,
            )
