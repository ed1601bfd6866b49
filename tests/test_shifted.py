"""attention.py against a dense mask in float64: alone, by its properties, and through whole models of many families."""

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from dense import dense_attention, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from specimens import llama
from torch.utils.checkpoint import checkpoint
from transformers import (
    AfmoeConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from longlora.attention.groups import group_size
from longlora.attention.shifted import (
    Attention,
    check_window,
    disable,
    disabled,
    document_ids,
    enable,
    must_part_documents,
    register,
    shifted_sparse_attention,
)

S2 = Attention(pattern="s2", shift="boundaries", group_ratio=0.25, full_attention_last=0.0, backend="auto")
FULL = S2.model_copy(update={"pattern": "full"})


def tensors(
    *, batch: int, heads: int, kv_heads: int, length: int, dim: int, seed: int = 0, laid_out: str = "BLHD"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for h in (heads, kv_heads, kv_heads):
        x_BLHD = torch.randn(batch, length, h, dim, dtype=torch.float64, generator=generator)
        x_BHLD = x_BLHD.transpose(1, 2)
        made.append((x_BHLD if laid_out == "BLHD" else x_BHLD.contiguous()).requires_grad_())
    return made


def equal_with_gradients(ours_BHLD: torch.Tensor, dense_BHLD: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours_BHLD, dense_BHLD, rtol=1e-9, atol=1e-11)
    weight_BHLD = torch.randn(dense_BHLD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((ours_BHLD * weight_BHLD).sum(), inputs)
    dense = torch.autograd.grad((dense_BHLD * weight_BHLD).sum(), inputs)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@st.composite
def cases(draw):
    kv_heads = draw(st.integers(1, 4))
    length = draw(st.integers(1, 26))
    batch = draw(st.integers(1, 3))
    group = draw(st.integers(1, length + 2))
    shifts = ["boundaries", "none"] + (["roll"] if length % min(group, length) == 0 else [])
    ids = draw(
        st.none()
        | st.lists(st.lists(st.integers(-1, 3), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    if ids is not None and draw(st.booleans()):
        ids = [sorted(row, reverse=draw(st.booleans())) for row in ids]
    return {
        "batch": batch,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 4)),
        "length": length,
        "group": group,
        "shift": draw(st.sampled_from(shifts)),
        "laid_out": draw(st.sampled_from(["BLHD", "BHLD"])),
        "ids_BL": None if ids is None else torch.tensor(ids),
    }


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_values_and_gradients_are_those_of_the_mask_for_any_shape_and_any_documents(case):
    inputs = tensors(
        batch=case["batch"],
        heads=case["heads"],
        kv_heads=case["kv_heads"],
        length=case["length"],
        dim=5,
        laid_out=case["laid_out"],
    )
    ours = shifted_sparse_attention(
        *inputs, group_size=case["group"], document_ids_BL=case["ids_BL"], shift=case["shift"]
    )
    mask_BHLL = visible(
        heads=case["heads"], length=case["length"], group=case["group"], shift=case["shift"], ids_BL=case["ids_BL"]
    )
    equal_with_gradients(ours, dense_attention(*inputs, mask_BHLL=mask_BHLL), inputs)


def test_nine_heads_on_three_keys_are_cut_inside_a_key_value_head():
    inputs = tensors(batch=2, heads=9, kv_heads=3, length=22, dim=4)
    ours = shifted_sparse_attention(*inputs, group_size=6, scaling=0.3)
    mask_BHLL = visible(heads=9, length=22, group=6)
    equal_with_gradients(ours, dense_attention(*inputs, mask_BHLL=mask_BHLL, scaling=0.3), inputs)


def test_the_first_half_of_the_heads_rests_and_the_odd_head_moves():
    q, k, v = tensors(batch=1, heads=5, kv_heads=5, length=16, dim=4)
    resting = shifted_sparse_attention(q, k, v, group_size=4, shift="none")
    ours = shifted_sparse_attention(q, k, v, group_size=4)
    same_H = [torch.equal(a, b) for a, b in zip(ours[0].unbind(1), resting[0].unbind(1), strict=True)]
    assert same_H == [True, True, False, False, False]


@pytest.mark.parametrize(("shift", "futures"), [("boundaries", 0), ("none", 0), ("roll", 4)])
def test_no_token_sees_its_future_but_under_the_authors_roll(shift, futures):
    """L = 16, G = 4 leaks 4 pairs of query and later key in each moved head. Counted in the gradients."""
    q, k, v = tensors(batch=1, heads=4, kv_heads=4, length=16, dim=3)
    out_BLHD = shifted_sparse_attention(q, k, v, group_size=4, shift=shift)
    counts = [0] * 4
    for head in range(4):
        for query in range(16):
            (seen,) = torch.autograd.grad(out_BLHD[0, query, head].sum(), v, retain_graph=True)
            counts[head] += int(seen[0, head, query + 1 :].any(-1).sum())
    assert counts == [0, 0, futures, futures]


def test_one_group_is_full_attention_in_all_heads():
    inputs = tensors(batch=2, heads=6, kv_heads=2, length=13, dim=4)
    mask_BHLL = torch.ones(13, 13, dtype=torch.bool).tril()
    for group in (13, 14, 999):
        for shift in ("boundaries", "roll", "none"):
            ours = shifted_sparse_attention(*inputs, group_size=group, shift=shift)
            equal_with_gradients(ours, dense_attention(*inputs, mask_BHLL=mask_BHLL), inputs)


def test_padding_gives_zeros_and_zero_gradients_even_where_it_holds_nonsense():
    ids_BL = torch.tensor([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, -1, -1], [-1] * 7])
    clean = tensors(batch=3, heads=4, kv_heads=2, length=7, dim=5)
    dirty = []
    for x in clean:
        x = x.detach().clone()
        x.transpose(1, 2)[ids_BL < 0] = math.nan
        dirty.append(x.requires_grad_())
    ours = shifted_sparse_attention(*dirty, group_size=4, document_ids_BL=ids_BL)
    dense = dense_attention(*clean, mask_BHLL=visible(heads=4, length=7, group=4, ids_BL=ids_BL))
    torch.testing.assert_close(ours, dense)
    for gradient, expected in zip(
        torch.autograd.grad(ours.square().sum(), dirty), torch.autograd.grad(dense.square().sum(), clean), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_documents_packed_in_a_row_do_what_they_do_alone():
    inputs = tensors(batch=1, heads=4, kv_heads=2, length=17, dim=4)
    ids_1L = torch.tensor([[7] * 5 + [2] * 12])
    packed = shifted_sparse_attention(*inputs, group_size=99, document_ids_BL=ids_1L)
    alone = [shifted_sparse_attention(*(x[:, :, a:b] for x in inputs), group_size=99) for a, b in ((0, 5), (5, 17))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("ids", [None, "packed"])
def test_bfloat16_is_float64_rounded(ids):
    exact = tensors(batch=2, heads=6, kv_heads=3, length=60, dim=8)
    coarse = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in coarse]
    ids_BL = None if ids is None else torch.arange(60).div(23, rounding_mode="floor").expand(2, -1)
    ours = shifted_sparse_attention(*coarse, group_size=20, document_ids_BL=ids_BL)
    dense = dense_attention(*exact, mask_BHLL=visible(heads=6, length=60, group=20, ids_BL=ids_BL))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), dense, rtol=2e-2, atol=2e-2)
    for a, b in zip(torch.autograd.grad(ours.sum(), coarse), torch.autograd.grad(dense.sum(), exact), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=3e-2, atol=6e-2)


def test_under_autocast_the_arithmetic_is_in_its_format_and_gradients_in_the_inputs():
    q, k, v = (x.detach().float().requires_grad_() for x in tensors(batch=1, heads=2, kv_heads=2, length=8, dim=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shifted_sparse_attention(q, k, v.bfloat16(), group_size=4)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_the_output_lies_in_memory_as_the_next_layer_reads_it():
    inputs = tensors(batch=2, heads=6, kv_heads=2, length=20, dim=4)
    out_BLHD = shifted_sparse_attention(*inputs, group_size=8)
    assert out_BLHD.shape == (2, 20, 6, 4) and out_BLHD.is_contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 0}, "a group of 0 tokens"),
        ({"shift": "left"}, "'left': there are boundaries, roll, none"),
        ({"shift": "roll", "group_size": 5}, "12 is not one of 5, 10 and 15 are"),
        ({"backend": "triton"}, "'triton': there are auto, flash, varlen, sdpa, flex"),
        ({"backend": "flash"}, "'flash' needs CUDA.*float64 on cpu"),
        ({"backend": "varlen"}, "'varlen' needs CUDA"),
        ({"backend": "flex"}, "'flex' needs CUDA"),
        ({"document_ids_BL": torch.zeros(2, 11, dtype=torch.long)}, r"shape \(2, 12\)"),
        ({"document_ids_BL": torch.zeros(2, 12)}, "whole numbers"),
    ],
)
def test_bad_settings_are_refused_with_the_rule(change, words):
    inputs = tensors(batch=2, heads=4, kv_heads=2, length=12, dim=3)
    with pytest.raises(ValueError, match=words):
        shifted_sparse_attention(*inputs, **({"group_size": 4} | change))


def test_shapes_that_do_not_fit_are_refused_with_the_shapes():
    q, k, v = tensors(batch=2, heads=4, kv_heads=2, length=12, dim=3)
    for bad in (
        (q, k, v[..., :2]),
        (q, k[:1], v[:1]),
        (q[:, :, :5], k, v),
        (q[:, :3], k, v),
        (q[0], k[0], v[0]),
        (q[:, :, :0], k[:, :, :0], v[:, :, :0]),
    ):
        with pytest.raises(ValueError, match=r"\("):
            shifted_sparse_attention(*bad, group_size=4)
    with pytest.raises(ValueError, match="one number format"):
        shifted_sparse_attention(q, k.float(), v, group_size=4)


def test_a_group_is_even_and_there_are_never_more_than_the_ratio_says():
    assert group_size(16384, 0.25) == 4096
    assert group_size(1002, 0.25) == 252
    assert group_size(30, 0.1) == 4
    assert group_size(30, 0.7 / 3.5) == 6
    assert group_size(1, 1.0) == 2
    for length in range(1, 200):
        for parts in range(1, 9):
            group = group_size(length, 1 / parts)
            assert group % 2 == 0 and -(-length // group) <= parts
    for length, ratio in ((0, 0.5), (8, 0.0), (8, 1.5)):
        with pytest.raises(ValueError, match=f"{ratio} of {length}"):
            group_size(length, ratio)


# Whole models. Odd heads, partial rotation, norms on queries and keys, grouped keys and one key for all, one matrix for the three,
# layers without rotation, multipliers, norms after, parallel branches, experts, latent attention.

LENGTH, GROUP = 22, 6  # 22 x 1/4 = 5.5, so 6
SHAPE = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 96, "pad_token_id": 0}
GROUPED = {"hidden_size": 32, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10, "experts_implementation": "eager"}
LATENT = {"q_lora_rank": 10, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
FAMILIES = {
    "llama": LlamaConfig(
        **SHAPE, hidden_size=36, intermediate_size=20, num_attention_heads=9, num_key_value_heads=3, head_dim=4
    ),
    "mistral": MistralConfig(
        **SHAPE, hidden_size=24, intermediate_size=20, num_attention_heads=6, num_key_value_heads=2, sliding_window=None
    ),
    "qwen2": Qwen2Config(**SHAPE, hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=1),
    "qwen3": Qwen3Config(
        **SHAPE, hidden_size=24, intermediate_size=20, num_attention_heads=5, num_key_value_heads=5, head_dim=6
    ),
    "gpt_neox": GPTNeoXConfig(**SHAPE, hidden_size=28, intermediate_size=20, num_attention_heads=7),
    "phi3": Phi3Config(**SHAPE | GROUPED),
    "phi": PhiConfig(**SHAPE | GROUPED),
    "olmo2": Olmo2Config(**SHAPE | GROUPED),
    "granite": GraniteConfig(**SHAPE | GROUPED, attention_multiplier=0.3, residual_multiplier=0.2, logits_scaling=8.0),
    "smollm3": SmolLM3Config(**SHAPE | GROUPED, no_rope_layers=[1, 0]),
    "stablelm": StableLmConfig(**SHAPE | GROUPED, qk_layernorm=True, use_parallel_residual=True),
    "cohere2": Cohere2Config(
        **SHAPE | GROUPED, sliding_window=GROUP, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE | GROUPED | EXPERTS, head_dim=6, num_experts=3),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE | GROUPED | EXPERTS, num_experts=3, shared_expert_intermediate_size=10),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE | GROUPED | EXPERTS | LATENT | {"num_key_value_heads": 4},
        **{"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
}


def build(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.config.use_cache = False
    return model.train()


def use_mask(
    model: PreTrainedModel, *, ids_BL: torch.Tensor | None, group: int, also_LL: torch.Tensor | bool = True
) -> None:
    """Have `model` attend by the dense mask, and by the mask `also_LL` of its own."""
    heads = model.config.num_attention_heads
    mask_BHLL = visible(heads=heads, length=LENGTH, group=group, ids_BL=ids_BL) & also_LL

    def attend(module, query, key, value, attention_mask, scaling, **others):
        return dense_attention(query, key, value, mask_BHLL=mask_BHLL, scaling=scaling), None

    AttentionInterface.register("dense_reference", attend)
    AttentionMaskInterface.register("dense_reference", lambda **others: None)
    model.set_attn_implementation("dense_reference")


def batch(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """What the model is given, and the document ids that this should come to."""
    generator = torch.Generator().manual_seed(5)
    tokens_BL = torch.randint(61, (3, LENGTH), generator=generator)
    given = {"input_ids": tokens_BL, "labels": tokens_BL.clone()}
    if kind == "plain":
        return given, None
    if kind == "packed":
        lengths = [[22], [9, 13], [1, 2, 19]]
        positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
        ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
        return given | {"position_ids": torch.stack(positions)}, torch.stack(ids)
    real = torch.tensor([22, 13, 5])[:, None]
    place_1L = torch.arange(LENGTH)[None]
    mask_BL = place_1L < real if kind == "right" else place_1L >= LENGTH - real
    given["labels"][~mask_BL] = -100
    return given | {"attention_mask": mask_BL.long()}, mask_BL.long() - 1


def loss_and_gradients(
    model: PreTrainedModel, given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attention", "group"), [(S2, GROUP), (FULL, LENGTH)], ids=["s2", "full"])
def test_a_model_trains_as_under_the_mask(family, kind, attention, group):
    model = build(FAMILIES[family])
    given, ids_BL = batch(kind)
    if attention == FULL and getattr(model.config, "sliding_window", None) == GROUP:
        pytest.skip("its window is no longer than a group, and full attention is refused")
    enable(model, attention)
    loss, gradients = loss_and_gradients(model, given)
    use_mask(model, ids_BL=ids_BL, group=group)
    expected, expected_gradients = loss_and_gradients(model, given)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 10
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = build(FAMILIES["llama"])
    given, _ = batch("packed")
    enable(model, S2)
    loss, gradients = loss_and_gradients(model, given)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, gradients_again = loss_and_gradients(model, given)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=0, atol=0)


def test_a_model_in_bfloat16_trains_as_under_the_mask_to_its_precision():
    model = build(FAMILIES["qwen3"], dtype=torch.bfloat16)
    given, ids_BL = batch("left")
    enable(model, S2)
    loss, gradients = loss_and_gradients(model, given)
    use_mask(model, ids_BL=ids_BL, group=GROUP)
    expected, expected_gradients = loss_and_gradients(model, given)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for name, gradient in expected_gradients.items():
        assert torch.isfinite(gradients[name]).all()
        assert (gradients[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-3, name


def test_full_attention_by_documents_is_transformers_own():
    model = build(FAMILIES["mistral"])
    for kind in ("plain", "right", "packed"):
        given, _ = batch(kind)
        enable(model, FULL)
        loss, gradients = loss_and_gradients(model, given)
        disable(model)
        expected, expected_gradients = loss_and_gradients(model, given)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-9)


def test_two_models_keep_their_own_ratio():
    given, _ = batch("plain")
    quarter, half = build(FAMILIES["llama"]), build(FAMILIES["llama"])
    enable(quarter, S2)
    before = quarter(**given).loss
    enable(half, S2.model_copy(update={"group_ratio": 0.5}))
    assert half(**given).loss != before
    assert quarter(**given).loss == before


def test_evaluation_in_the_middle_of_training_is_in_full_attention():
    model, given = build(FAMILIES["llama"]), batch("plain")[0]
    full = model.eval()(**given).loss
    enable(model.train(), S2)
    sparse = model(**given).loss
    with pytest.raises(ValueError, match="S2-Attn is for training"):
        model.eval()(**given)
    with disabled(model):
        assert model(**given).loss == full
        model.generate(given["input_ids"], max_new_tokens=2, do_sample=False, use_cache=True)
    assert model.train()(**given).loss == sparse != full
    disable(model)
    assert model.eval()(**given).loss == full


def test_a_saved_model_opens_in_ordinary_attention(tmp_path):
    model = llama()
    enable(model, S2)
    model.save_pretrained(tmp_path)
    assert "s2_" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_cache_is_refused():
    model = build(FAMILIES["llama"])
    first = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True)
    enable(model, S2)
    with pytest.raises(ValueError, match="takes no cache"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=first.past_key_values)


def hold_to_window(config: Callable[[int], PreTrainedConfig], *, kind: str) -> None:
    """A window as long as a group changes nothing, and a shorter one is refused."""
    given, ids_BL = batch(kind)
    model = build(config(GROUP))
    enable(model, S2)
    loss = model(**given).loss
    use_mask(model, ids_BL=ids_BL, group=GROUP)
    torch.testing.assert_close(loss, model(**given).loss, rtol=1e-9, atol=0)
    model = build(config(GROUP - 1))
    enable(model, S2)
    with pytest.raises(ValueError, match=r"back 5 tokens, less than a group of 6: .* at most 0\.181"):
        model(**given)


def test_a_sliding_window_no_longer_than_a_group_is_refused_with_the_ratio_that_would_do():
    grouped = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2}
    hold_to_window(lambda window: MistralConfig(**SHAPE | grouped, sliding_window=window), kind="plain")


@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
def test_a_window_that_only_the_mask_knows_is_refused_too(kind):
    """Qwen2-MoE's attention is not told of it."""
    experts = EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 10}
    windows = {"use_sliding_window": True, "max_window_layers": 1}
    hold_to_window(
        lambda window: Qwen2MoeConfig(**SHAPE | GROUPED | experts, **windows, sliding_window=window), kind=kind
    )


def test_a_window_that_no_layer_uses_is_let_through():
    unused = build(Cohere2Config(**SHAPE | GROUPED, sliding_window=GROUP - 1, layer_types=["full_attention"] * 2))
    enable(unused, S2)
    unused(**batch("plain")[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "full"}, "less than full attention's 22: set attention.pattern to s2, or sliding_window"),
        (
            {"full_attention_last": 0.2},
            "less than full attention's 22: set attention.full_attention_last to 0, or sliding_window",
        ),
    ],
)
def test_a_window_that_full_attention_would_pass_over_is_refused_at_the_first_step(changes, words):
    model = build(MistralConfig(**SHAPE | GROUPED, sliding_window=GROUP))
    enable(model, S2.model_copy(update=changes))
    with pytest.raises(ValueError, match=words):
        model(**batch("plain")[0])
    disable(model)
    enable(model, S2)
    model(**batch("plain")[0])


@pytest.mark.parametrize("length", [22, 99, 8192, 131072])
@pytest.mark.parametrize("pattern", ["s2", "full"])
def test_what_is_said_against_a_window_is_not_refused_again(length, pattern):
    asked = S2.model_copy(update={"pattern": pattern, "full_attention_last": 0.4, "group_ratio": 1.0})
    for window in (2, 3, 7, 15, 21):
        with pytest.raises(ValueError, match=f"looks back {window} tokens") as refused:
            check_window(window, length=length, attention=asked)
        said = dict(re.findall(r"attention\.(\w+) to (?:at most )?([\w.-]+)", str(refused.value)))
        assert said.keys() == {"group_ratio", "full_attention_last"} | ({"pattern"} if pattern == "full" else set())
        followed = Attention(**asked.model_dump() | said)
        check_window(window, length=length, attention=followed)
        assert group_size(length, followed.group_ratio) >= 0.99 * (window - window % 2)
    with pytest.raises(ValueError, match="looks back 1 tokens, .*: set sliding_window: null in its config$"):
        check_window(1, length=length, attention=asked)


def test_what_the_pattern_can_not_honour_is_refused():
    given, _ = batch("plain")
    with pytest.raises(ValueError, match="Gemma2ForCausalLM has no fused attention .*soft caps .*take a base without"):
        enable(build(Gemma2Config(**SHAPE | GROUPED, head_dim=6)), S2)
    dropout = build(LlamaConfig(**SHAPE | GROUPED, attention_dropout=0.1))
    enable(dropout, S2)
    with pytest.raises(ValueError, match="a dropout of 0.1, .* set it to 0 in the model's config"):
        dropout(**given)
    one_head = build(LlamaConfig(**SHAPE, hidden_size=24, intermediate_size=20, num_attention_heads=1))
    with pytest.raises(ValueError, match="1 head is too few"):
        enable(one_head, S2)
    ready = build(FAMILIES["llama"])
    enable(ready, S2)
    with pytest.raises(ValueError, match="not a ready mask"):
        ready(input_ids=given["input_ids"], attention_mask=torch.zeros(3, 1, LENGTH, LENGTH))


def test_chunks_are_kept_by_one_process_and_refused_by_several():
    """Llama 4's, which only its mask knows."""
    model = build(
        Llama4TextConfig(**SHAPE | GROUPED, head_dim=8, num_local_experts=2, attention_chunk_size=9),
        dtype=torch.float32,
    )
    given, _ = batch("plain")
    chunk_L = torch.arange(LENGTH) // 9
    for attention, group in ((FULL, LENGTH), (S2, GROUP)):
        enable(model, attention)
        loss = model(**given).loss
        use_mask(model, ids_BL=None, group=group, also_LL=chunk_L[:, None] == chunk_L)
        torch.testing.assert_close(model(**given).loss, loss)
        with pytest.raises(ValueError, match="Llama4ForCausalLM attends in chunks, of which 2 processes .* to 1$"):
            enable(model, attention, attend=shifted_sparse_attention, degree=2)


@pytest.mark.parametrize(
    ("strange", "words"),
    [
        ({"softcap": 3.0}, "a soft cap of 3.0"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"is_causal": False}, "no causal order"),
    ],
)
def test_what_a_layer_asks_for_in_vain_is_named(strange, words):
    attend = AttentionInterface()[register(S2, attend=shifted_sparse_attention, degree=1)]
    q = torch.zeros(1, 4, 8, 6)
    with pytest.raises(ValueError, match=f"the model's attention has {words}, .* take a base without"):
        attend(torch.nn.Module().train(), q, q, q, None, **strange)


MASK = torch.ones(3, LENGTH, dtype=torch.long)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "beside",
    [{"use_cache": True}, {"attention_mask": MASK}, {"attention_mask": MASK - (torch.arange(LENGTH) > 18).long()}],
)
def test_packed_documents_that_transformers_would_not_part_are_refused(family, beside):
    model, (given, _) = build(FAMILIES[family]), batch("packed")
    enable(model, S2)
    with pytest.raises(ValueError, match="its documents would see each other"):
        model(**given, **beside)
    padded = batch("left")[0]
    model(**padded, position_ids=(padded["attention_mask"].cumsum(1) - 1).clamp(min=0))


def test_documents_that_only_cumulative_lengths_tell_are_refused():
    model, (given, _) = build(FAMILIES["llama"]), batch("plain")
    enable(model, S2)
    row = {name: x[:1] for name, x in given.items()}
    told = {"cu_seq_lens_q": torch.tensor([0, 9, LENGTH]), "cu_seq_lens_k": torch.tensor([0, 9, LENGTH])}
    with pytest.raises(ValueError, match="cu_seq_lens alone"):
        model(**row, **told)
    model(**row, **told, position_ids=torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None])
    model(**row, cu_seq_lens_q=torch.tensor([0, LENGTH]), cu_seq_lens_k=torch.tensor([0, LENGTH]))


def test_documents_that_see_each_other_elsewhere_than_in_the_attention_are_found():
    for family in FAMILIES:
        must_part_documents(build(FAMILIES[family]).eval())
    hybrid = build(Lfm2Config(**SHAPE | GROUPED, layer_types=["conv", "full_attention"]))
    with pytest.raises(ValueError, match="Lfm2ForCausalLM lets a document see another .* set fit.pairs_share to 0"):
        must_part_documents(hybrid.eval())


def test_a_mask_that_shows_the_future_is_refused():
    with pytest.raises(ValueError, match="ones after them"):
        document_ids(2, 5, 5, lambda b, h, q, kv: (q >= 0) & (kv >= 0) & (b >= 0))


def test_a_checkpointed_call_works_on_its_own():
    inputs = tensors(batch=1, heads=4, kv_heads=2, length=12, dim=3)
    out = checkpoint(lambda *x: shifted_sparse_attention(*x, group_size=4), *inputs, use_reentrant=False)
    again = shifted_sparse_attention(*inputs, group_size=4)
    equal_with_gradients(out, again, inputs)


def test_a_model_without_the_attention_interface_is_refused():
    model = build(BloomConfig(vocab_size=61, hidden_size=24, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM does not use transformers' attention interface"):
        enable(model, S2)


@pytest.mark.parametrize("pattern", ["s2", "full"])
def test_a_model_without_attention_is_refused(pattern):
    model = build(MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="^MambaForCausalLM has no attention that S2-Attn could take the place of"):
        enable(model, S2.model_copy(update={"pattern": pattern}))


def test_a_model_that_does_not_look_at_positions_is_refused_where_a_row_holds_several_documents():
    model = build(AfmoeConfig(**SHAPE | GROUPED | EXPERTS, num_experts=2, num_dense_layers=1, head_dim=8))
    enable(model, S2)
    model(**batch("plain")[0])
    with pytest.raises(
        ValueError, match=r"models that make their masks by position_ids \(not in AFMoE\): give none, or"
    ):
        model(**batch("packed")[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_documents_are_brought_to_the_host_once_a_pass_however_many_layers_there_are(rows, monkeypatch):
    """On a GPU each time waits for all that it has to do."""
    positions_BL = torch.cat([torch.arange(13), torch.arange(19)]).repeat(rows, 1)
    tokens_BL = torch.arange(32).repeat(rows, 1)
    counts, cpu = [], torch.Tensor.cpu

    def counted(self, *args, **keywords):
        counts[-1] += 1
        return cpu(self, *args, **keywords)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for layers in (2, 4):
        config = copy.deepcopy(llama().config)
        config.num_hidden_layers = layers
        model = type(llama())(config).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        enable(model, S2)
        for _ in range(2):  # other documents are other tensors
            counts.append(0)
            model(tokens_BL, position_ids=positions_BL, labels=tokens_BL, use_cache=False).loss.backward()
    assert len(set(counts)) == 1 and 0 < counts[0] <= 2 * rows  # resting and moved groups


def test_documents_that_were_changed_in_place_are_others():
    inputs = [torch.randn(1, h, 12, 4) for h in (4, 2, 2)]
    ids_1L = torch.zeros(1, 12, dtype=torch.long)
    one = shifted_sparse_attention(*inputs, group_size=4, document_ids_BL=ids_1L)
    ids_1L[:, 6:] = 1
    two = shifted_sparse_attention(*inputs, group_size=4, document_ids_BL=ids_1L)
    assert torch.equal(two, shifted_sparse_attention(*inputs, group_size=4, document_ids_BL=ids_1L.clone()))
    assert not torch.equal(one, two)
