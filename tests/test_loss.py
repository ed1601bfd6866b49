"""The chunked loss against the plain one."""

import pytest
import torch
from specimens import llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from longlora.training.loss import chunk_loss, chunked_cross_entropy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_loss_and_gradients_equal_the_plain_ones(tied, chunk):
    model = llama(tied=tied).double()
    tokens_BL = torch.randint(300, (3, 41))
    labels_BL = tokens_BL.clone()
    labels_BL[0, :20] = -100
    logits_BLV = model(input_ids=tokens_BL).logits
    plain = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten())
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chunk_loss(model, chunk=chunk)
    chunked = model(input_ids=tokens_BL, labels=labels_BL).loss
    chunked.backward()
    torch.testing.assert_close(chunked, plain)
    got = {name.replace("lm_head.head", "lm_head"): p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_in_bfloat16_the_value_of_a_long_sequence_is_right_too(autocast, reduction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (8193, 90))
    weight /= 4
    labels_BL = torch.randint(90, (1, 8193), generator=generator)
    labels_BL[0, 5000:5100] = -100
    grads = []
    for dtype in (torch.float64, torch.float32 if autocast else torch.bfloat16):
        hidden_BLD, weight_VD = hidden[None].to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if dtype == torch.float64:
            logits_NV = (hidden_BLD @ weight_VD.T)[0, :-1]
            plain = loss = torch.nn.functional.cross_entropy(logits_NV, labels_BL[0, 1:], reduction=reduction)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = chunked_cross_entropy(hidden_BLD, weight_VD, labels_BL, chunk=128, reduction=reduction)
        grads.append(torch.autograd.grad(loss, (hidden_BLD, weight_VD)))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
    assert loss.dtype == torch.float32
    for ours, true in zip(grads[1], grads[0], strict=True):
        assert (ours - true).norm() < 0.02 * true.norm()


def test_the_number_of_targets_can_be_given_so_that_accumulation_is_exact():
    model = llama()
    tokens_BL = torch.randint(300, (4, 33))
    whole = model(input_ids=tokens_BL, labels=tokens_BL).loss
    chunk_loss(model, chunk=10)
    parts = [
        model(input_ids=t, labels=t, num_items_in_batch=torch.tensor(4 * 32)).loss for t in tokens_BL.split([1, 3])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_head_comes_back():
    model = llama()
    tokens_BL = torch.randint(300, (1, 9))
    before = model(input_ids=tokens_BL).logits
    restore = chunk_loss(model, chunk=10)
    assert model(input_ids=tokens_BL).logits.shape[-1] == 36
    restore()
    torch.testing.assert_close(model(input_ids=tokens_BL).logits, before)


def test_a_model_that_caps_its_logits_is_refused():
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits after the head"):
        chunk_loss(model, chunk=10)
