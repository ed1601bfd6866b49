"""Perplexity counts each token once, with the context it claims, and computes no logits that nobody asked for."""

import csv
import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pydantic import ValidationError
from specimens import ADAPTER, FLOAT32
from test_adapter import nudged
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from longlora.data.tokens import write
from longlora.evaluation import perplexity, windows
from longlora.evaluation.perplexity import Perplexity, Sliding, chosen_targets, controlled, measure, sliding_windows
from longlora.evaluation.windows import Window, nats
from longlora.model.adapter import attach
from longlora.stages.perplexity import stage

torch.set_num_threads(1)  # matrices this small are slower on two

VOCABULARY = 53
targets = partial(windows.targets, setting="perplexity.lengths")


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def texts(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(VOCABULARY, size=n).astype(np.uint16) for n in lengths]


def settings(**changes) -> Perplexity:
    return Perplexity(
        **{
            "lengths": [19, 41, 30],
            "last": 6,
            "samples": 5,
            "per_document": None,
            "seed": 2,
            "sliding": None,
            "bands": None,
            **changes,
        }
    )


def reference(model: LlamaForCausalLM, tokens: np.ndarray, *, context: int) -> float:
    """Nats of the last token after `context` tokens, the plainest way: one forward pass, one softmax, in float64."""
    prefix = torch.tensor(tokens[-1 - context : -1].astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=prefix).logits[0, -1].double()
    return -torch.log_softmax(logits, dim=-1)[int(tokens[-1])].item()


def test_controlled_nats_are_those_of_each_last_token_in_its_own_window():
    model, documents = tiny(), texts(90, 20, 77)
    chosen = chosen_targets(documents, settings())
    sums, _ = controlled(model, documents=documents, chosen=chosen, settings=settings())
    assert list(sums) == [19, 30, 41]
    for length, sums_P in sums.items():
        for place, got in zip(chosen, sums_P, strict=True):
            tokens = documents[place.document][place.end - length : place.end]
            expected = sum(reference(model, tokens[: length - k], context=length - k - 1) for k in range(6))
            assert got == pytest.approx(expected, rel=1e-5)


def test_places_lie_inside_documents_and_score_no_token_twice():
    chosen = targets([100, 40, 41, 203], longest=41, last=6, samples=1000, seed=0)
    assert {p.document for p in chosen} == {0, 2, 3}
    for p in chosen:
        assert 41 <= p.end <= [100, 40, 41, 203][p.document]
    scored = [(p.document, t) for p in chosen for t in range(p.end - 6, p.end)]
    assert len(scored) == len(set(scored))
    assert len(chosen) == 10 + 1 + 28


def test_places_are_a_function_of_the_seed():
    some = {seed: targets([500], longest=41, last=6, samples=9, seed=seed) for seed in (1, 2)}
    assert some[1] == targets([500], longest=41, last=6, samples=9, seed=1) != some[2]
    assert some[1] == sorted(some[1], key=lambda p: p.end)


def test_one_document_gives_no_more_places_than_asked_for():
    lengths = [203, 100, 60, 41]
    every = Counter(p.document for p in targets(lengths, longest=41, last=6, samples=99, seed=3))
    assert every == {0: 28, 1: 10, 2: 4, 3: 1}
    for most in (1, 3):
        some = targets(lengths, longest=41, last=6, samples=99, per_document=most, seed=3)
        assert Counter(p.document for p in some) == {d: min(most, count) for d, count in every.items()}
    assert len(targets(lengths, longest=41, last=6, samples=2, per_document=1, seed=3)) == 2


def test_no_document_long_enough_names_the_longest():
    with pytest.raises(
        ValueError, match=r"no held-out document has 41 tokens.*longest has 40: lower perplexity.lengths,"
    ):
        targets([12, 40, 3], longest=41, last=6, samples=5, seed=0)
    with pytest.raises(ValueError, match="the longest has 0"):
        targets([], longest=41, last=6, samples=5, seed=0)


@pytest.mark.parametrize(("length", "stride"), [(11, 4), (11, 10), (30, 7), (5000, 100)])
def test_sliding_scores_every_token_once_with_the_longest_context_the_protocol_gives(length, stride):
    sizes = [97, 1, 11, 8, 6000]
    all_windows = sliding_windows(sizes, length=length, sliding=Sliding(stride=stride, tokens=10**6))
    scored = [(w.document, t) for w in all_windows for t in range(w.end - w.scored, w.end)]
    assert sorted(scored) == [(d, t) for d, size in enumerate(sizes) for t in range(1, size)]
    for w in all_windows:
        assert w.end - w.start <= length
        first_scored = w.end - w.scored
        assert w.start == 0 or first_scored - w.start >= length - stride


def test_sliding_ends_with_its_budget():
    windows = sliding_windows([97, 50], length=30, sliding=Sliding(stride=7, tokens=100))
    assert sum(w.scored for w in windows) == 100


def test_a_long_first_window_is_read_once_and_scores_as_one_that_is_read_at_once(monkeypatch):
    model, documents, seen = tiny(), texts(90, 55, 20), []
    given = settings(lengths=[41], samples=1, sliding=Sliding(stride=5, tokens=1000))
    at_once = measure_to_memory(model, documents, given)["sliding_perplexity"]["tiny"]["41"]
    monkeypatch.setattr(perplexity, "SCORED", 8)
    monkeypatch.setattr(windows, "CHUNK", 7)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    in_pieces = perplexity.slide(model, documents=documents, settings=given, sliding=given.sliding)["41"]
    assert in_pieces["value"] == pytest.approx(at_once["value"], rel=1e-5)
    windows_ = sliding_windows([90, 55, 20], length=41, sliding=given.sliding)
    assert sum(seen) == sum(w.end - w.start - 1 for w in windows_)
    assert [w.scored for w in windows_ if w.start == 0] == [40, 40, 19]


def test_sliding_perplexity_is_the_mean_over_all_tokens_of_a_document():
    model, documents = tiny(), texts(60)
    given = settings(lengths=[19], samples=1, sliding=Sliding(stride=5, tokens=1000))
    with_file = measure_to_memory(model, documents, given)
    expected, scored_to = 0.0, 1
    while scored_to < 60:
        end = min(19 if scored_to == 1 else scored_to + 5, 60)
        for t in range(scored_to, end):
            expected += reference(model, documents[0][: t + 1], context=t - max(0, end - 19))
        scored_to = end
    result = with_file["sliding_perplexity"]["tiny"]["19"]
    assert result["value"] == pytest.approx(np.exp(expected / 59), rel=1e-4)
    assert result["tokens"] == 59


def test_position_nats_are_each_tokens_own_with_all_of_its_window_before_it(monkeypatch):
    model, documents = tiny(), texts(90, 20, 77)
    given = settings(lengths=[19, 42], bands=3)
    expected: dict[int, list[float]] = {14: [], 28: [], 42: []}
    for place in targets([90, 20, 77], longest=42, last=6, samples=5, seed=2):
        tokens = documents[place.document][place.end - 42 : place.end]
        for position in range(1, 42):
            expected[position // 14 * 14 + 14].append(reference(model, tokens[: position + 1], context=position))
    for size in (512, 5, 1):  # tokens of a piece
        monkeypatch.setattr(windows, "CHUNK", size)
        result = measure_to_memory(model, documents, given)
        found = result["position_nats"]["tiny"]
        assert [int(k) for k in found] == [14, 28, 42]
        for end, figures in found.items():
            assert figures["value"] == pytest.approx(np.mean(expected[int(end)]), rel=1e-4)
            assert figures["low"] < figures["value"] < figures["high"]
        without = measure_to_memory(model, documents, settings(lengths=[19, 42]))["perplexity"]["tiny"]["42"]
        assert result["perplexity"]["tiny"]["42"]["value"] == pytest.approx(without["value"], rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_whose_cache_does_not_serve_longer_texts_is_read_once_and_its_logits_made_in_pieces(
    monkeypatch, adapted
):
    model, documents = tiny(), texts(90)
    if adapted:
        model = nudged(attach(model, ADAPTER)).eval()
    chosen = [Window(0, 0, 40, 39), Window(0, 33, 73, 39)]
    cached = windows.token_nats(model, documents=documents, windows=chosen)
    monkeypatch.setattr(windows, "shareable", lambda model: False)
    monkeypatch.setattr(windows, "batch_tokens", lambda model: 80)
    monkeypatch.setattr(windows, "BATCH_LOGITS", 7 * 2 * VOCABULARY)
    rows, reads = [], []
    model.get_output_embeddings().register_forward_hook(lambda m, i, output: rows.append(output.shape[1]))
    whole = model.get_base_model() if adapted else model
    whole.model.layers[0].register_forward_hook(lambda m, i, output: reads.append(1))
    assert windows.token_nats(model, documents=documents, windows=chosen) == pytest.approx(cached, rel=1e-4)
    assert rows == [7, 7, 7, 7, 7, 4] and reads == [1]
    assert whole.base_model is whole.model
    assert windows.nats(model, documents=documents, windows=chosen) == pytest.approx(cached.sum(axis=1), rel=1e-4)


def test_a_family_whose_layers_carry_what_its_head_asks_for_is_read_once_too():
    torch.manual_seed(5)
    config = FalconH1Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8,
        lm_head_multiplier=3.0,
    )  # fmt: skip
    model, documents = FalconH1ForCausalLM(config).eval(), texts(90)
    chosen = [Window(0, 0, 40, 39), Window(0, 33, 73, 39)]
    assert not windows.shareable(model)
    found = windows.token_nats(model, documents=documents, windows=chosen).sum(axis=1)
    assert found == pytest.approx(windows.nats(model, documents=documents, windows=chosen), rel=1e-5)


def test_a_model_over_several_devices_is_read_once_too(monkeypatch):
    model, documents = tiny(), texts(90)
    chosen = [Window(0, 0, 40, 39)]
    plain = windows.token_nats(model, documents=documents, windows=chosen)
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))
    monkeypatch.setattr(windows, "shareable", lambda model: False)
    monkeypatch.setattr(windows, "BATCH_LOGITS", 7 * VOCABULARY)
    reads = []
    model.model.layers[0].register_forward_hook(lambda m, i, output: reads.append(1))
    assert windows.token_nats(model, documents=documents, windows=chosen) == pytest.approx(plain, rel=1e-4)
    assert reads == [1]


def test_pieces_of_logits_are_judged_on_the_gpu_that_has_them(monkeypatch):
    """`meta` stands for the last of several GPUs, on which are the hidden states, and so the logits."""
    model, places = tiny(), iter(["cpu"])
    monkeypatch.setattr(
        type(model), "device", property(lambda self: torch.device(next(places)))
    )  # asked for the tokens
    monkeypatch.setattr(windows, "batch_tokens", lambda model: 100)
    monkeypatch.setattr(windows, "spread", lambda work, batches, model: [work(batch) for batch in batches])
    monkeypatch.setattr(windows, "shareable", lambda model: False)
    judged = []

    def head(input_ids: torch.Tensor, use_cache: bool, logits_to_keep: torch.Tensor) -> SimpleNamespace:
        assert logits_to_keep.device.type == "cpu"
        return SimpleNamespace(logits=torch.empty(1, len(logits_to_keep), VOCABULARY, device="meta"))

    def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        judged.append((logits.device.type, targets.device.type))
        return torch.zeros(targets.shape)

    monkeypatch.setattr(windows, "head_of", lambda model, tokens_BL: head)
    monkeypatch.setattr(windows.F, "cross_entropy", cross_entropy)
    windows.token_nats(model, documents=texts(90), windows=[Window(0, 0, 40, 39)])
    assert judged == [("meta", "meta")]


def test_a_familys_own_way_with_logits_is_kept_where_they_are_made_in_pieces(monkeypatch):
    torch.manual_seed(4)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(
        vocab_size=VOCABULARY, num_key_value_heads=1, final_logit_softcapping=0.05, sliding_window=12, **sizes
    )
    model, documents = Gemma2ForCausalLM(config).eval(), texts(90)
    chosen = [Window(0, 0, 40, 39), Window(0, 33, 73, 39)]
    assert not windows.shareable(model)
    found = windows.token_nats(model, documents=documents, windows=chosen)
    assert found.sum(axis=1) == pytest.approx(windows.nats(model, documents=documents, windows=chosen), rel=1e-5)
    config.final_logit_softcapping = None
    assert np.abs(found - windows.token_nats(model, documents=documents, windows=chosen)).max() > 1e-3


def test_places_are_chosen_once_and_the_longest_windows_read_once(monkeypatch):
    calls = []
    for name in ("targets", "nats", "token_nats"):
        real = getattr(perplexity, name)
        monkeypatch.setattr(perplexity, name, lambda *a, real=real, n=name, **k: calls.append(n) or real(*a, **k))
    measure_to_memory(tiny(), texts(90, 77), settings(lengths=[19, 30, 42], bands=3))
    assert calls == ["targets", "token_nats", "nats", "nats"]


def measure_to_memory(model, documents, given, tmp="/dev/null"):
    from pathlib import Path

    return measure(model, label="tiny", documents=documents, settings=given, parts=Path(tmp))


@pytest.mark.parametrize("bands", [None, 1])
def test_learned_positions_that_end_before_the_longest_window_are_said_before_anything_is_read(bands, monkeypatch):
    short = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=20, n_embd=24, n_layer=1, n_head=3))
    monkeypatch.setattr(short, "forward", lambda **k: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="this model has 20 positions"):
        measure_to_memory(short, texts(60), settings(bands=bands))


def test_logits_are_made_for_scored_tokens_only():
    model, documents = tiny(), texts(90, 77)
    rows = []
    model.lm_head.register_forward_hook(lambda m, i, output: rows.append(output.shape[:2]))
    chosen = chosen_targets(documents, settings())
    controlled(model, documents=documents, chosen=chosen, settings=settings())
    assert rows == [(len(chosen), 6)] * 3


def test_nats_do_not_depend_on_what_else_is_in_the_batch():
    model, documents = tiny(), texts(90)
    windows = [Window(0, 10 * k, 10 * k + 30, 7) for k in range(6)]
    together = nats(model, documents=documents, windows=windows)
    alone = [nats(model, documents=documents, windows=[w])[0] for w in windows]
    assert together == pytest.approx(alone, rel=1e-5)


def test_batches_keep_windows_of_other_shapes_apart_and_give_each_its_own_result():
    model, documents = tiny(), texts(90)
    windows = [Window(0, 0, 30, 7), Window(0, 5, 24, 3), Window(0, 40, 70, 7), Window(0, 2, 32, 4)]
    mixed = nats(model, documents=documents, windows=windows)
    alone = [nats(model, documents=documents, windows=[w])[0] for w in windows]
    assert mixed == pytest.approx(alone, rel=1e-5)


def test_a_model_with_nan_weights_scores_null_and_not_a_number():
    model, documents = tiny(), texts(90)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    figures = measure_to_memory(model, documents, settings())["perplexity"]["tiny"]["30"]
    assert figures["value"] is figures["low"] is figures["high"] is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"lengths": [6, 41]}, "must be longer than last = 6, at least 7"),
        ({"lengths": [41, 41]}, "stands twice"),
        ({"sliding": {"stride": 19, "tokens": 5}}, "stride = 19 must be below the shortest length, 19"),
        ({"samples": 0}, "greater than 0"),
        ({"bands": 9}, "bands = 9 must divide the longest length, 41"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_rule(changes, rule):
    with pytest.raises(ValidationError, match=rule):
        settings(**changes)


def test_stage_writes_the_same_bytes_again_and_the_parts_that_make_up_the_score(tmp_path):
    tiny().save_pretrained(tmp_path / "odd")
    write(texts(90, 20, 77), tmp_path / "heldout.safetensors", vocabulary=VOCABULARY)
    written = []
    given = settings(sliding=Sliding(stride=5, tokens=90))
    for name in ("a", "b"):
        out = tmp_path / name / "odd.json"
        stage(tmp_path / "odd", tmp_path / "heldout.safetensors", out, out.with_suffix(".csv"), given, FLOAT32)
        written.append(out.read_bytes() + out.with_suffix(".csv").read_bytes())
    assert written[0] == written[1]
    result = json.loads(out.read_text())
    assert result["sliding_perplexity"]["odd"]["stride"] == 5
    scores = result["perplexity"]["odd"]
    assert (scores["places"], scores["documents_too_short"]) == (5, 1)
    for length in (19, 30, 41):
        rows = [r for r in csv.DictReader(out.with_suffix(".csv").open()) if int(r["length"]) == length]
        assert len(rows) == 5
        total = sum(float(r["nats"]) for r in rows)
        figures = scores[str(length)]
        assert figures["value"] == pytest.approx(np.exp(total / 30), rel=1e-6)
        assert figures["tokens"] == 30
        assert figures["low"] <= figures["value"] <= figures["high"]
