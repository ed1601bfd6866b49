"""llama.cpp itself, as the package xllamacpp holds it: an exported file has the model's tokens, log-probabilities and greedy text.

No setting of rotation is given, so what the file says holds.
"""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import xllamacpp
from test_gguf import CONTEXT, ROPES, TINY, TWO, logits, made, opened, tokens
from test_gguf_tokenizer import SPLITS, TEXT, trained
from transformers import LlamaConfig

from longlora.model.gguf import write
from longlora.model.load import open_tokenizer
from longlora.model.position import extend


class Opened:
    """A file as llama.cpp's server has it, on a loopback port."""

    def __init__(self, file: Path, *, context: int) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_parallel, settings.cpuparams.n_threads, settings.n_gpu_layers = 1, 1, 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup, settings.fit_params, settings.port, settings.verbosity = False, False, 0, 0
        self.server = xllamacpp.Server(settings)

    def post(self, path: str, **body: Any) -> Any:
        request = Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as answer:
            return json.load(answer)

    def next_token(self, ids: list[int], *, vocabulary: int) -> np.ndarray:
        """Log-probabilities of what comes after `ids`."""
        (letter,) = self.post("/tokenize", content="w")["tokens"]
        asked = {"n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
        # A letter is chosen, for nothing is told of half a character; the log-probabilities are those before the bias.
        told = self.post("/completion", prompt=ids, logit_bias=[[letter, 1000]], **asked)
        (first,) = told["completion_probabilities"]
        by_token = {each["id"]: each["logprob"] for each in first["top_logprobs"]}
        return np.array([by_token[token] for token in range(vocabulary)])


def after(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits(model, ids)[-1]), dim=-1).numpy()


def apart(file: Path, model: torch.nn.Module, ids: list[int], *, context: int) -> float:
    """Nats."""
    theirs = Opened(file, context=context).next_token(ids, vocabulary=model.config.vocab_size)
    return np.abs(theirs - after(model, ids)).max()


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("shape", [{}, {"tied": False, "bias": True}], ids=["tied", "with a head and biases"])
def test_log_probabilities_are_the_models(tmp_path, rope, shape):
    model = made(tmp_path / "model", **shape, **rope)
    write(model, out=tmp_path / "a.gguf")
    assert apart(tmp_path / "a.gguf", opened(model), tokens(), context=CONTEXT) < 1e-3


@pytest.mark.parametrize(("dtype", "error"), [("f16", 0.1), ("bf16", 0.5)])
def test_half_precision_is_read_too(tmp_path, dtype, error):
    model = made(tmp_path / "model", **ROPES["yarn"])
    write(model, out=tmp_path / "a.gguf", dtype=dtype)
    # ggml rounds what it multiplies with such matrices too
    assert 1e-3 < apart(tmp_path / "a.gguf", opened(model), tokens(), context=CONTEXT) < error


def test_of_two_lists_the_context_that_a_file_is_opened_with_takes_one(tmp_path):
    window = 256  # llama.cpp rounds contexts up to multiples of it
    model = made(tmp_path / "model", context=3 * window, **TWO | {"original_max_position_embeddings": window})
    write(model, out=tmp_path / "a.gguf")
    short, long = Opened(tmp_path / "a.gguf", context=window), Opened(tmp_path / "a.gguf", context=window + 1)
    own, size = opened(model), opened(model).config.vocab_size
    few, many = tokens(window - 1), tokens(window + 40)
    assert np.abs(short.next_token(few, vocabulary=size) - after(own, few)).max() < 1e-3
    assert np.abs(long.next_token(many, vocabulary=size) - after(own, many)).max() < 1e-3
    assert np.abs(long.next_token(few, vocabulary=size) - after(own, few)).max() > 0.1


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
    words = Opened(tmp_path / "a.gguf", context=8)
    for text in (TEXT, TEXT[::-1], " ".join(TEXT), "<bos>so<eos> ", "I'LL", " ", "\n\n \n", ""):
        ids = own(text)["input_ids"]
        assert words.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids, text
        shown = words.post("/detokenize", tokens=ids)["content"]
        assert shown.removeprefix("<bos>" * begins) == text


@pytest.mark.parametrize("method", ["none", "linear", "yarn", "longrope"])
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
    theirs = Opened(tmp_path / "a.gguf", context=1024)
    assert np.abs(theirs.next_token(prompt, vocabulary=config.vocab_size) - after(longer, prompt)).max() < 1e-3
    told = theirs.post("/v1/completions", prompt=prompt, max_tokens=room, temperature=0.0)
    assert told["choices"][0]["text"] == words.decode(written, skip_special_tokens=True)
    assert told["usage"]["prompt_tokens"] == len(prompt)
