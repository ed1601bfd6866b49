"""Where a model's answers end, as clients read it in generation_config.json."""

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from longlora.data.prompt import listed, taught_ends


def answers(folder: Path) -> GenerationConfig:
    """How answers are made, by generation_config.json, and without one by the config, as transformers does it."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def ends(folder: Path) -> list[int]:
    """The tokens at which an answer ends."""
    return sorted({*listed(answers(folder).eos_token_id)})


def due_ends(base: Path) -> list[int]:
    """The tokens at which answers of a model made of `base` must end: those that `base` names, and those that its chat template has
    behind an answer. A base that learns its template by fine-tuning mostly names the first alone, and would talk on."""
    named = ends(base)
    if not (base / "tokenizer_config.json").exists():
        return named
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if not tokenizer.chat_template:
        return named
    try:
        return sorted({*named, *taught_ends(tokenizer, "chat")})
    except ValueError:  # the template refuses a plain question and answer, so none can have been taught by it
        return named
