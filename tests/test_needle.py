"""Needles lie in real text where their depth says, in words that no exercise has; the one-pass check is greedy generation's."""

import json
import re

import numpy as np
import pytest
import torch
from scipy import stats
from specimens import FLOAT32
from test_passkey import byte_level, greedy, sentencepiece_like
from test_passkey import tiny as shared_tiny
from test_ruler import TEXTS, TOKENIZER, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from longlora.data import passkey_words, recall
from longlora.data.tokens import write
from longlora.evaluation import needle
from longlora.evaluation.interval import binomial
from longlora.evaluation.needle import GOODS, LEAD, PREAMBLE, QUESTION, TOWNS, TRADES, Needle, Writer, fact, measure
from longlora.evaluation.passkey import Prompt
from longlora.stages.needle import stage

torch.set_num_threads(1)  # matrices this small are slower on two

ALL_WORDS = (PREAMBLE, LEAD, QUESTION, *TRADES, *TOWNS, *GOODS)
HAY = " ".join(" ".join(TEXTS).split())


def settings(**changes) -> Needle:
    given = {"lengths": [600, 500], "depths": [0.0, 0.4, 1.0], "samples": 2, "prompt": "plain", "seed": 1}
    return Needle(**given | changes)


FACT = fact(settings(), sample=0, length=500, depth=0.5)


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(0, marks=True), sentencepiece_like(HAY, *ALL_WORDS)])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_prompt_has_its_length_and_one_needle_at_its_depth_of_the_text(tokenizer, depth):
    written = Writer(tokenizer, texts=TEXTS, prompt="plain").write(FACT, start=40, length=700, depth=depth)
    assert len(written.question) + len(written.answer) == 700
    text = tokenizer.decode(written.question + written.answer, skip_special_tokens=True)
    said, asked = FACT.said(LEAD), FACT.said(QUESTION)
    shape = re.fullmatch(
        re.escape(PREAMBLE) + rf"(.*) {said} {FACT.goods}\.(.*)" + re.escape(f"{asked} {said} {FACT.goods}"),
        text.lstrip(),
    )
    assert shape and "".join(shape.groups()) in HAY * 2
    before, after = map(len, shape.groups())
    assert before / (before + after) == pytest.approx(depth, abs=0.06)
    assert tokenizer.decode(written.answer).strip() == FACT.goods


def test_words_that_the_tokenizer_does_not_know_are_no_needles():
    """All would be the same mark, and whoever repeats it would find them all."""
    known = re.findall(r"\w+|[^\w\s]", " ".join((PREAMBLE, LEAD, QUESTION, HAY)))
    words = Tokenizer(
        WordLevel({word: n for n, word in enumerate(dict.fromkeys(["<unk>", *known]))}, unk_token="<unk>")
    )
    words.pre_tokenizer = Whitespace()
    writer = Writer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), texts=TEXTS, prompt="plain")
    with pytest.raises(
        ValueError, match=f"needle: .* cannot write '{FACT.goods}': its tokens for it read '<unk> <unk> <unk>'"
    ):
        writer.write(FACT, start=0, length=700, depth=0.5)


def test_a_tokenizer_that_shows_its_tokens_apart_can_write_needles():
    rules = json.loads(TOKENIZER.backend_tokenizer.to_str()) | {"decoder": None}
    apart = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))
    written = Writer(apart, texts=TEXTS, prompt="plain").write(FACT, start=0, length=700, depth=0.5)
    assert "".join(apart.decode(written.answer).split()).strip("\u0120") == "\u0120".join(FACT.goods.split())


def test_chat_prompts_are_the_template_around_the_words_with_the_models_turn_opened():
    written = Writer(TOKENIZER, texts=TEXTS, prompt="chat").write(FACT, start=0, length=600, depth=0.5)
    text = TOKENIZER.decode(written.question + written.answer)
    assert len(written.question) + len(written.answer) == 600 and text.startswith("[user]" + PREAMBLE)
    assert text.endswith(f"{FACT.said(QUESTION)}[assistant]{FACT.said(LEAD)} {FACT.goods}")


def test_no_exercise_is_in_the_needles_words():
    drilled = " ".join(
        [
            passkey_words.PREAMBLE,
            *recall.FILLER.values(),
            *recall.LABELS,
            *sum((*recall.FIRST_FORM.values(), *recall.FORMS), ()),
        ]
    )
    words, known = (set(re.findall(r"[a-z]{4,}", text.lower())) for text in (" ".join(ALL_WORDS), drilled))
    assert words & known <= {"what"}


def prompts_of(model, given: Needle, monkeypatch) -> list[list[Prompt]]:
    """The prompts of every sample, as `measure` asks them of the model."""
    hits, asked = needle.hits, []
    monkeypatch.setattr(
        needle, "hits", lambda m, *, prompts_SND: asked.append(prompts_SND) or hits(m, prompts_SND=prompts_SND)
    )
    measure(model, label="m", tokenizer=TOKENIZER, texts=TEXTS, settings=given)
    return [[prompt for row in sample for prompt in row] for sample in asked[0]]


def test_a_needle_depends_on_its_cell_only_and_a_haystack_on_its_sample(monkeypatch):
    given, fewer = settings(), settings(depths=[0.4, 1.0], lengths=[500], samples=1)
    prompts, head = prompts_of(tiny(), given, monkeypatch), len(Writer(TOKENIZER, texts=TEXTS, prompt="plain").head)
    for sample in prompts:
        deepest = max(sample, key=lambda p: p.shared)
        assert all(p.question[: p.shared] == deepest.question[: p.shared] for p in sample)
    one, other = (sample[-1].question[head : head + 50] for sample in prompts)
    assert one != other
    assert prompts_of(tiny(), fewer, monkeypatch) == [prompts[0][1:3]]
    assert len({fact(given, sample=s, length=n, depth=d) for s in (0, 1) for n in (500, 600) for d in (0.0, 0.4)}) == 8


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}]
)
def test_a_hit_is_what_greedy_generation_calls_right(changes):
    model, generator = shared_tiny(**changes), torch.Generator().manual_seed(3)
    trunk = torch.randint(340, (60,), generator=generator).tolist()
    rows, expected = [], []
    for shared, wrong in ((10, None), (37, 2), (60, None)):
        question = trunk[:shared] + torch.randint(340, (70 - shared,), generator=generator).tolist()
        answer = [(t + 1) % 340 if i == wrong else t for i, t in enumerate(greedy(model, question, 3))]
        rows.append(Prompt(question, answer, shared))
        expected.append(int(wrong is None))
    assert needle.hits(model, prompts_SND=[[rows]]).tolist() == [[expected]]


def test_the_shared_haystack_is_computed_once_for_all_lengths_and_depths(monkeypatch):
    model, seen, given = tiny(), [], settings()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    every = prompts_of(model, given, monkeypatch)
    own = sum(len(p.question + p.answer) - 1 - p.shared for sample in every for p in sample)
    assert sum(seen) == sum(max(p.shared for p in sample) for sample in every) + own


def test_a_model_that_answers_right_scores_full_marks_and_its_trials_add_up(monkeypatch):
    monkeypatch.setattr(needle, "answered", lambda model, prompts, *, cache: [True])
    result = measure(tiny(), label="m", tokenizer=TOKENIZER, texts=TEXTS, settings=settings())["needle"]["m"]
    assert list(result) == ["prompt", "500", "600"] and list(result["500"]["depth"]) == ["0.00", "0.40", "1.00"]
    assert (result["500"]["value"], result["500"]["trials"], result["500"]["depth"]["0.40"]["trials"]) == (1.0, 6, 2)
    assert result["500"]["low"] == pytest.approx(0.025 ** (1 / 6), abs=1e-6)  # exact


def test_needles_of_one_haystack_are_not_counted_as_independent(monkeypatch):
    found = np.zeros((4, 2, 3), dtype=np.uint8)
    found[:2] = 1  # in two of the haystacks all, in the others none
    monkeypatch.setattr(needle, "hits", lambda model, *, prompts_SND: found)
    result = measure(tiny(), label="m", tokenizer=TOKENIZER, texts=TEXTS, settings=settings(samples=4))["needle"]["m"]
    whole, at_one_depth = result["500"], result["500"]["depth"]["0.40"]
    assert (whole["value"], whole["trials"], at_one_depth["trials"]) == (0.5, 12, 4)
    assert (at_one_depth["low"], at_one_depth["high"]) == pytest.approx(binomial(2, 4), abs=1e-6)
    between = 0.5 + np.array([-1, 1]) * stats.t.ppf(0.975, 3) * np.std([1, 1, 0, 0], ddof=1) / 4**0.5
    assert (whole["low"], whole["high"]) == pytest.approx(between.clip(0, 1), abs=1e-6) != binomial(6, 12)


def test_what_cannot_be_asked_is_said():
    with pytest.raises(
        ValueError, match=r"needle.lengths: 100 tokens are too few, without a haystack it is (\d+)"
    ) as error:
        Writer(TOKENIZER, texts=TEXTS, prompt="plain").write(FACT, start=0, length=100, depth=0.5)
    shortest = int(str(error.value).split()[-1])
    assert Writer(TOKENIZER, texts=TEXTS, prompt="plain").write(FACT, start=0, length=shortest, depth=0.5)
    with pytest.raises(ValueError, match="hold no text for a haystack"):
        Writer(TOKENIZER, texts=[" "], prompt="plain")
    with pytest.raises(ValueError, match="has none: use plain"):
        Writer(sentencepiece_like(), texts=TEXTS, prompt="chat")


def test_stage_writes_the_same_bytes_again(tmp_path):
    tiny().save_pretrained(tmp_path / "odd")
    TOKENIZER.save_pretrained(tmp_path / "odd")
    write([TOKENIZER(t)["input_ids"] for t in TEXTS], tmp_path / "heldout.safetensors", vocabulary=len(TOKENIZER))
    for name in ("a", "b"):
        stage(
            tmp_path / "odd",
            tmp_path / "heldout.safetensors",
            tmp_path / name / "odd.json",
            settings(samples=1),
            FLOAT32,
        )
    assert (tmp_path / "a/odd.json").read_bytes() == (tmp_path / "b/odd.json").read_bytes()
    assert json.loads((tmp_path / "a/odd.json").read_text())["needle"]["odd"]["600"]["trials"] == 3
