"""Marks of the tokenizer that stand in a user's words are words, wherever they are tokenised; all other text has the tokens that
the tokenizer gives it."""

import random
from pathlib import Path

import numpy as np
import pytest
from test_longqa import settings
from test_pairs import CHATML
from test_passkey import byte_level, sentencepiece_like
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longlora.asking.asking import Session
from longlora.data.casebook import tokens as token_ends
from longlora.data.dialogue import tokenised
from longlora.data.instructions import Turn
from longlora.data.prompt import Prompt, continuation, haystack
from longlora.data.recall import exercises
from longlora.data.tokenise import as_words, bare, marks, tokenise
from longlora.data.wording import asked
from longlora.evaluation.longqa import Question, Writer
from longlora.model.load import open_model, open_tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny/model"


def turning():
    """With the marks of a chat, two of which begin alike, and a mark that takes the spaces before it."""
    words = byte_level()
    more = ["<|im_start|>", "<|im_end|>", "<|im_end|>!", AddedToken("<mask>", lstrip=True, special=True)]
    words.add_special_tokens({"additional_special_tokens": more})
    words.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return words


def line_ends() -> PreTrainedTokenizerFast:
    """As Llama 3's and Qwen's: a sign goes before the letters behind it, or together with the line breaks behind it."""
    raw = Tokenizer(models.BPE())
    parts = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(parts, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(['It is so.\n\nIs it?\n\nIt is!\n\n\nSo:\n "So"\n\n(so)\n'] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


TOKENIZERS = [lambda: open_tokenizer(TINY), turning, lambda: byte_level(0, marks=True), sentencepiece_like, line_ends]
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS)


def forged(words) -> str:
    """A text that speaks of every mark."""
    return "".join(f"A text ends with {mark} here.{mark}\n{mark}" for mark in marks(words).values())


@every_tokenizer
def test_a_text_without_marks_has_the_tokens_that_the_tokenizer_gives_it(make):
    words = make()
    texts = [(ROOT / "docs" / name).read_text("utf-8") for name in ("run.md", "gpus.md")] + ["", " <a> < s>\n"]
    plain = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [as_words(text, tokenizer=words) for text in texts] == texts
    assert [bare(words, text) for text in texts] == plain
    begin, end = ([] if mark is None else [mark] for mark in (words.bos_token_id, words.eos_token_id))
    assert [t.tolist() for t in tokenise(texts, tokenizer=words)] == [[*begin, *ids, *end] for ids in plain]


@every_tokenizer
def test_marks_in_a_document_are_words_and_those_around_it_marks(make):
    words = make()
    special, text = marks(words).keys() - {words.unk_token_id}, forged(words)
    plain, (marked, after) = "No mark.", tokenise([text, "No mark."], tokenizer=words)
    assert after.tolist() == next(tokenise([plain], tokenizer=words)).tolist()
    around = [mark for mark in (words.bos_token_id, words.eos_token_id) if mark is not None]
    assert [token for token in marked if token in special] == around
    if words.unk_token_id not in marked[1:-1]:
        assert words.decode(marked[1:-1] if words.bos_token_id is not None else marked[:-1]) == text


@every_tokenizer
@pytest.mark.parametrize("prompt", ["authors", "chat"])
def test_training_asking_and_measuring_read_a_document_alike(make, prompt: Prompt):
    words = make()
    words.chat_template = words.chat_template if "im_start" in str(words.chat_template) else CHATML
    text, question, answer = forged(words), f"What is {words.eos_token}?", f"It is {words.eos_token}."
    pair = tokenised((Turn("user", asked(text, question)), Turn("assistant", answer)), tokenizer=words, prompt=prompt)
    plain = tokenised((Turn("user", asked("A", "B?")), Turn("assistant", "C.")), tokenizer=words, prompt=prompt)
    special = sorted(marks(words).keys() - {words.unk_token_id})
    for side in (False, True):
        ours, frame = (each.tokens[each.answer == side] for each in (pair, plain))
        assert ours[np.isin(ours, special)].tolist() == frame[np.isin(frame, special)].tolist()
    here = Session(open_model(TINY), tokenizer=words, text=text, max_new_tokens=1, prompt=prompt, too_long="truncate")
    known = here.prefix_ids(text.rstrip()) + here.question_ids(question)
    same = tokenised(
        (Turn("user", asked(text.rstrip(), question)), Turn("assistant", "C.")), tokenizer=words, prompt=prompt
    )
    assert known == same.tokens[~same.answer].tolist()
    measured = Writer(words, settings=settings(prompt=prompt, length=10**5)).write(
        Question(document=text, question=question, answers=["x"])
    )
    assert measured.ids == pair.tokens[~pair.answer].tolist()


@every_tokenizer
@pytest.mark.parametrize("prompt", ["authors", "chat"])
@pytest.mark.parametrize("text", ["It is so.", "\n\nIt is so!", " \nSo it is", "It is so:\n", '"It is"'])
@pytest.mark.parametrize("question", ["Is it?", " (Is it so)\n", "\nIs it"])
def test_a_prompt_has_the_tokens_of_training_whatever_stands_at_the_borders_of_its_parts(make, prompt, text, question):
    words = make()
    words.chat_template = CHATML.replace("m['content']", "m['content'] | trim")
    turns = (Turn("user", asked(text, question)), Turn("assistant", "So."))
    taught = tokenised(turns, tokenizer=words, prompt=prompt)
    taught = taught.tokens[~taught.answer].tolist()
    writer = Writer(words, settings=settings(prompt=prompt, length=10**5))
    assert writer.write(Question(document=text, question=question, answers=["x"])).ids == taught
    here = Session(open_model(TINY), tokenizer=words, text=text, max_new_tokens=1, prompt=prompt, too_long="truncate")
    if here.text == text:
        assert here.prefix_ids(text) + here.question_ids(question) == taught


@every_tokenizer
def test_marks_in_exercises_and_haystacks_are_words_and_lengths_count_them_so(make):
    words = make()
    special, text = marks(words).keys() - {words.unk_token_id}, forged(words) * 9
    (exercise,) = exercises([text], tokenizer=words, length=2000, reach=800, nearness=1.0, count=1, seed=1)
    assert not special.intersection(exercise[1:])
    assert not special.intersection(haystack(words, [text]).tolist())
    ids = bare(words, as_words(text, tokenizer=words))
    assert len(token_ends(words)(text)) == pytest.approx(len(ids), rel=0.02)


def test_a_piece_behind_a_mark_goes_on_behind_it():
    words, dice = turning(), random.Random(1)
    for _ in range(200):
        text = as_words(
            "".join(dice.choices(["</s>", "<|im_end|>", "!", " ", "<", "The", "\n", "s>"], k=9)), tokenizer=words
        )
        after, piece = text[: len(text) // 2], text[len(text) // 2 :]
        ids = continuation(words, piece, after=after)
        assert not {words.eos_token_id, words.convert_tokens_to_ids("<|im_end|>")}.intersection(ids)
        assert words.decode(ids) == piece.replace("\udfff", "")
