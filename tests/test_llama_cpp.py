"""llama.cpp itself, through its Python package: an exported file has the model's tokens, logits and greedy text.

    pip install llama-cpp-python    # compiles llama.cpp, some ten minutes

The package is no dependency, so without it these are skipped.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import LENGTH, ROPES, TINY, apart, logits, made, opened, tokens
from test_gguf_tokenizer import SPLITS, TEXT, trained
from transformers import LlamaConfig

from longlora.model.gguf import write
from longlora.model.load import open_tokenizer
from longlora.model.position import extend

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@contextmanager
def read(file: Path, *, context: int, **settings: Any) -> Iterator[Any]:
    """The file as llama.cpp opens it: no setting of rotation is given, so what the file says holds."""
    usual = {"n_threads": 1, "n_gpu_layers": 0, "n_batch": context, "n_ctx": context, "verbose": False}
    with closing(llama_cpp.Llama(str(file), **usual | settings)) as model:
        yield model


def scores(file: Path, ids: list[int], *, context: int) -> np.ndarray:
    with read(file, context=context, logits_all=True, type_k=0, type_v=0) as model:  # a cache in float32
        model.eval(ids)
        return np.array(model.scores[: len(ids)], dtype=np.float64)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("shape", [{}, {"tied": False, "bias": True}], ids=["tied", "with a head and biases"])
def test_the_logits_are_the_models(tmp_path, rope, shape):
    model = made(tmp_path / "model", **shape, **rope)
    write(model, out=tmp_path / "a.gguf")
    own = logits(opened(model), tokens())
    assert apart(scores(tmp_path / "a.gguf", tokens(), context=LENGTH + 6), own) < 1e-3


@pytest.mark.parametrize(("dtype", "error"), [("f16", 2e-2), ("bf16", 5e-2)])
def test_half_precision_is_read_too(tmp_path, dtype, error):
    model = made(tmp_path / "model", **ROPES["yarn"])
    write(model, out=tmp_path / "a.gguf", dtype=dtype)
    own = logits(opened(model), tokens())
    # ggml rounds what it multiplies with such matrices too
    assert 1e-5 < apart(scores(tmp_path / "a.gguf", tokens(), context=LENGTH + 6), own) < error


@pytest.mark.parametrize(
    ("rule", "begins"), [("tiny", False), *((rule, begins) for rule in SPLITS for begins in (False, True))]
)
def test_text_becomes_the_same_tokens_and_they_the_same_text(tmp_path, rule, begins):
    model = made(tmp_path / "model")
    own = open_tokenizer(TINY) if rule == "tiny" else trained(rule, begins=begins)
    own.save_pretrained(model)
    config = LlamaConfig.from_pretrained(model)
    config.vocab_size = len(own)
    torch.manual_seed(0)
    type(opened(TINY))(config).save_pretrained(model)
    write(model, out=tmp_path / "a.gguf")
    with read(tmp_path / "a.gguf", context=8, vocab_only=True) as words:
        for text in (TEXT, TEXT[::-1], " ".join(TEXT), "<bos>so<eos> ", "I'LL", " ", "\n\n \n", ""):
            ids = own(text)["input_ids"]
            assert words.tokenize(text.encode(), add_bos=True, special=True) == ids, text
            shown = words.detokenize(ids, special=True)
            assert shown.removeprefix(b"<bos>" * begins) == text.encode()


@pytest.mark.parametrize("method", ["none", "linear", "yarn"])
def test_greedy_text_of_the_demos_base_is_transformers(tmp_path, method):
    model, words = opened(TINY), open_tokenizer(TINY)
    config = extend(model.config, method=method, context=1024)
    longer = type(model)(config).eval()
    longer.load_state_dict(model.state_dict())
    longer.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    write(tmp_path / "model", out=tmp_path / "a.gguf")
    prompt = words(("The state of the Union is " * 30)[: 300 if method == "none" else 700])["input_ids"]
    room = 60
    written = longer.generate(torch.tensor([prompt]), max_new_tokens=room, do_sample=False)[0, len(prompt) :].tolist()
    own = logits(longer, prompt)
    assert apart(scores(tmp_path / "a.gguf", prompt, context=1024), own) < 1e-3
    with read(tmp_path / "a.gguf", context=1024, type_k=0, type_v=0) as theirs:
        told = theirs.create_completion(prompt, max_tokens=room, temperature=0.0)
    assert told["choices"][0]["text"] == words.decode(written, skip_special_tokens=True)
    assert told["usage"]["prompt_tokens"] == len(prompt)
