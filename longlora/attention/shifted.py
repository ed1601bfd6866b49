"""Shifted sparse attention (S2-Attn): half of the heads attend inside groups, half inside groups moved by half a group.

Chen et al., "LongLoRA", ICLR 2024, section 3.2. The authors' code holds two definitions. Ours is the one by *boundaries*
(variant 2 of appendix B.3): moved groups are [0, G/2), [G/2, 3G/2), ..., [.., L), so no token sees its future and nothing is
rolled. *roll* is the authors' eager path, whose last group mixes the end with the start: G/2 queries of each moved head see
their future. It is here to compare with. Evaluation is in full attention, and the model itself is unchanged.
tests/test_shifted.py holds values and gradients to a dense masked reference in float64, alone and through whole models.

Letters: B batch; L tokens of a row; T = B x L; H query heads; K key/value heads; D head dimension; G group.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from decimal import ROUND_FLOOR, Context
from functools import partial
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longlora.attention.groups import group_size
from longlora.attention.kernels import BackendName, attend, choose
from longlora.attention.segments import Shift, document_ids, no_padding, parts, remembered, segment
from longlora.section import Section

Attend = Callable[..., torch.Tensor]  # the signature of `shifted_sparse_attention`


class Attention(Section):
    pattern: Literal["s2", "full"]
    """Of training; evaluation is always in full attention."""
    shift: Shift
    """boundaries: no token sees its future; roll: the authors' eager path, which leaks; none: groups that never exchange."""
    group_ratio: float = Field(gt=0, le=1)
    """Group size over sequence length; 1/4 in the paper."""
    full_attention_last: float = Field(ge=0, le=1)
    """Share of the steps, at the end, that train in full attention; 0 in the paper."""
    backend: BackendName
    """auto: SDPA; where documents share a sequence, on CUDA in half precision, flash-attn, else PyTorch's varlen."""


def shifted_sparse_attention(
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    *,
    group_size: int,
    document_ids_BL: torch.Tensor | None = None,
    scaling: float | None = None,
    shift: Shift = "boundaries",
    backend: BackendName = "auto",
) -> torch.Tensor:
    """S2-Attn. Heads [0, H//2) attend causally inside the groups [0, G), [G, 2G), ...; heads [H//2, H) inside groups moved by
    G//2, where G = `group_size`. The last group may be shorter. One group (G >= L) is full attention in all heads.

    Args:
        q_BHLD: queries.
        k_BKLD: keys; query head h reads key/value head h // (H // K).
        v_BKLD: values.
        document_ids_BL: whole numbers; a token attends only to tokens of its own number. Negative is padding: nobody attends
            to it, its output and its gradients are zero.
        scaling: of the scores; 1/sqrt(D) by default.
        shift: as in `Attention`.
        backend: as in `Attention`.

    Returns:
        out_BLHD, contiguous, which is how a transformer goes on.

    Raises:
        ValueError: shapes that do not fit together, a group of no token, an unknown shift or backend, a backend that cannot
            run here, a roll where G does not divide L.
    """
    check(q_BHLD, k_BKLD, v_BKLD, group_size=group_size, document_ids_BL=document_ids_BL, shift=shift)
    q_BHLD, k_BKLD, v_BKLD = in_autocast(q_BHLD, k_BKLD, v_BKLD)
    batch, heads, length, dim = q_BHLD.shape
    if batch > 1 and not all(rows_adjoin(x) for x in (q_BHLD, k_BKLD, v_BKLD)):
        # Row by row: laying the rows end to end would copy q, k and v.
        ids = [None] * batch if document_ids_BL is None else document_ids_BL.split(1)
        outs = [
            shifted_sparse_attention(
                q, k, v, group_size=group_size, document_ids_BL=i, scaling=scaling, shift=shift, backend=backend
            )
            for q, k, v, i in zip(q_BHLD.split(1), k_BKLD.split(1), v_BKLD.split(1), ids, strict=True)
        ]
        return torch.cat(outs)
    q_THD, k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHLD, k_BKLD, v_BKLD))
    documents = document_ids_BL is not None
    kernel = choose(backend, device=q_THD.device.type, dtype=q_THD.dtype, head_dim=dim, documents=documents)
    resting = segment(batch, length, group_size=group_size, shift="none", document_ids_BL=document_ids_BL)
    moved = resting
    if group_size < length and shift != "none":
        moved = segment(batch, length, group_size=group_size, shift=shift, document_ids_BL=document_ids_BL)
    out_THD = attend(
        q_THD,
        k_TKD,
        v_TKD,
        parts=parts(heads, k_TKD.shape[1], first=resting, second=moved),
        scaling=1 / math.sqrt(dim) if scaling is None else scaling,
        backend=kernel,
    )
    return out_THD.unflatten(0, (batch, length))


def check(
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    *,
    group_size: int,
    document_ids_BL: torch.Tensor | None,
    shift: str,
) -> None:
    """Raises ValueError with the numbers that do not fit."""
    shapes = f"q {tuple(q_BHLD.shape)}, k {tuple(k_BKLD.shape)}, v {tuple(v_BKLD.shape)}"
    if q_BHLD.dim() != 4 or k_BKLD.dim() != 4 or k_BKLD.shape != v_BKLD.shape:
        raise ValueError(f"attention takes q (B, H, L, D) and k, v (B, K, L, D), all of one D, not {shapes}")
    batch, heads, length, dim = q_BHLD.shape
    if (batch, length, dim) != (k_BKLD.shape[0], *k_BKLD.shape[2:]):
        raise ValueError(f"q and k must agree in batch, length and head dimension: {shapes}; S2-Attn takes no cache")
    if 0 in q_BHLD.shape or k_BKLD.shape[1] == 0 or heads % k_BKLD.shape[1]:
        raise ValueError(
            f"{heads} query heads must be a multiple of {k_BKLD.shape[1]} key/value heads, none empty: {shapes}"
        )
    if group_size < 1:
        raise ValueError(f"a group of {group_size} tokens: at least 1, and {length} is full attention")
    if shift not in get_args(Shift):
        raise ValueError(f"shift '{shift}': there are {', '.join(get_args(Shift))}")
    if shift == "roll" and length % min(group_size, length):
        whole = length // group_size * group_size
        raise ValueError(
            f"a roll needs a length that is a multiple of the group: {length} is not one of {group_size}, "
            f"{whole} and {whole + group_size} are; shift 'boundaries' takes any"
        )
    if document_ids_BL is not None and (
        document_ids_BL.shape != (batch, length)
        or document_ids_BL.is_floating_point()
        or document_ids_BL.dtype == torch.bool
    ):
        raise ValueError(
            f"document ids must be whole numbers of shape ({batch}, {length}), "
            f"not {document_ids_BL.dtype} of {tuple(document_ids_BL.shape)}"
        )


def in_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the number format of the autocast around, as PyTorch's own attention does; without one, all must agree."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64:
        return [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f"q, k and v must be of one number format, not {', '.join(str(x.dtype) for x in tensors)}")
    return list(tensors)


def rows_adjoin(x_BHLD: torch.Tensor) -> bool:
    """Whether the rows lie end to end in memory, so that B x L is a view."""
    return x_BHLD.stride(0) == x_BHLD.shape[2] * x_BHLD.stride(2)


def enable(model: PreTrainedModel, attention: Attention, *, attend: Attend | None = None, degree: int = 1) -> None:
    """Have `model` attend as `attention` says, in training, until `disable` or another `enable`.

    The group is `group_ratio` of whatever length comes. Padding (either side) and packed documents (`position_ids` that start
    anew, no `attention_mask`, `use_cache=False`) are respected, also in full attention, without an L x L mask. Where `degree`
    processes hold a sequence together, `attend` is how, and the model is given its `documents`: the ids of all its tokens.

    Raises:
        ValueError: the model has no attention, does not use transformers' interface of it, has no fused one to be measured in, or
            fewer than two heads to share out, or picks by itself what a token sees; or it attends in chunks, and several processes
            hold a sequence.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"{type(model).__name__} has no attention that S2-Attn could take the place of (its config says no "
            "num_attention_heads): take a base with attention"
        )
    heads = config.num_attention_heads
    if attention.pattern == "s2" and heads < 2:
        raise ValueError(f"S2-Attn shares the heads out to two patterns; {heads} head is too few, use pattern: full")
    if any(
        module.endswith(".indexer") for module, _ in model.named_modules()
    ):  # what it picks comes as a mask, or in `others`
        raise ValueError(
            f"{type(model).__name__} has an indexer that picks the tokens each one sees, which would be passed over: take a base "
            "without"
        )
    if degree > 1 and "chunked_attention" in (model.config.get_text_config().to_dict().get("layer_types") or []):
        # Llama 4's chunks are in the mask alone, which a piece of a sequence has none of.
        raise ValueError(
            f"{type(model).__name__} attends in chunks, of which {degree} processes of a sequence would know nothing: set "
            "LONGLORA_SEQUENCE_PARALLEL to 1"
        )
    name = register(attention, attend=attend or shifted_sparse_attention, degree=degree)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # pyright: ignore[reportPrivateUsage]  # where transformers says it
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so S2-Attn cannot be set"
        )
    if not model._supports_sdpa:  # pyright: ignore[reportPrivateUsage]  # where transformers says it
        raise ValueError(
            f"{type(model).__name__} has no fused attention in transformers, such as its measures would take (soft caps and sinks "
            "have none): take a base without"
        )


def disable(model: PreTrainedModel) -> None:
    """Back to transformers' ordinary full attention, with all that S2-Attn lacks: cache, generation, sliding windows."""
    model.set_attn_implementation("sdpa")


@contextmanager
def disabled(model: PreTrainedModel) -> Generator[None]:
    """Ordinary full attention for the length of a block, for an evaluation in the middle of training."""
    before = model.config._attn_implementation or "sdpa"  # pyright: ignore[reportPrivateUsage]
    disable(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def must_part_documents(model: PreTrainedModel) -> None:
    """Check that documents in one row (`position_ids` that start anew) know nothing of each other, in ordinary attention.

    Raises:
        ValueError: another first document changes what comes of the second.
    """
    device, vocabulary, half = model.device, model.config.get_text_config().vocab_size, 12
    second_L = torch.arange(half, device=device)
    firsts_BL = torch.stack([second_L + half, second_L.flip(0) + 2 * half])
    tokens_BL = torch.cat([firsts_BL, second_L.expand(2, -1)], dim=1) % vocabulary
    positions_BL = second_L.repeat(2, 2)
    coarse = any(p.dtype == torch.bfloat16 for p in model.parameters())
    # Two passes: experts of one row may round as the other's tokens have them.
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=coarse):
        one, other = (
            model(input_ids=t, position_ids=p, use_cache=False).logits[:, half:].float()
            for t, p in zip(tokens_BL.split(1), positions_BL.split(1), strict=True)
        )
    if (one - other).abs().max() > (1e-2 if coarse else 1e-5) * one.abs().max():
        raise ValueError(
            f"{type(model).__name__} lets a document see another one in its sequence (it mixes tokens elsewhere than in its "
            "attention, or does not look at position_ids): set fit.pairs_share to 0, and LONGLORA_SEQUENCE_PARALLEL to 1"
        )


def register(attention: Attention, *, attend: Attend, degree: int) -> str:
    """Make `attention` known to transformers; returns its name there. What differs has different names, so nothing is replaced."""
    sparse = f"s2_{attention.shift}_{attention.group_ratio}_{attention.full_attention_last}"
    pattern = sparse if attention.pattern == "s2" else "full_by_documents"
    # Upper case: transformers reads more into a name that contains 'flash' or 'sdpa'.
    name = f"{pattern}_{attention.backend.upper()}_{degree}"
    AttentionInterface.register(name, attention_function(attention, attend=attend, degree=degree))
    with_window = partial(document_ids, check_window=partial(check_window, attention=attention))
    AttentionMaskInterface.register(name, with_window if degree == 1 else no_padding)
    return name


def check_window(window: int, *, length: int, attention: Attention) -> None:
    """Raises ValueError where queries would look back further in training than the model's sliding `window` lets them, be it only
    in the last steps."""
    if window >= length:
        return
    sparse, last = attention.pattern == "s2", attention.full_attention_last
    size, largest = group_size(length, attention.group_ratio), window - window % 2
    passed = [f"a group of {min(size, length)}"] if sparse and window < size else []
    passed += [f"full attention's {length}"] if not sparse or last else []
    if not passed:
        return
    # downwards: the least above it rounds up to the next group
    ratio = Context(prec=3, rounding=ROUND_FLOOR).create_decimal_from_float(largest / length)
    changes = {
        "attention.pattern to s2": not sparse,
        f"attention.group_ratio to at most {ratio}": window < size,
        "attention.full_attention_last to 0": last,
    }
    null = "sliding_window: null in its config"
    wanted = f"{' and '.join(change for change, needed in changes.items() if needed)}, or {null}" if largest else null
    raise ValueError(f"the model looks back {window} tokens, less than {' and '.join(passed)}: set {wanted}")


def must_know_documents(position_ids: torch.Tensor, *, document_ids_BL: torch.Tensor | None) -> None:
    """Raises ValueError: positions start anew inside of what is taken for one document, as transformers takes it beside a mask or a
    cache, or in a model that makes its masks without them."""

    def unknown() -> bool:
        begins_BL = position_ids[..., 1:] == 0
        if document_ids_BL is not None:
            after_BL = document_ids_BL[:, 1:]
            begins_BL = begins_BL & (after_BL == document_ids_BL[:, :-1]) & (after_BL >= 0)
        return bool(begins_BL.any())

    given = position_ids if document_ids_BL is None else document_ids_BL
    if remembered(given, (must_know_documents, id(position_ids)), unknown):
        raise ValueError(
            "position_ids start anew inside of a row, and its documents would see each other: transformers parts them only without "
            "an attention_mask, with use_cache=False, and in models that make their masks by position_ids (not in AFMoE): give "
            "none, or take another base"
        )


def attention_function(
    attention: Attention, *, attend: Attend, degree: int
) -> Callable[..., tuple[torch.Tensor, None]]:
    """`attention` behind the signature that transformers calls."""
    sparse = attention.pattern == "s2"

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        is_causal: bool | None = None,
        position_ids: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        **others: Any,  # transformers hands every attention function all it has
    ) -> tuple[torch.Tensor, None]:
        length = query.shape[2] * degree
        size = group_size(length, attention.group_ratio) if sparse else length
        if sparse and not module.training:
            raise ValueError("S2-Attn is for training; evaluate in full attention, inside `with disabled(model):`")
        check_kind(
            dropout=dropout, softcap=softcap, sinks=s_aux, position_bias=position_bias, non_causal=is_causal is False
        )
        if sliding_window is not None:  # a process of several is given no mask that would show it
            check_window(sliding_window, length=length, attention=attention)
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"S2-Attn takes padding and documents, not a ready mask of {tuple(attention_mask.shape)}")
        if documents is None and position_ids is not None:
            must_know_documents(position_ids, document_ids_BL=attention_mask)
        if documents is None and attention_mask is None and cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
            raise ValueError(
                "the documents of a row are told by cu_seq_lens alone, which flash-attn reads, and would see each other: give "
                "position_ids that start anew"
            )
        if documents is None and degree > 1:
            raise ValueError(f"{type(module).__name__} is not given the `documents` of the whole sequence")
        missing = query.shape[-1] - value.shape[-1]  # DeepSeek's values are narrower than its keys
        out_BLHD = attend(
            query,
            key,
            nn.functional.pad(value, (0, missing)) if missing > 0 else value,
            group_size=size,
            document_ids_BL=attention_mask if documents is None else documents,
            scaling=scaling,
            shift=attention.shift if sparse else "none",
            backend=attention.backend,
        )
        return out_BLHD[..., : value.shape[-1]], None

    return forward


def check_kind(
    *,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    non_causal: bool,
) -> None:
    """Raises ValueError: the model's attention has something that S2-Attn does not compute."""
    if dropout:
        raise ValueError(
            f"the model's attention has a dropout of {dropout:g}, which S2-Attn does not compute: set it to 0 in the model's config"
        )
    found = {
        f"a soft cap of {softcap}": softcap is not None,
        "sinks": sinks is not None,
        "a position bias": position_bias is not None,
        "no causal order": non_causal,
    }
    if any(found.values()):
        said = ", ".join(what for what, there in found.items() if there)
        raise ValueError(f"the model's attention has {said}, which S2-Attn does not compute: take a base without")
