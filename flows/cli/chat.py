"""A dialogue on the terminal that may outgrow the model's context."""

import sys

from flows.cli.ask import NOTHING, model_folder, must_be_text, typed
from flows.cli.options import PromptName


def chat(model: str, *, window: int | None, prompt: PromptName | None, max_new_tokens: int) -> None:
    """Answer every line that is typed.

    Raises:
        ValueError: the model or the window is wrong, or a line is not UTF-8.
    """
    folder = model_folder(model)
    from transformers.utils import logging

    from longlora.asking.sinks import Dialogue
    from longlora.model.load import open_model, open_tokenizer

    logging.disable_progress_bar()
    opened = open_model(folder)
    size = int(opened.config.get_text_config().max_position_embeddings) if window is None else window
    tokenizer = open_tokenizer(folder)
    dialogue = Dialogue(opened, tokenizer=tokenizer, size=size, max_new_tokens=max_new_tokens, prompt=prompt)
    told = False
    for line in typed():
        must_be_text(line)
        answer = dialogue.say(line, tell=lambda words: print(words, end="", flush=True))
        print("" if answer else NOTHING)
        if dialogue.forgotten and not told:
            told = True
            print(
                f"note: the dialogue has outgrown {size} tokens: from here on the model sees its first tokens and the last ones",
                file=sys.stderr,
            )
