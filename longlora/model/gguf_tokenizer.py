"""A byte-level BPE tokenizer as llama.cpp's GGUF metadata, only where llama.cpp then gives the same tokens.

In GGUF a tokenizer is a list of tokens, a list of merges, and the *name* of a rule that splits text before the merges; the rules
themselves are in llama.cpp. So a tokenizer is refused here unless its own rule is, letter by letter, one that has a name there.
Tested against llama.cpp where its Python package is installed, and against transformers' reading of the same file.
"""

import json
from typing import Any, NamedTuple

from gguf import GGUFValueType, GGUFWriter, Keys, TokenType
from transformers import PreTrainedTokenizerBase

Rule = list[dict[str, Any]]

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
RULES: dict[str, tuple[Rule, bool]] = {
    "gpt-2": ([BYTES], False),
    "smollm": ([DIGITS, BYTES], False),
    "llama-bpe": ([LLAMA3, BYTES | {"use_regex": False}], True),
}
"""llama.cpp's name: the rule in the words of `tokenizer.json`, and whether a word that is a token skips the merges."""


class Words(NamedTuple):
    """What GGUF says of a tokenizer."""

    rule: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    marks: dict[str, int]
    """Ids of the marks that there are, of bos, eos, pad and unk."""
    begins: bool
    """Whether a text gets bos in front,"""
    ends: bool
    """and eos at its end."""
    template: str | None


class Writer(GGUFWriter):
    """gguf's writer, and empty arrays: a tokenizer of single bytes has no merges, and llama.cpp asks for the list."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype is GGUFValueType.ARRAY and sub_type is not None and len(val) == 0:
            return self._pack("I", vtype) + self._pack("I", sub_type) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def words_of(tokenizer: PreTrainedTokenizerBase, *, size: int) -> Words:
    """`tokenizer` for a model with `size` rows of embeddings.

    Raises:
        ValueError: llama.cpp would read text as other tokens, or would not know where to stop.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a {type(tokenizer).__name__} has no tokenizer.json: only byte-level BPE is written as GGUF")
    said = json.loads(backend.to_str())
    rule = named_rule(said)
    tokens, types = vocabulary(said, size=size)
    marks = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    if marks["eos"] is None:
        raise ValueError("the tokenizer has no eos_token: llama.cpp would take token 11 for the end of a text")
    begins, ends = marked(tokenizer)
    return Words(
        rule=rule,
        tokens=tokens,
        types=types,
        merges=[" ".join(merge) for merge in said["model"]["merges"]],
        marks={name: number for name, number in marks.items() if number is not None},
        begins=begins,
        ends=ends,
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def named_rule(said: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer splits.

    Raises:
        ValueError: it has none there, for it splits by another rule.
    """
    model, splitter = said["model"], said["pre_tokenizer"] or {"type": "nothing"}
    if model["type"] != "BPE" or model["byte_fallback"] or said["normalizer"]:
        first = (said["normalizer"] or {}).get("type")
        kind = f"{model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}"
        raise ValueError(
            f"the tokenizer is {kind}{f' after {first}' if first else ''}: only byte-level BPE is written as GGUF"
        )
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise ValueError("the tokenizer's BPE has dropout, a prefix or a suffix, which llama.cpp's has not")
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, rule in RULES.items():
        if (steps, model["ignore_merges"]) == rule:
            return name
    raise ValueError(
        f"the tokenizer splits text by {' and '.join(step['type'] for step in steps)} in a way that is none of llama.cpp's "
        f"{', '.join(RULES)}: it would read other tokens"
    )


def vocabulary(said: dict[str, Any], *, size: int) -> tuple[list[str], list[TokenType]]:
    """Tokens by id, with what each is; the rows of a model that no token has are named [PAD<id>].

    Raises:
        ValueError: a token that llama.cpp does not know, more tokens than rows, or two that are written the same.
    """
    tokens = {number: text for text, number in said["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in said["added_tokens"]:
        odd = next((key for key in ("single_word", "lstrip", "rstrip") if added[key]), None)
        if odd:
            raise ValueError(f"the token {added['content']} has '{odd}', which llama.cpp does not know")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise ValueError(f"the tokenizer has token {max(tokens)}, and the model {size} rows of embeddings")
    listed = [tokens.get(number, f"[PAD{number}]") for number in range(size)]
    if len(set(listed)) < size:
        raise ValueError("two tokens of the tokenizer are written the same, which llama.cpp does not take")
    return listed, [types.get(number, TokenType.UNUSED) for number in range(size)]


def marked(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before a text, and eos behind it.

    Raises:
        ValueError: it puts something else around it.
    """
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    found = tokenizer("x")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if found == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise ValueError("the tokenizer puts other marks around a text than one bos and one eos, which llama.cpp cannot")


def add_words(writer: Writer, words: Words) -> None:
    """Write the tokenizer metadata."""
    writer.add_tokenizer_model("gpt2")  # GGUF's word for byte-level BPE
    writer.add_tokenizer_pre(words.rule)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_key_value(Keys.Tokenizer.MERGES, words.merges, GGUFValueType.ARRAY, sub_type=GGUFValueType.STRING)
    for name, number in words.marks.items():
        writer.add_uint32(
            {
                "bos": Keys.Tokenizer.BOS_ID,
                "eos": Keys.Tokenizer.EOS_ID,
                "pad": Keys.Tokenizer.PAD_ID,
                "unk": Keys.Tokenizer.UNK_ID,
            }[name],
            number,
        )
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.template:
        writer.add_chat_template(words.template)
