"""RULER's tasks have one right answer that stands in the text, prompts keep their length, and scoring is RULER's."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from specimens import FLOAT32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.data.tokens import write
from longlora.evaluation import answer, ruler
from longlora.evaluation.answer import answers
from longlora.evaluation.ruler import FEWEST, Ruler, Writer, effective, match_all, measure
from longlora.evaluation.ruler_tasks import common, frequent, needles, tracking
from longlora.model.load import open_tokenizer
from longlora.stages.ruler import stage

torch.set_num_threads(1)  # matrices this small are slower on two

ROOT = Path(__file__).parent.parent
NEEDLES = ("single", "multikey", "multivalue", "multiquery")
ALL = (*NEEDLES, "tracking", "common", "frequent")
LETTERS = random.Random(4)
WORDS = sorted({"".join(LETTERS.choices("abcdefghijklmnop", k=LETTERS.randrange(5, 9))) for _ in range(300)})
TEXTS = [" ".join(WORDS[i : i + 60]) + ".\n" for i in range(0, 300, 60)]


def tokenizer() -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(["<s>", "</s>", *symbols])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=template)


TOKENIZER = tokenizer()


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def settings(**changes) -> Ruler:
    given = {"lengths": [2900, 2500], "tasks": list(ALL), "samples": 2, "threshold": 0.8}
    given |= {"prompt": "plain", "seed": 1}
    return Ruler(**given | changes)


@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("task", ALL)
def test_a_prompt_leaves_just_the_room_for_its_answer_and_holds_every_line_in_order(task, prompt):
    ids, riddle = Writer(TOKENIZER, texts=TEXTS, prompt=prompt).write(task, length=2600, generator=random.Random(5))
    if task in ("common", "frequent"):
        assert 2600 * 0.95 < len(ids) + riddle.room <= 2600
    else:
        assert len(ids) + riddle.room == 2600
    text = TOKENIZER.decode(ids)
    places = [text.index(" " + line) for line in riddle.lines[:50]]
    assert places == sorted(places) or task in ("common", "frequent")
    assert text.endswith(riddle.lead)
    assert ("[assistant]" in text) == (prompt == "chat")


@pytest.mark.parametrize("task", [*NEEDLES, "tracking"])
def test_needles_are_spread_over_the_whole_text(task):
    writer, places = Writer(TOKENIZER, texts=TEXTS, prompt="plain"), []
    for seed in range(40):
        ids, riddle = writer.write(task, length=2600, generator=random.Random(seed))
        text = TOKENIZER.decode(ids)
        places += [text.index(line) / len(text) for line in riddle.lines]
    assert min(places) < 0.15 and max(places) > 0.8 and 0.35 < np.mean(places) < 0.65


@pytest.mark.parametrize(
    ("task", "lines", "right", "keys"),
    [("single", 1, 1, 1), ("multikey", 4, 1, 4), ("multivalue", 4, 4, 1), ("multiquery", 4, 4, 4)],
)
def test_needles_have_rulers_sizes_and_the_asked_keys_own_values(task, lines, right, keys):
    riddle = needles(task, random.Random(3), WORDS)
    pairs = [re.fullmatch(r"A secret number of (\w+) is (\d{7})\.", line).groups() for line in riddle.lines]
    assert (len(pairs), len(riddle.answers), len({key for key, _ in pairs})) == (lines, right, keys)
    asked = re.search(r"Which secret numbers of (.+) does", riddle.question).group(1)
    wanted = {value for key, value in pairs if re.search(rf"\b{key}\b", asked)}
    assert wanted == set(riddle.answers)


def test_tracking_resolves_to_all_its_variables_and_no_other_way():
    riddle = tracking(random.Random(8))
    held: dict[str, str] = {}
    for line in riddle.lines:
        name, value = re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)\.", line).groups()
        held[name] = held.get(value, value)
    value = re.search(r"the value (\d+)", riddle.question).group(1)
    assert [name for name, v in held.items() if v == value] == riddle.answers
    assert len(set(riddle.answers)) == 5


@pytest.mark.parametrize("budget", [110, 500, 900, 3000])
def test_common_words_are_ten_times_as_frequent_as_any_other(budget):
    riddle = common(random.Random(2), WORDS, budget=budget)
    counts = Counter(line.split(". ")[1] for line in riddle.lines)
    top = counts.most_common(10)
    assert {w for w, _ in top} == set(riddle.answers)
    assert min(n for _, n in top) >= 10 * max(n for w, n in counts.items() if w not in riddle.answers)
    assert len(riddle.lines) <= budget
    assert [line.split(".")[0] for line in riddle.lines] == [str(i + 1) for i in range(len(riddle.lines))]


@pytest.mark.parametrize("budget", [FEWEST["frequent"], 100, 2000])
def test_frequent_words_are_the_three_most_frequent_behind_the_dots_without_a_tie(budget):
    riddle = frequent(random.Random(2), budget=budget)
    counts = Counter(riddle.lines)
    ranked = counts.most_common(5)
    assert [w for w, _ in ranked[:4]] == ["...", *riddle.answers]
    assert ranked[3][1] > ranked[4][1]
    assert len(riddle.lines) <= budget


def test_scoring_is_the_share_of_answers_that_occur_whatever_their_case():
    assert match_all("They are 123, and ABC.", ["123", "abc", "999", "12"]) == 0.75
    assert match_all("", ["1"]) == 0.0


def test_answers_are_greedy_generation_of_each_prompt_alone(monkeypatch):
    monkeypatch.setattr(answer, "batch_tokens", lambda model: 90)
    model, generator = tiny(), random.Random(1)
    model.generation_config.temperature, model.generation_config.do_sample = 5.0, True
    prompts = [[generator.randrange(2, 258) for _ in range(n)] for n in (30, 41, 30, 30, 41)]
    max_new_tokens = [7, 5, 7, 3, 5]
    written = answers(model, prompts=prompts, max_new_tokens=max_new_tokens)
    for prompt, room, got in zip(prompts, max_new_tokens, written, strict=True):
        ids = list(prompt)
        for _ in range(room):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
        new = ids[len(prompt) :]
        assert got[: len(new)] == new


def test_a_threshold_that_any_score_reaches_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        settings(threshold=0.0)


def test_effective_context_ends_before_the_first_length_below_the_threshold():
    def of(*values: float) -> int:
        lengths = [2**i for i in range(len(values))]
        given = settings(lengths=lengths[::-1])
        return effective({str(n): {"value": v} for n, v in zip(lengths, values, strict=True)}, settings=given)

    assert of(0.9, 0.8, 0.95) == 4
    assert of(0.9, 0.79, 0.95) == 1
    assert of(0.1, 1.0) == 0


def test_a_model_that_answers_right_scores_full_marks_on_every_task(monkeypatch):
    given = settings()
    right = []
    write = Writer.write

    def noted(self, task, **named):
        ids, riddle = write(self, task, **named)
        right.append(TOKENIZER(" " + ", ".join(riddle.answers))["input_ids"])
        return ids, riddle

    monkeypatch.setattr(Writer, "write", noted)
    monkeypatch.setattr(ruler, "answers", lambda model, prompts, max_new_tokens, kept: right[-len(prompts) :])
    result = measure(tiny(), label="m", tokenizer=TOKENIZER, texts=TEXTS, settings=given)["ruler"]["m"]
    assert result["effective"] == {"value": 2900, "threshold": given.threshold}
    for length in ("2500", "2900"):
        assert result[length]["value"] == 1.0 and result[length]["trials"] == 14
        assert list(result[length]["task"]) == list(ALL)


def test_answers_fit_into_their_room():
    writer = Writer(TOKENIZER, texts=TEXTS, prompt="plain")
    for task in ALL:
        _, riddle = writer.write(task, length=2600, generator=random.Random(5))
        assert len(TOKENIZER(" " + ", ".join(riddle.answers) + ".")["input_ids"]) <= riddle.room


@pytest.mark.parametrize("task", ALL)
def test_a_length_without_room_is_refused_with_the_shortest_there_is(task):
    writer = Writer(TOKENIZER, texts=TEXTS, prompt="plain")
    with pytest.raises(ValueError, match=rf"150 tokens are too few for {task}.* (\d+)$") as error:
        writer.write(task, length=150, generator=random.Random(5))
    shortest = int(str(error.value).split()[-1])
    assert writer.write(task, length=shortest, generator=random.Random(5))


@pytest.mark.parametrize("changes", [{"tasks": ["single", "single"]}, {"lengths": [2500, 2500]}, {"lengths": [-5]}])
def test_a_task_or_length_counts_once_and_a_length_is_above_zero(changes):
    """Twice the same trials would look like twice as many."""
    with pytest.raises(ValueError, match="stands twice|greater than 0"):
        settings(**changes)


def test_every_task_fits_into_the_lengths_of_params_yaml_by_the_demos_tokenizer():
    given = Ruler(**yaml.safe_load((ROOT / "params.yaml").read_text())["ruler"])
    words = " ".join(["congress", "department", "president", "measures", "treasury", "treaties", *WORDS])
    writer = Writer(open_tokenizer(ROOT / "tiny/model"), texts=[words], prompt=given.prompt)
    for length in given.lengths:
        for task in given.tasks:
            ids, riddle = writer.write(task, length=length, generator=random.Random(1))
            assert len(ids) + riddle.room <= length


def test_a_list_of_common_words_that_the_texts_have_too_few_words_for_is_refused():
    """It would be a prompt of 15,000 tokens, and its score that of 60,000."""
    writer = Writer(TOKENIZER, texts=TEXTS, prompt="plain")
    with pytest.raises(ValueError, match="60000 tokens are too many for common, the 300 words .* fill 15024: hold out"):
        writer.write("common", length=60_000, generator=random.Random(5))


def test_texts_without_words_are_refused():
    with pytest.raises(ValueError, match="have 2 words to ask for, 24 are needed"):
        Writer(TOKENIZER, texts=["hello world 12"], prompt="plain")


def test_stage_writes_the_same_bytes_again(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "odd")
    TOKENIZER.save_pretrained(tmp_path / "odd")
    write([TOKENIZER(t)["input_ids"] for t in TEXTS], tmp_path / "heldout.safetensors", vocabulary=len(TOKENIZER))
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(tmp_path / "kept"))
    given = settings(lengths=[600], tasks=["single", "tracking"])
    for name in ("a", "b"):
        stage(tmp_path / "odd", tmp_path / "heldout.safetensors", tmp_path / name / "odd.json", given, FLOAT32)
    assert (tmp_path / "a/odd.json").read_bytes() == (tmp_path / "b/odd.json").read_bytes()
    result = json.loads((tmp_path / "a/odd.json").read_text())["ruler"]["odd"]
    assert result["600"]["trials"] == 4 and result["prompt"] == "plain"
