"""S2-Attn once more, as a mask: which token sees which, written down pair by pair. Slow, and nothing like the real thing."""

import torch


def visible(
    *, heads: int, length: int, group: int, shift: str = "boundaries", ids_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """mask_BHLL, true where the query (third) sees the key (fourth)."""
    batch = 1 if ids_BL is None else len(ids_BL)
    mask_BHLL = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for half in (range(heads // 2), range(heads // 2, heads)):
        moved = half.start >= heads // 2 and group < length
        for query in range(length):
            for key in range(length):
                if moved and shift == "roll":
                    # Where the two stand after all has moved left by half a group, the first tokens going to the end.
                    a, b = (query - group // 2) % length, (key - group // 2) % length
                    sees = a // group == b // group and b <= a
                elif moved and shift == "boundaries":
                    sees = (query - group // 2) // group == (key - group // 2) // group and key <= query
                else:
                    sees = query // group == key // group and key <= query
                mask_BHLL[:, list(half), query, key] = sees
    if ids_BL is not None:
        mask_BHLL &= ((ids_BL[:, :, None] == ids_BL[:, None]) & (ids_BL[:, :, None] >= 0))[:, None]
    return mask_BHLL


def dense_attention(
    q_BHLD: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLD: torch.Tensor,
    *,
    mask_BHLL: torch.Tensor,
    scaling: float | None = None,
) -> torch.Tensor:
    """out_BLHD; zeros where a query sees nothing."""
    shared = q_BHLD.shape[1] // k_BKLD.shape[1]
    k_BHLD, v_BHLD = (x.repeat_interleave(shared, dim=1) for x in (k_BKLD, v_BKLD))
    scores_BHLL = q_BHLD @ k_BHLD.transpose(-1, -2) * (q_BHLD.shape[-1] ** -0.5 if scaling is None else scaling)
    weights_BHLL = scores_BHLL.masked_fill(~mask_BHLL, -1e30).softmax(-1) * mask_BHLL.any(-1, keepdim=True)
    return (weights_BHLL.to(v_BHLD.dtype) @ v_BHLD).transpose(1, 2)
