"""Every backend behind the one contract. What needs CUDA is called here with a reference in the kernel's place, which is strict
about its arguments; that the kernels themselves run is not shown on a machine without a GPU."""

import inspect
import logging

import pytest
import torch
from dense import dense_attention, visible
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from longlora.attention import cpu, kernels
from longlora.attention.shifted import shifted_sparse_attention

real_varlen_attn = varlen_attn


def tensors(*, batch: int, heads: int, kv_heads: int, length: int, dim: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(batch, length, h, dim, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def by_segments(q_SHD, k_SKD, v_SKD, cumulative_M, scaling):
    """The varlen kernels' arithmetic: plain causal attention, segment by segment."""
    assert cumulative_M.dtype == torch.int32 and cumulative_M.device == q_SHD.device
    assert cumulative_M[0] == 0 and cumulative_M[-1] == len(q_SHD) == len(k_SKD) == len(v_SKD)
    outs = []
    for a, b in zip(cumulative_M[:-1].tolist(), cumulative_M[1:].tolist(), strict=True):
        assert a < b
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (q_SHD, k_SKD, v_SKD))
        causal = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        outs.append(dense_attention(q, k, v, mask_BHLL=causal, scaling=scaling)[0])
    return torch.cat(outs)


def stand_in_flash(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The signature of flash-attn 2.8's flash_attn_varlen_func."""
    assert causal and dropout_p == 0 and window_size == (-1, -1) and softcap == 0
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    assert q.shape[1] % k.shape[1] == 0 and all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k, v))
    return by_segments(q, k, v, cu_seqlens_q, softmax_scale)


def stand_in_flash_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
):
    """Those of flash-attn 4's arguments that say what is computed; it gives the logarithms of the sums too."""
    assert qv is None and window_size == (None, None)
    return stand_in_flash(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, causal=causal
    ), None


def stand_in_varlen(*args, **keywords):
    """Bound to the signature of the installed PyTorch."""
    call = inspect.signature(real_varlen_attn).bind(*args, **keywords)
    call.apply_defaults()
    given = call.arguments
    assert given["window_size"] == (-1, 0), "which is what makes it causal"
    assert torch.equal(given["cu_seq_q"], given["cu_seq_k"])
    assert given["max_q"] == given["max_k"] == given["cu_seq_q"].diff().max()
    assert given["enable_gqa"] == (given["query"].shape[1] != given["key"].shape[1])
    assert given["return_aux"] is given["seqused_k"] is given["block_table"] is None
    return by_segments(given["query"], given["key"], given["value"], given["cu_seq_q"], given["scale"])


def stand_in_flex(*args, **keywords):
    """Bound to the signature of the installed PyTorch; reads the blocks as the kernel does, and the mask in part blocks only."""
    call = inspect.signature(flex_attention).bind(*args, **keywords)
    call.apply_defaults()
    given = call.arguments
    assert given["score_mod"] is None and not given["return_lse"]
    q, k = given["query"], given["key"]
    assert given["enable_gqa"] == (q.shape[1] != k.shape[1])
    mask, total = given["block_mask"], q.shape[2]
    assert mask.seq_lengths == (total, total)
    part_NN, whole_NN = tables(mask)
    place = torch.arange(total)
    block = place // 128
    exact_SS = mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place)
    seen_SS = (part_NN[block[:, None], block] & exact_SS) | whole_NN[block[:, None], block]
    return dense_attention(q, k, given["value"], mask_BHLL=seen_SS, scaling=given["scale"]).transpose(1, 2)


def tables(mask):
    """Which blocks of keys a block of queries reads through the mask, and which whole."""
    side = mask.kv_indices.shape[-1]
    part_NN, whole_NN = torch.zeros(2, side, side, dtype=torch.bool)
    for table, counts, indices in (
        (part_NN, mask.kv_num_blocks, mask.kv_indices),
        (whole_NN, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(side):
            table[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    return part_NN, whole_NN


@pytest.fixture
def as_on_cuda(monkeypatch, request):
    """Choose the backend as if the machine had it, and put the reference in its place."""
    backend = request.getfixturevalue("backend")
    monkeypatch.setattr(
        "longlora.attention.shifted.choose", lambda name, **where: "flash" if name.startswith("flash") else name
    )
    monkeypatch.setattr(
        kernels, "flash_attn_varlen", lambda: stand_in_flash_4 if backend == "flash 4" else stand_in_flash
    )
    monkeypatch.setattr(kernels, "varlen_attn", stand_in_varlen)
    monkeypatch.setattr(kernels, "compiled_flex", lambda: stand_in_flex)


IDS = {
    "plain": None,
    "packed": torch.tensor([[0] * 9 + [1] * 14, [3] * 2 + [1] * 20 + [2]]),
    "padded": torch.tensor([[-1] * 4 + [0] * 19, [0] * 11 + [1] * 5 + [-1] * 7]),
    "one row all padding": torch.tensor([[-1] * 23, [0] * 23]),
    "interleaved": torch.tensor([[0, 1] * 11 + [0], [0, 0, 1, 1] * 5 + [2, 0, 1]]),
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3)])
@pytest.mark.parametrize("backend", ["flash", "flash 4", "varlen", "flex"])
@pytest.mark.usefixtures("as_on_cuda")
def test_a_cuda_backend_is_called_so_that_the_result_is_that_of_the_mask(backend, heads, kv_heads, ids):
    inputs = tensors(batch=2, heads=heads, kv_heads=kv_heads, length=23)
    ours = shifted_sparse_attention(*inputs, group_size=6, document_ids_BL=IDS[ids], backend=backend, scaling=0.4)
    dense = dense_attention(*inputs, mask_BHLL=visible(heads=heads, length=23, group=6, ids_BL=IDS[ids]), scaling=0.4)
    torch.testing.assert_close(ours, dense)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), inputs), torch.autograd.grad(dense.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["flash", "flash 4", "varlen", "flex"])
@pytest.mark.usefixtures("as_on_cuda")
def test_nothing_but_padding_is_zeros_with_zero_gradients(backend):
    inputs = tensors(batch=1, heads=4, kv_heads=2, length=7)
    out = shifted_sparse_attention(*inputs, group_size=4, document_ids_BL=torch.full((1, 7), -1), backend=backend)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), inputs))


def test_sdpa_off_the_cpu_takes_turns_with_the_keys_and_equals_the_mask():
    """On CPU tensors, but through the function that other devices use."""
    lengths = [3, 3, 3, 7, 1, 4]
    q, k, v = (x[0].transpose(0, 1) for x in tensors(batch=1, heads=6, kv_heads=2, length=21))
    out = kernels.sdpa(q, k, v, lengths, 0.7)
    expected = by_segments(q, k, v, kernels.cumulative(tuple(lengths), device=q.device), 0.7)
    torch.testing.assert_close(out, expected)


def test_flex_blocks_are_the_blocks_of_the_mask_and_whole_ones_skip_it():
    lengths = [130, 128, 300, 1, 1, 500, 40]
    total = sum(lengths)
    segment_S = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask_SS = (segment_S[:, None] == segment_S) & torch.ones(total, total, dtype=torch.bool).tril()
    side = -(-total // 128)
    padded_SS = torch.zeros(side * 128, side * 128, dtype=torch.bool)
    padded_SS[:total, :total] = mask_SS
    needed_NN = padded_SS.view(side, 128, side, 128).any(3).any(1)
    part_NN, whole_NN = tables(kernels.block_mask(lengths, device=torch.device("cpu")))
    assert torch.equal(part_NN | whole_NN, needed_NN)
    assert not (part_NN & whole_NN).any()
    assert whole_NN.sum() > 0
    # The last block ends early; a row of the sequence that is not there needs nothing.
    complete = padded_SS.view(side, 128, side, 128)[:-1].all(3).all(1)
    assert torch.equal(whole_NN[:-1], complete)


def test_pytorchs_own_flex_attention_takes_the_blocks():
    """Uncompiled, which on a CPU goes forward only."""
    lengths = [200, 57]
    q, k, v = (x[0].transpose(0, 1).detach() for x in tensors(batch=1, heads=6, kv_heads=2, length=257))
    mask = kernels.block_mask(lengths, device=q.device)
    out = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, enable_gqa=True, scale=0.7)
    expected = by_segments(q, k, v, kernels.cumulative(tuple(lengths), device=q.device), 0.7)
    torch.testing.assert_close(out[0].transpose(0, 1), expected)


def having(monkeypatch, packages):
    """As if these were installed."""
    monkeypatch.setattr(kernels, "installed", lambda package: package in packages)
    wanted = {name: (lambda name=name: name in packages, these) for name, (_, these) in kernels.FLASH.items()}
    monkeypatch.setattr(kernels, "FLASH", wanted)


def test_the_newest_flash_attn_that_the_gpu_runs_is_taken(monkeypatch):
    having(monkeypatch, {"flash_attention_2", "flash_attention_4"})
    for capability, name in {(7, 5): None, (8, 0): "flash_attention_2", (9, 0): "flash_attention_4"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda now=capability: now)
        assert kernels.flash_version() == name


@pytest.mark.parametrize(
    ("packages", "name"), [({2, 3}, "flash_attention_2"), ({3}, None), ({2, 3, 4}, "flash_attention_4")]
)
def test_on_a_gpu_after_hopper_flash_attn_3_is_passed_over_for_it_has_no_kernels_there(monkeypatch, packages, name):
    having(monkeypatch, {f"flash_attention_{version}" for version in packages})
    for capability in ((10, 0), (10, 3), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda now=capability: now)
        assert kernels.flash_version() == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.flash_version() == f"flash_attention_{max(packages)}"


@pytest.mark.parametrize(
    ("packages", "capability", "dtype", "name", "expected"),
    [
        ({"flash_attention_2"}, (8, 0), torch.bfloat16, "auto", "flash"),
        ({"flash_attention_4"}, (9, 0), torch.bfloat16, "auto", "flash"),
        ({"flash_attention_4"}, (8, 0), torch.bfloat16, "auto", "varlen"),
        ({"kernels"}, (9, 0), torch.bfloat16, "auto", "varlen"),
        ({"kernels"}, (9, 0), torch.bfloat16, "flash", "flash"),
        (set(), (8, 0), torch.float16, "auto", "varlen"),
        (set(), (7, 5), torch.float16, "auto", "sdpa"),
        ({"flash_attention_2"}, (8, 0), torch.float32, "auto", "sdpa"),
        ({"flash_attention_2"}, (8, 0), torch.float32, "flex", "flex"),
        ({"flash_attention_2"}, (8, 0), torch.bfloat16, "sdpa", "sdpa"),
    ],
)
def test_auto_takes_the_best_that_is_there_and_downloads_nothing(
    monkeypatch, caplog, packages, capability, dtype, name, expected
):
    having(monkeypatch, packages)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    kernels.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="longlora.attention.kernels"):
        for _ in range(3):
            assert kernels.choose(name, device="cuda", dtype=dtype, head_dim=64, documents=True) == expected
    kernels.choose.cache_clear()
    assert len(caplog.records) == 1 and f"'{expected}'" in caplog.text


def test_heads_that_the_kernels_do_not_take_are_not_sent_there(monkeypatch):
    having(monkeypatch, {"kernels", *kernels.FLASH})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    kernels.choose.cache_clear()
    for dim in (320, 12):
        assert kernels.choose("auto", device="cuda", dtype=torch.bfloat16, head_dim=dim, documents=True) == "sdpa"
    with pytest.raises(ValueError, match="up to 256"):
        kernels.choose("flash", device="cuda", dtype=torch.bfloat16, head_dim=320, documents=True)
    kernels.choose.cache_clear()


def test_without_documents_auto_takes_pytorchs_own_attention_and_a_name_is_obeyed(monkeypatch):
    having(monkeypatch, {"kernels", *kernels.FLASH})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    kernels.choose.cache_clear()
    for name, chosen in (("auto", "sdpa"), ("varlen", "varlen"), ("flash", "flash")):
        assert kernels.choose(name, device="cuda", dtype=torch.bfloat16, head_dim=64, documents=False) == chosen
    kernels.choose.cache_clear()


def test_what_is_kept_for_the_backward_pass_is_q_k_v_themselves_the_output_and_a_number_per_row():
    """So: no copy of q, k or v, no repeated key, no mask and no scores."""
    q, k, v = (x.detach().float().requires_grad_() for x in tensors(batch=1, heads=8, kv_heads=2, length=96, dim=16))
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = shifted_sparse_attention(q, k, v, group_size=24)
    for x in (q, k, v, out):
        kept.pop(x.untyped_storage().data_ptr())
    assert sum(kept.values()) == 96 * 8 * 4


def test_widening_the_backward_pass_only_makes_it_more_exact(monkeypatch):
    """On a CPU without 16 bit arithmetic it is done in float32, seven times as fast; both ways are the same to bfloat16."""
    exact = [x.detach() for x in tensors(batch=1, heads=4, kv_heads=2, length=64, dim=8)]
    wanted = [x.bfloat16().double().requires_grad_() for x in exact]
    out = shifted_sparse_attention(*wanted, group_size=16)
    expected = torch.autograd.grad(out.sum(), wanted)
    errors = []
    for emulated in (False, True):
        monkeypatch.setattr(cpu, "half_is_emulated", lambda answer=emulated: answer)
        coarse = [x.bfloat16().requires_grad_() for x in exact]
        found = torch.autograd.grad(shifted_sparse_attention(*coarse, group_size=16).sum(), coarse)
        errors.append(sum(float((a.double() - b).norm()) for a, b in zip(found, expected, strict=True)))
    assert errors[1] <= errors[0] < 0.5
