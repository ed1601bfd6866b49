"""One sequence over P processes: each holds L/P consecutive tokens, and tells the next one half a group per layer.

Groups that rest lie whole in one process, as L/P is a multiple of G. Of the moved groups one crosses each border: the process
after it needs the keys and values of the G/2 tokens before it, of the moved heads alone, and sends their gradients back. The
queries stay, since no token sees its future. The message travels while the rest is computed, in both directions. All else is
data parallelism: every token counts once, so summed gradients are those of the whole sequence.
tests/test_sequence_parallel.py holds outputs, losses and gradients to one process, on 2 and 4. Full attention crosses all
borders and goes the way of longlora/parallel/ulysses.py.

Letters: B batch; L tokens of the sequence; S = L/P tokens of this process; T some tokens; H query heads; K key/value heads; h, k
some of them; D head dimension; G group.
"""

import math
from collections.abc import Sized
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Dataset

from longlora.attention.kernels import BackendName, attend, choose
from longlora.attention.segments import Shift, one_document, segment, some_parts
from longlora.attention.shifted import check, in_autocast, shifted_sparse_attention
from longlora.data.text_blocks import IGNORED
from longlora.parallel.layout import sequence_misfits
from longlora.parallel.ranks import Ranks
from longlora.parallel.ulysses import full_attention
from longlora.section import refuse

PATIENCE = timedelta(minutes=30)
"""How long the processes of a sequence wait for each other, as all do for the Trainer; NCCL's own choice is 10 minutes."""


@dataclass(frozen=True)
class Together:
    """The processes that hold one sequence, in its order, seen from one of them."""

    group: distributed.ProcessGroup | None
    ranks: Ranks

    @property
    def degree(self) -> int:
        return self.ranks.degree

    @property
    def sp_rank(self) -> int:
        return self.ranks.sp_rank


def join(ranks: Ranks) -> Together:
    """The processes of the own sequence. Collective: every rank calls, after joining the process group of all."""
    groups = [
        distributed.new_group(list(range(first, first + ranks.degree)), timeout=PATIENCE)
        for first in range(0, ranks.world, ranks.degree)
    ]
    return Together(groups[ranks.replica], ranks)


def parallel_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *,
    together: Together,
    group_size: int,
    document_ids_BL: torch.Tensor | None = None,
    scaling: float | None = None,
    shift: Shift = "boundaries",
    backend: BackendName = "auto",
) -> torch.Tensor:
    """`shifted_sparse_attention` of the whole sequence, for the tokens of this process; every process of `together` calls it.

    Args:
        q_BHSD: queries of this process's tokens; k_BKSD, v_BKSD: their keys and values.
        together: who holds the sequence.
        group_size: G, as in `shifted_sparse_attention`. G >= L is full attention, by exchange of heads.
        document_ids_BL: of all L tokens, as in `shifted_sparse_attention`.

    Returns:
        out_BSHD.

    Raises:
        ValueError: as `shifted_sparse_attention`; S is not a multiple of G; a roll, which would mix the ends of the sequence;
            full attention with key/value heads that cannot be shared out.
    """
    batch, _, own, dim = q_BHSD.shape
    length, first = own * together.degree, own * together.sp_rank
    check(q_BHSD, k_BKSD, v_BKSD, group_size=group_size, document_ids_BL=None, shift=shift)
    if document_ids_BL is not None and document_ids_BL.shape != (batch, length):
        raise ValueError(
            f"document ids must be those of the whole sequence, ({batch}, {length}), not {tuple(document_ids_BL.shape)}"
        )
    if document_ids_BL is not None and one_document(document_ids_BL):
        document_ids_BL = None  # the kernels for documents are slower
    q_BHSD, k_BKSD, v_BKSD = in_autocast(q_BHSD, k_BKSD, v_BKSD)
    if group_size >= length and together.degree > 1:
        return full_attention(
            q_BHSD,
            k_BKSD,
            v_BKSD,
            group=together.group,
            document_ids_BL=document_ids_BL,
            scaling=scaling,
            backend=backend,
        )
    refuse(sequence_misfits(length, group_size=group_size, degree=together.degree))
    if together.degree == 1 or shift == "none" or group_size == 1:
        return shifted_sparse_attention(
            q_BHSD,
            k_BKSD,
            v_BKSD,
            group_size=group_size,
            document_ids_BL=None if document_ids_BL is None else document_ids_BL[:, first : first + own],
            scaling=scaling,
            shift=shift,
            backend=backend,
        )
    if shift == "roll":
        raise ValueError("a roll mixes the end of the sequence with its start; over several processes use 'boundaries'")
    return with_neighbours(
        q_BHSD,
        k_BKSD,
        v_BKSD,
        together=together,
        group_size=group_size,
        document_ids_BL=document_ids_BL,
        scaling=1 / math.sqrt(dim) if scaling is None else scaling,
        backend=backend,
    )


def with_neighbours(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *,
    together: Together,
    group_size: int,
    document_ids_BL: torch.Tensor | None,
    scaling: float,
    backend: BackendName,
) -> torch.Tensor:
    """out_BSHD: groups by boundaries that lie half a group off. Keys and values of half a group come from the process before, and
    are on their way while everything else attends."""
    heads, own, dim = q_BHSD.shape[1:]
    first, half = own * together.sp_rank, group_size // 2
    shared, cut, ahead = heads // k_BKSD.shape[1], heads // 2, group_size - half
    k_moved_BkSD, v_moved_BkSD = k_BKSD[:, cut // shared :], v_BKSD[:, cut // shared :]
    grouped = partial(
        attend_in_groups,
        shared=shared,
        group_size=group_size,
        scaling=scaling,
        backend=backend,
    )
    message = Message(together)
    tail_2BkTD = torch.stack([k_moved_BkSD[:, :, -ahead:], v_moved_BkSD[:, :, -ahead:]])
    coming_2BkTD = Send.apply(tail_2BkTD, message)
    rest = -(-cut // shared)  # key/value heads that a resting head reads
    ids_BS = None if document_ids_BL is None else document_ids_BL[:, first : first + own]
    still_BShD = grouped(q_BHSD[:, :cut], k_BKSD[:, :rest], v_BKSD[:, :rest], ids_BT=ids_BS, first_head=0)
    inside_BThD = grouped(
        q_BHSD[:, cut:, half:],
        k_moved_BkSD[:, :, half:],
        v_moved_BkSD[:, :, half:],
        ids_BT=None if ids_BS is None else ids_BS[:, half:],
        first_head=cut,
    )
    # The group across the border. Its first tokens' queries are the other process's business; zeros stand in for them.
    k_before_BkTD, v_before_BkTD = Receive.apply(coming_2BkTD, ahead, message)
    before = k_before_BkTD.shape[2]
    q_BhTD = q_BHSD[:, cut:, :half]
    border_BThD = grouped(
        torch.cat([q_BhTD.new_zeros(*q_BhTD.shape[:2], before, dim), q_BhTD], dim=2),
        torch.cat([k_before_BkTD, k_moved_BkSD[:, :, :half]], dim=2),
        torch.cat([v_before_BkTD, v_moved_BkSD[:, :, :half]], dim=2),
        ids_BT=None if document_ids_BL is None else document_ids_BL[:, first - before : first + half],
        first_head=cut,
    )
    moved_BShD = torch.cat([border_BThD[:, before:], inside_BThD], dim=1)
    return torch.cat([still_BShD, moved_BShD], dim=2)


def attend_in_groups(
    q_BhTD: torch.Tensor,
    k_BkTD: torch.Tensor,
    v_BkTD: torch.Tensor,
    *,
    first_head: int,
    shared: int,
    group_size: int,
    ids_BT: torch.Tensor | None,
    scaling: float,
    backend: BackendName,
) -> torch.Tensor:
    """out_BThD: some of the heads, from `first_head` on, inside groups that start with the first of these tokens."""
    batch, heads, tokens, dim = q_BhTD.shape
    documents = ids_BT is not None
    kernel = choose(backend, device=q_BhTD.device.type, dtype=q_BhTD.dtype, head_dim=dim, documents=documents)
    outs = []
    for row in range(batch):
        ids_1T = None if ids_BT is None else ids_BT[row : row + 1]
        segments = segment(1, tokens, group_size=group_size, shift="none", document_ids_BL=ids_1T)
        outs.append(
            attend(
                *(x[row].transpose(0, 1) for x in (q_BhTD, k_BkTD, v_BkTD)),
                parts=some_parts(first_head, first_head + heads, origin=first_head, shared=shared, segments=segments),
                scaling=scaling,
                backend=kernel,
            )
        )
    return torch.stack(outs)


class Message:
    """Keys and values on their way to the next process, those that come from the one before, and later their gradients."""

    def __init__(self, together: Together) -> None:
        self.together = together

    def start(self, outgoing: torch.Tensor, incoming: torch.Tensor, *, step: int) -> None:
        """`step` 1: to the next process, from the one before; -1: the other way. Where there is none, nothing moves."""
        sp_rank, rank, degree = self.together.sp_rank, self.together.ranks.rank, self.together.degree
        moves = []
        if 0 <= sp_rank + step < degree:
            moves.append(distributed.P2POp(distributed.isend, outgoing.contiguous(), rank + step, self.together.group))
        if 0 <= sp_rank - step < degree:
            moves.append(distributed.P2POp(distributed.irecv, incoming, rank - step, self.together.group))
        self.moves, self.incoming = moves, incoming  # alive until they have arrived
        self.works = distributed.batch_isend_irecv(moves) if moves else []

    def finish(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        self.moves = self.works = []
        return self.incoming


class Send(torch.autograd.Function):
    """Starts the message with the last tokens' keys and values; its backward waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, tail_2BkTD: torch.Tensor, message: Message) -> torch.Tensor:
        ctx.message = message
        before = 0 if message.together.sp_rank == 0 else tail_2BkTD.shape[3]
        coming_2BkTD = tail_2BkTD.new_empty(*tail_2BkTD.shape[:3], before, tail_2BkTD.shape[4])
        message.start(tail_2BkTD, coming_2BkTD, step=1)
        return coming_2BkTD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.message.finish(), None


class Receive(torch.autograd.Function):
    """Waits for the message, of `tokens` tokens; its backward starts their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, coming_2BkTD: torch.Tensor, tokens: int, message: Message) -> torch.Tensor:
        ctx.message, ctx.tokens = message, tokens
        return message.finish().view_as(coming_2BkTD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_2BkTD = grads[0]
        # The last process's own tail went nowhere, so no gradient comes: zeros.
        tail_2BkTD = grad_2BkTD.new_zeros(*grad_2BkTD.shape[:3], ctx.tokens, grad_2BkTD.shape[4])
        ctx.message.start(grad_2BkTD, tail_2BkTD, step=-1)
        return grad_2BkTD, None, None


class SequenceShards(Dataset[dict[str, torch.Tensor]]):
    """Of each block the tokens of one process, with what its last one is to predict, and the documents of all."""

    def __init__(self, blocks: Dataset[dict[str, torch.Tensor]], ranks: Ranks, *, length: int) -> None:
        if length % ranks.degree:
            raise ValueError(f"a block of {length} tokens cannot be cut into {ranks.degree} equal pieces")
        self.blocks, self.ranks, self.length = blocks, ranks, length

    def __len__(self) -> int:
        assert isinstance(self.blocks, Sized)
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index]
        own = self.length // self.ranks.degree
        tokens = slice(self.ranks.sp_rank * own, (self.ranks.sp_rank + 1) * own)
        targets_L = torch.nn.functional.pad(block["labels"][1:], (0, 1), value=IGNORED)
        positions_L = block["position_ids"]
        begins_L = positions_L.diff(prepend=positions_L[:1] - 1) != 1
        return {
            "input_ids": block["input_ids"][tokens],
            "position_ids": positions_L[tokens],
            "labels": block["labels"][tokens],
            "shift_labels": targets_L[tokens],
            "documents": begins_L.cumsum(0),
        }
