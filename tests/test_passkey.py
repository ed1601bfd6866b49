"""Prompts are exact to the token and say what the authors' say; the one-pass check is greedy generation's verdict."""

import json
import re

import pytest
import torch
from pydantic import ValidationError
from specimens import FLOAT32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from longlora.data.passkey_words import FILLER, PREAMBLE
from longlora.evaluation import passkey
from longlora.evaluation.passkey import Passkey, Prompt, Writer, hits, keys, measure, parted, prefix_of
from longlora.model import cache
from longlora.model.cache import shareable
from longlora.stages.passkey import stage

torch.set_num_threads(1)  # matrices this small are slower on two

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_level(merges: int = 60, marks: bool = False) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer: the space belongs to the word that follows it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([PREAMBLE, FILLER, "The pass key is 12345. 77 88 99 1000"], trainer)
    if marks:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def sentencepiece_like(*texts: str) -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer, which knows the letters of `texts`, too: a space is put before every text."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], max_token_length=8)
    raw.train_from_iterator([PREAMBLE, FILLER, "The pass key is 1234567890.", "Remember it. What?", *texts], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SIZES = {
    "vocab_size": 340,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, initializer_range=0.4, **changes)).eval()


def settings(**changes) -> Passkey:
    return Passkey(
        **{"lengths": [310, 350], "depths": [0.0, 0.4, 1.0], "samples": 3, "digits": 5, "prompt": "plain", "seed": 1}
        | changes
    )


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(0, marks=True), sentencepiece_like()])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_prompts_have_exactly_their_length_and_the_authors_words(tokenizer, depth):
    written = Writer(tokenizer, prompt="plain").write("70123", length=431, depth=depth)
    assert len(written.question) + len(written.answer) == 431
    text = tokenizer.decode(written.question + written.answer, skip_special_tokens=True)
    shape = re.fullmatch(
        re.escape(PREAMBLE)
        + r"(.*)\nThe pass key is 70123\. Remember it\. 70123 is the pass key\.\n(.*)\n"
        + r"What is the pass key\? The pass key is 70123",
        text.lstrip(),
    )
    assert shape
    endless = " ".join([FILLER] * 20)
    assert all(endless.startswith(part) for part in shape.groups())
    before, after = map(len, shape.groups())
    assert before / (before + after) == pytest.approx(depth, abs=0.05)


def test_a_begin_mark_stands_first_where_the_tokenizer_puts_one():
    marked = byte_level(marks=True)
    assert Writer(marked, prompt="plain").write("70123", length=400, depth=0.5).question[0] == marked.bos_token_id
    bare = byte_level()
    assert bare.bos_token_id not in Writer(bare, prompt="plain").write("70123", length=400, depth=0.5).question


def test_chat_prompts_are_the_template_around_the_words_with_the_models_turn_opened():
    tokenizer = byte_level(marks=True)
    written = Writer(tokenizer, prompt="chat").write("70123", length=431, depth=0.5)
    assert len(written.question) + len(written.answer) == 431
    text = tokenizer.decode(written.question + written.answer)
    assert text.startswith("<s>user\n" + PREAMBLE)
    assert text.endswith("\nWhat is the pass key?</s>\n<s>assistant\nThe pass key is 70123")


def test_a_space_of_its_own_is_asked_for_by_nobody():
    letters = byte_level(0)
    written = Writer(letters, prompt="plain").write("70123", length=431, depth=0.5)
    assert letters.decode(written.answer) == "70123"
    assert letters.decode(written.question).endswith("The pass key is ")
    tokens = sentencepiece_like()
    space, joined = (tokens.convert_tokens_to_ids(token) for token in ("▁", "▁The"))
    seven = tokens.convert_tokens_to_ids("7")
    assert parted(tokens, [space, seven]) == ([space], [seven])
    assert parted(tokens, [joined, seven]) == ([], [joined, seven])
    assert parted(tokens, [space]) == ([], [space])  # an answer has a token


def test_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match="has none: use plain"):
        Writer(sentencepiece_like(), prompt="chat")


def test_a_length_without_room_names_the_shortest_there_is():
    tokenizer = byte_level(0)
    with pytest.raises(ValueError, match=r"100 tokens are too few, without filler it is (\d+)") as error:
        Writer(tokenizer, prompt="plain").write("70123", length=100, depth=0.5)
    shortest = int(str(error.value).split()[-1])
    assert Writer(tokenizer, prompt="plain").write("70123", length=shortest, depth=0.5)
    with pytest.raises(ValueError):
        Writer(tokenizer, prompt="plain").write("70123", length=shortest - 1, depth=0.5)


def test_shared_is_where_prompts_of_other_keys_part():
    writer = Writer(byte_level(), prompt="plain")
    one, other = (writer.write(key, length=400, depth=0.3) for key in ("70123", "91456"))
    assert one.shared == other.shared
    assert one.question[: one.shared] == other.question[: one.shared]
    deeper = writer.write("91456", length=400, depth=0.8)
    assert deeper.shared > one.shared and deeper.question[: one.shared] == one.question[: one.shared]


def greedy(model, question: list[int], count: int) -> list[int]:
    """The reference: the model's own greedy generation."""
    given = torch.tensor([question])
    model.generation_config.eos_token_id = None
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False)
    return out[0, len(question) :].tolist()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("chunk", [7, 512])
def test_a_hit_is_what_greedy_generation_calls_right(share, chunk, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", chunk)
    monkeypatch.setattr(passkey, "batch_tokens", lambda model: 170)
    model, generator = tiny(), torch.Generator().manual_seed(3)
    trunk = torch.randint(340, (60,), generator=generator).tolist()
    cells, expected = [], []
    for shared in (10, 37, 20, 60, 37):
        question = trunk[:shared] + torch.randint(340, (70 - shared,), generator=generator).tolist()
        answer = greedy(model, question, 3)
        wrongs = [None, 0, 1, 2][: 2 + shared % 3]
        changed = [[(t + 1) % 340 if i == wrong else t for i, t in enumerate(answer)] for wrong in wrongs]
        cells.append([Prompt(question, a, shared) for a in changed])
        expected.append([wrong is None for wrong in wrongs])
    prefix = prefix_of(model, cells=cells) if share else None
    assert hits(model, cells=cells, prefix=prefix) == expected


def test_answers_of_different_lengths_are_each_checked_whole():
    model = tiny()
    question = list(range(40, 71))
    answer = greedy(model, question, 5)
    longer = Prompt(question[:29], greedy(model, question[:29], 7), shared=20)
    prompts = [Prompt(question, answer, shared=20), longer, Prompt(question, [*answer[:4], 0], shared=20)]
    assert answer[4] != 0
    assert hits(model, cells=[prompts], prefix=prefix_of(model, cells=[prompts])) == [[True, True, False]]


def test_the_shared_prefix_is_computed_once_for_all_lengths(monkeypatch):
    model, seen, tokenizer = tiny(), [], byte_level()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    given = settings(samples=4)
    measure(model, label="tiny", tokenizer=tokenizer, settings=given)
    writer, own, prefixes = Writer(tokenizer, prompt="plain"), 0, []
    for length in given.lengths:
        for depth in given.depths:
            cell = [writer.write(key, length=length, depth=depth) for key in keys(given, length=length, depth=depth)]
            prefixes.append(min(p.shared for p in cell))
            own += sum(len(p.question + p.answer) - 1 - prefixes[-1] for p in cell)
    assert len(given.lengths) > 1 and sum(seen) == max(prefixes) + own


def test_logits_are_made_for_the_answers_only():
    model, rows, tokenizer = tiny(), [], byte_level()
    model.lm_head.register_forward_hook(lambda m, i, output: rows.append(output.shape[1]))
    measure(model, label="tiny", tokenizer=tokenizer, settings=settings())
    assert max(rows) <= max(len(tokenizer(f" {k}")["input_ids"]) for k in range(10000, 99999, 7))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tiny(), True),
        (tiny(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), True),
        (tiny(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), False),
        (GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), True),
        (MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=8)), False),
    ],
    ids=["llama", "yarn", "dynamic", "neox", "sliding"],
)
def test_a_prefix_is_shared_only_where_its_cache_serves_every_length(model, expected):
    assert shareable(model) is expected
    model.eval()
    result = measure(model, label="m", tokenizer=byte_level(), settings=settings(samples=1))
    assert result["passkey"]["m"]["350"]["trials"] == 3


def test_keys_depend_on_seed_and_cell_only():
    given = settings(samples=4)
    assert keys(given, length=350, depth=0.4) == keys(settings(samples=9), length=350, depth=0.4)[:4]
    assert keys(given, length=350, depth=0.4) != keys(given, length=310, depth=0.4)
    assert keys(given, length=350, depth=0.4) != keys(settings(seed=2), length=350, depth=0.4)
    assert all(re.fullmatch("[1-9][0-9]{4}", k) for k in keys(given, length=350, depth=0.4))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"depths": [0.5, 1.1]}, "from 0 to 1"),
        ({"depths": [0.501, 0.502]}, "two digits behind the point"),
        ({"lengths": [350, 350]}, "stands twice"),
        ({"lengths": []}, "at least 1"),
        ({"prompt": "base"}, "plain"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, rule):
    with pytest.raises(ValidationError, match=rule):
        settings(**changes)


def test_stage_writes_the_same_bytes_again_also_beyond_the_models_positions(tmp_path):
    tiny(max_position_embeddings=64).save_pretrained(tmp_path / "odd")
    byte_level().save_pretrained(tmp_path / "odd")
    written = []
    for name in ("a", "b"):
        stage(tmp_path / "odd", tmp_path / name / "odd.json", settings(), FLOAT32)
        written.append((tmp_path / name / "odd.json").read_bytes())
    assert written[0] == written[1]
    result = json.loads(written[0])["passkey"]["odd"]
    assert result["prompt"] == "plain"
    assert result["350"]["trials"] == 9 == sum(cell["trials"] for cell in result["350"]["depth"].values())
    assert list(result["350"]["depth"]) == ["0.00", "0.40", "1.00"]


def test_a_tokenizer_that_cannot_write_digits_is_refused():
    """All keys would have one answer, which a model that always says the same would find."""
    raw = Tokenizer(
        models.WordLevel({"<unk>": 0, **{w: n for n, w in enumerate(set((PREAMBLE + FILLER).split()), 1)}}, "<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    with pytest.raises(
        ValueError, match="^passkey: the model's tokenizer cannot write the key 12345: its tokens for it read '<unk>'$"
    ):
        Writer(words, prompt="plain").write("12345", length=400, depth=0.5)


@pytest.mark.parametrize("decoder", [None, decoders.ByteLevel()])
def test_a_tokenizer_without_a_decoder_writes_digits_all_the_same(decoder):
    words = byte_level()
    words.backend_tokenizer.decoder = decoder
    assert Writer(words, prompt="plain").write("12345", length=400, depth=0.5).answer
