"""A piece over a cache is read as transformers reads it, in values, and without a mask; where a mask says more, it is obeyed."""

import pytest
import torch
from specimens import folder
from test_passkey import SIZES, tiny
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from longlora.model import prefill
from longlora.model.load import open_model

torch.set_num_threads(1)

MODELS = {
    "llama": tiny,
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval(),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=340, n_embd=24, n_layer=2, n_head=3, scale_attn_by_inverse_layer_idx=True)
    ).eval(),
}


def pieces(model, tokens_BL: torch.Tensor, **given) -> torch.Tensor:
    """Logits of a text that is read piece by piece, a single token among them."""
    cache, logits = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for piece in tokens_BL.split([7, 11, 1, 21], dim=1):
            seen = cache.get_seq_length() + piece.shape[1]
            more = {name: mask_BL[:, :seen] for name, mask_BL in given.items()}
            logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_over_a_cache_is_what_transformers_reads_and_no_mask_is_made(name, monkeypatch):
    model, tokens_BL = MODELS[name](), torch.arange(80).view(2, 40)
    expected, joined, own = pieces(model, tokens_BL), [], prefill.in_two
    monkeypatch.setattr(prefill, "in_two", lambda *given, **more: joined.append(1) or own(*given, **more))
    monkeypatch.setattr(prefill, "sdpa_mask", lambda **given: pytest.fail("a mask was made"))
    prefill.unmask(model)
    torch.testing.assert_close(pieces(model, tokens_BL), expected, atol=1e-5, rtol=1e-5)
    every = {"attention_mask": torch.ones(2, 40, dtype=torch.long)}
    torch.testing.assert_close(pieces(model, tokens_BL, **every), expected, atol=1e-5, rtol=1e-5)
    assert (
        len(joined) == 2 * 2 * model.config.num_hidden_layers
    )  # the first piece has nothing before it, the third is one token


def test_padding_is_obeyed():
    model, tokens_BL = tiny(), torch.arange(80).view(2, 40)
    padded = {"attention_mask": torch.ones(2, 40, dtype=torch.long)}
    padded["attention_mask"][0, :5] = 0
    expected = pieces(model, tokens_BL, **padded)
    prefill.unmask(model)
    torch.testing.assert_close(pieces(model, tokens_BL, **padded)[:, 5:], expected[:, 5:], atol=1e-5, rtol=1e-5)


def test_a_bias_of_positions_is_added_behind_a_mask():
    q, k, bias = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 3, 9)
    hidden = torch.ones(3, 9, dtype=torch.bool).tril(6).logical_not()
    expected = scaled_dot_product_attention(q, k, k, attn_mask=bias.masked_fill(hidden, -torch.inf))
    out_BNHD, _ = prefill.forward(torch.nn.Module(), q, k, k, None, position_bias=bias)
    torch.testing.assert_close(out_BNHD.transpose(1, 2), expected)


def test_a_model_that_is_opened_on_a_cpu_reads_so(tmp_path):
    model = open_model(folder(tmp_path / "whole"))
    assert model.config._attn_implementation == prefill.NAME
