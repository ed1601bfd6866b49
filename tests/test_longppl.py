"""Key tokens and LongPPL are those of the definition, computed one token at a time."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from specimens import FLOAT32
from test_perplexity import VOCABULARY, reference, texts, tiny

from longlora.data.tokens import write
from longlora.evaluation import windows
from longlora.evaluation.longppl import LongPPL, key_tokens, measure
from longlora.stages.keytokens import stage as keytokens_stage
from longlora.stages.longppl import stage as longppl_stage

torch.set_num_threads(1)  # matrices this small are slower on two


def settings(**changes) -> LongPPL:
    given = {"length": 45, "short": 12, "stride": 5, "samples": 3}
    return LongPPL(**given | {"alpha": 0.4, "beta": -4.5, "seed": 2} | changes)


def by_definition(evaluator, documents, given: LongPPL, place: dict) -> list[int]:
    """Positions of key tokens, as the authors' `find_key_token` goes through a text (PKU-ML/LongPPL, longppl/longppl.py), with one
    forward pass per token and context."""
    tokens = documents[place["document"]][place["end"] - given.length : place["end"]]
    keys, sliding_window = [], given.stride
    for start in range(0, given.length - given.short, given.stride):
        if start + given.short + sliding_window > given.length:
            sliding_window = given.length - start - given.short
        for position in range(start + given.short, start + given.short + sliding_window):
            long = -reference(evaluator, tokens[: position + 1], context=position)
            short = -reference(evaluator, tokens[: position + 1], context=position - start)
            if long - short > given.alpha and long > given.beta:
                keys.append(position)
    return keys


def test_key_tokens_and_longppl_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(windows, "CHUNK", 7)
    evaluator, model, documents, given = tiny(1), tiny(2), texts(90, 20, 95), settings()
    keys = key_tokens(evaluator, documents=documents, settings=given)
    total, count = 0.0, 0
    assert {p["document"] for p in keys["places"]} == {0, 2}
    assert len(keys["places"]) == 3 and keys["looked_at"] == 3 * 33  # six blocks of five, and three more
    for place in keys["places"]:
        assert place["keys"] == by_definition(evaluator, documents, given, place)
        tokens = documents[place["document"]][place["end"] - 45 : place["end"]]
        total += sum(reference(model, tokens[: k + 1], context=k) for k in place["keys"])
        count += len(place["keys"])
    assert 5 < count < 80
    found = measure(model, label="m", evaluator="judge", documents=documents, keys=keys)["longppl"]["m"]["judge"]
    assert found["tokens"] == count
    assert found["value"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert found["low"] <= found["value"] <= found["high"]


def test_both_thresholds_count():
    evaluator, documents = tiny(1), texts(150)

    def picked(alpha: float, beta: float) -> int:
        given = settings(alpha=alpha, beta=beta)
        return sum(len(p["keys"]) for p in key_tokens(evaluator, documents=documents, settings=given)["places"])

    count = {(a, b): picked(a, b) for a in (0.4, 1.0) for b in (-4.5, -3.5)}
    assert count[0.4, -4.5] > count[1.0, -4.5] > 0 and count[0.4, -4.5] > count[0.4, -3.5] > 0


def test_no_key_token_is_null_and_no_number():
    documents = texts(150)
    keys = key_tokens(tiny(1), documents=documents, settings=settings(alpha=99.0))
    found = measure(tiny(), label="m", evaluator="e", documents=documents, keys=keys)["longppl"]["m"]["e"]
    assert found == {"value": None, "low": None, "high": None, "tokens": 0, "length": settings().length}


def test_broken_weights_are_null():
    model, documents = tiny(), texts(150)
    keys = key_tokens(tiny(1), documents=documents, settings=settings())
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    found = measure(model, label="m", evaluator="e", documents=documents, keys=keys)["longppl"]["m"]["e"]
    assert found["value"] is None and found["tokens"] > 0


@pytest.mark.parametrize("changes", [{"short": 45}, {"stride": 12}, {"length": 9}])
def test_contexts_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValidationError, match="stride < short < length is asked"):
        settings(**changes)


def test_documents_that_are_too_short_are_said():
    with pytest.raises(
        ValueError, match="has 45 tokens, the longest window; the longest has 44: lower longppl.length,"
    ):
        key_tokens(tiny(), documents=texts(44, 20), settings=settings())


def test_stages_write_the_same_bytes_again(tmp_path):
    for name, seed in (("judge", 1), ("odd", 2)):
        tiny(seed).save_pretrained(tmp_path / name)
    write(texts(90, 150), tmp_path / "heldout.safetensors", vocabulary=VOCABULARY)
    for run in ("a", "b"):
        keys, scores = tmp_path / run / "keys/judge.json", tmp_path / run / "odd.json"
        keytokens_stage(tmp_path / "judge", tmp_path / "heldout.safetensors", keys, settings(), FLOAT32)
        longppl_stage(tmp_path / "odd", keys, tmp_path / "heldout.safetensors", scores, settings(), FLOAT32)
    for name in ("keys/judge.json", "odd.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads(scores.read_text())["longppl"]["odd"]["judge"]["tokens"] > 0
