"""The chunked loss against the plain one."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from specimens import ADAPTER, ATTENTION, llama
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GraniteConfig,
    PhiConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

from longlora.attention.shifted import enable
from longlora.model.adapter import attach, save
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
    got = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_value_of_a_long_sequence_is_right_too(half, autocast, reduction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(half) for n in (8193, 90))
    weight /= 4 if half == torch.bfloat16 else 1  # more than float16 holds
    labels_BL = torch.randint(90, (1, 8193), generator=generator)
    labels_BL[0, 5000:5100] = -100
    grads = []
    for dtype in (torch.float64, torch.float32 if autocast else half):
        hidden_BLD, weight_VD = hidden[None].to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if dtype == torch.float64:
            logits_NV = (hidden_BLD @ weight_VD.T)[0, :-1]
            plain = loss = torch.nn.functional.cross_entropy(logits_NV, labels_BL[0, 1:], reduction=reduction)
        else:
            with torch.autocast("cpu", dtype=half, enabled=autocast):
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
    with pytest.raises(ValueError, match="gives no logits: call what chunk_loss returned"):
        model.generate(tokens_BL, max_new_tokens=2)
    restore()
    torch.testing.assert_close(model(input_ids=tokens_BL).logits, before)


def test_the_models_own_loss_comes_back_and_it_generates_again():
    model, plain = llama(), llama()
    tokens_BL = torch.randint(300, (1, 9))
    chunk_loss(model, chunk=10)()
    assert model(input_ids=tokens_BL, labels=tokens_BL).loss == plain(input_ids=tokens_BL, labels=tokens_BL).loss
    assert model.generate(tokens_BL, max_new_tokens=2).shape[1] > 9


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_meanwhile_opens_as_ever(tied, tmp_path):
    model = llama(tied=tied)
    chunk_loss(model, chunk=10)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_is_saved_meanwhile_opens_in_stock_peft(tied, tmp_path):
    model, tokens_BL = attach(llama(tied=tied), ADAPTER), torch.randint(300, (2, 33))
    restore = chunk_loss(model, chunk=10)
    model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    save(model, tmp_path)
    restore()
    opened = PeftModel.from_pretrained(llama(tied=tied), tmp_path)
    torch.testing.assert_close(opened(input_ids=tokens_BL).logits, model.eval()(input_ids=tokens_BL).logits)


def test_a_copy_of_the_model_applies_its_own_head():
    model, tokens_BL = llama(tied=False), torch.arange(9)[None]
    chunk_loss(model, chunk=10)
    other = copy.deepcopy(model)
    other.lm_head.weight.data.zero_()
    assert other(input_ids=tokens_BL, labels=tokens_BL).loss.item() == pytest.approx(math.log(300))


def test_a_model_may_be_training_and_attend_sparsely_already():
    torch.manual_seed(0)
    dropping = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=90, hidden_size=32, intermediate_size=40, num_attention_heads=4, hidden_dropout=0.5)
    ).train()
    dropping.gpt_neox.layers[0].eval()
    modes = [m.training for m in dropping.modules()]
    chunk_loss(dropping, chunk=10)
    assert [m.training for m in dropping.modules()] == modes
    sparse = llama()
    enable(sparse, ATTENTION)
    name = sparse.config._attn_implementation
    chunk_loss(sparse, chunk=10)
    assert sparse.config._attn_implementation == name != "sdpa"


def test_a_head_with_an_adapter_is_refused_and_one_that_is_trained_whole_is_not():
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lora_A.default.weight would not be trained: leave the head out"):
        chunk_loss(get_peft_model(llama(tied=False), lora), chunk=10)
    whole = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model, tokens_BL = get_peft_model(llama(tied=False), whole), torch.randint(300, (1, 9))
    chunk_loss(model, chunk=10)
    model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
    assert model.base_model.model.lm_head.modules_to_save.default.weight.grad.norm() > 0


SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SIZES, **HEADS, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24),
        PhiConfig(**SIZES, **HEADS),
        GraniteConfig(**SIZES, **HEADS, logits_scaling=8.0),
    ],
    ids=["the vocabulary's size by its place", "a bias in the head", "scaled logits"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_models_own_in_every_family(config, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokens_BL = torch.randint(90, (2, 33))
    plain = model(input_ids=tokens_BL, labels=tokens_BL, num_items_in_batch=torch.tensor(64)).loss
    chunk_loss(model, chunk=10)
    chunked = model(input_ids=tokens_BL, labels=tokens_BL, num_items_in_batch=torch.tensor(64)).loss
    torch.testing.assert_close(chunked.double(), plain.double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_a_model_that_caps_its_logits_is_refused(scale):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=2.0))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=scale)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its logits at 2, .* null in its config"):
        chunk_loss(model, chunk=10)


def test_a_cap_of_another_name_is_refused_too():
    model = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, **HEADS))
    with pytest.raises(
        ValueError, match=r"RecurrentGemmaForCausalLM caps its logits at 30, .* base without logits_soft_cap$"
    ):
        chunk_loss(model, chunk=10)


def test_a_model_that_changes_its_logits_otherwise_is_refused(monkeypatch):
    model = llama()
    own = type(model).forward

    def forward(self, *args, **given):
        head = self.get_output_embeddings()
        with head.register_forward_hook(lambda module, inputs, logits: logits.sin()):
            return own(self, *args, **given)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits after the head"):
        chunk_loss(model, chunk=10)
    assert model(input_ids=torch.arange(9)[None]).logits.shape[-1] == 300
