"""What GGUF says of a tokenizer, and which are refused; that llama.cpp then reads the same tokens is in test_llama_cpp.py."""

import json
from pathlib import Path

import pytest
from gguf import TokenType
from specimens import llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longlora.model.gguf import write
from longlora.model.gguf_tokenizer import LLAMA3, words_of
from longlora.model.load import open_tokenizer

TINY = Path(__file__).parent.parent / "tiny" / "model"
TEXT = (
    "In 1873 they'd paid 12,500 florins; we're told it's \"not\" THEY'LL that mattered...\n\n\tif (x  ==  3) {\r\n    y();\n}   \n"
    "Füße, naïve, Ω≈3.14, 日本語のテキスト, русский текст, 🙂🙃, e\u0301, ½ ² ௧௨ a\u00a0b\u2003c  end "
)
SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3["pattern"]["Regex"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def trained(rule: str, *, begins: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level pairs, learnt from TEXT under the split that llama.cpp calls `rule`."""
    bpe = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[rule]) if len(SPLITS[rule]) > 1 else SPLITS[rule][0]
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], learn)
    if begins:
        bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("rule", SPLITS)
def test_the_rule_has_the_name_that_llama_cpp_has_for_it_and_merges_keep_their_order(rule):
    words = words_of(trained(rule), size=383)
    said = json.loads(trained(rule).backend_tokenizer.to_str())["model"]
    assert words.rule == rule
    assert [tuple(merge.split(" ")) for merge in words.merges] == [tuple(pair) for pair in said["merges"]]
    assert {text: number for number, text in enumerate(words.tokens[:380])} == said["vocab"]
    assert words.tokens[380:] == ["[PAD380]", "[PAD381]", "[PAD382]"]
    types = dict.fromkeys(range(383), TokenType.NORMAL) | dict.fromkeys((0, 1), TokenType.CONTROL)
    assert dict(enumerate(words.types)) == types | dict.fromkeys((380, 381, 382), TokenType.UNUSED)


def test_marks_and_the_chat_template_are_told():
    asked = trained("gpt-2", begins=True)
    asked.add_tokens(["<tool>"])
    asked.chat_template = "{{ messages }}"
    words = words_of(asked, size=381)
    assert (words.marks, words.begins, words.ends) == ({"bos": 0, "eos": 1}, True, False)
    assert (words.types[380], words.template) == (TokenType.USER_DEFINED, "{{ messages }}")
    tiny = words_of(open_tokenizer(TINY), size=259)
    assert (tiny.rule, tiny.merges, tiny.begins) == ("gpt-2", [], False)
    assert tiny.marks == {"bos": 0, "eos": 1, "pad": 2}


@pytest.mark.parametrize("name", ["tiny", "trained"])
def test_transformers_reads_the_same_tokens_from_the_file(tmp_path, name):
    own = open_tokenizer(TINY) if name == "tiny" else trained("gpt-2")
    llama(vocabulary=400).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    write(tmp_path / "model", out=tmp_path / "a.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in (TEXT, TEXT[::-1], "<bos>so<eos>"):
        assert read(text)["input_ids"] == own(text)["input_ids"]


def changed(change):
    def make() -> PreTrainedTokenizerFast:
        made = trained("gpt-2")
        change(made)
        return made

    return make


def split(*steps: object):
    return changed(lambda made: setattr(made.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Sequence(list(steps))))


def pieces() -> PreTrainedTokenizerFast:
    """As Llama 2's: SentencePiece's pairs with byte fallback."""
    bpe = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "x": 2}, merges=[], byte_fallback=True))
    bpe.normalizer = normalizers.Prepend("▁")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (pieces, "the tokenizer is BPE with byte fallback after Prepend: only byte-level BPE is written"),
        (changed(lambda made: setattr(made.backend_tokenizer, "normalizer", normalizers.NFC())), "is BPE after NFC"),
        (
            split(pre_tokenizers.Digits(), *SPLITS["gpt-2"]),
            "splits text by Digits and ByteLevel in a way that is none of",
        ),
        (split(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text by ByteLevel in a way"),
        (changed(lambda made: made.add_tokens([AddedToken("<t>", lstrip=True)])), "the token <t> has 'lstrip'"),
        (changed(lambda made: made.add_tokens(["<t>", "<u>"])), "has token 381, and the model 381 rows"),
        (changed(lambda made: setattr(made, "eos_token", None)), "no eos_token: llama.cpp would take token 11"),
        (
            changed(
                lambda made: setattr(
                    made.backend_tokenizer,
                    "post_processor",
                    TemplateProcessing(single="$A <bos>", special_tokens=[("<bos>", 0)]),
                )
            ),
            "other marks around a text than one bos and one eos",
        ),
    ],
)
def test_what_llama_cpp_would_read_as_other_tokens_is_refused(make, said):
    with pytest.raises(ValueError, match=said) as error:
        words_of(make(), size=381)
    assert "\n" not in str(error.value)
