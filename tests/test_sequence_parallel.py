"""A sequence held by several processes: outputs, losses and gradients are those of one, through every border."""

import os
from pathlib import Path

import pytest
import together
import torch
from specimens import ATTENTION, POSITION, llama
from test_ranks import nearly_equal, train_here
from torch import distributed
from training import run
from transformers import TrainingArguments

from longlora.attention import shifted
from longlora.attention.segments import Part, Segments, parts, some_parts
from longlora.attention.shifted import enable, shifted_sparse_attention
from longlora.data.text_blocks import TextBlocks
from longlora.model.position import Position
from longlora.parallel import sequence_parallel
from longlora.parallel.layout import sequence_misfits
from longlora.parallel.ranks import Ranks
from longlora.parallel.sequence_parallel import (
    SequenceShards,
    Together,
    join,
    parallel_attention,
)
from longlora.section import refuse
from longlora.training.loss import chunk_loss

pytestmark = pytest.mark.slow  # real processes
SHAPES = [  # heads, kv_heads, group, shift; an odd share of heads, one key/value head for all, and a group of odd length
    (9, 3, 6, "boundaries"),
    (6, 6, 12, "boundaries"),
    (5, 1, 4, "boundaries"),
    (4, 2, 3, "boundaries"),
    (4, 2, 6, "none"),
    (8, 4, 48, "boundaries"),  # one group: full attention
]
LENGTH, BATCH, DIM = 48, 2, 5
DOCUMENTS = [  # none; across all borders; a border exactly at 12, 24; a document that comes back, padding at both ends
    None,
    [[0] * 20 + [1] * 21 + [2] * 7, [0] * 5 + [1] * 43],
    [[0] * 12 + [1] * 12 + [2] * 24, [0] * 11 + [1] * 14 + [2] * 23],
    [[-1] * 3 + [0] * 8 + [1] * 4 + [0] * 28 + [-1] * 5, [3] * 48],
]


def tensors(heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of the whole sequence."""
    generator = torch.Generator().manual_seed(heads)
    *qkv, grad = (
        torch.randn(BATCH, h, LENGTH, DIM, dtype=torch.float64, generator=generator).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return [*qkv, grad.transpose(1, 2)]


def attention_here(dtype: torch.dtype, tolerance: float) -> None:
    """This process's part of every case, against the whole, which it computes by itself."""
    distributed.init_process_group("gloo")
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["WORLD_SIZE"]))
    us = join(ranks)
    own = slice(ranks.sp_rank * LENGTH // ranks.degree, (ranks.sp_rank + 1) * LENGTH // ranks.degree)
    for heads, kv_heads, group, shift in SHAPES:
        if group < LENGTH and (LENGTH // ranks.degree) % group:
            continue
        for documents in DOCUMENTS:
            ids = None if documents is None else torch.tensor(documents)
            *whole, grad = tensors(heads, kv_heads, dtype)
            pieces = [x[:, :, own].clone().requires_grad_() for x in whole]
            whole = [x.requires_grad_() for x in whole]
            wanted = shifted_sparse_attention(*whole, group_size=group, document_ids_BL=ids, shift=shift)
            found = parallel_attention(*pieces, together=us, group_size=group, document_ids_BL=ids, shift=shift)
            torch.testing.assert_close(found, wanted[:, own], rtol=tolerance, atol=tolerance)
            theirs = torch.autograd.grad(wanted, whole, grad)
            ours = torch.autograd.grad(found, pieces, grad[:, own])
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b[:, :, own], rtol=tolerance, atol=tolerance)
    distributed.destroy_process_group()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
)
def test_attention_and_its_gradients_are_those_of_one_process(count, dtype, tolerance):
    together.run(count, attention_here, dtype, tolerance)


def test_the_processes_of_a_sequence_wait_as_long_as_those_of_the_trainer(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(distributed, "new_group", lambda *args, **keywords: made.append((*args, keywords["timeout"])))
    join(Ranks(3, 4, 2))
    said = TrainingArguments(output_dir=str(tmp_path), use_cpu=True).ddp_timeout
    assert [(ranks, wait.total_seconds()) for ranks, wait in made] == [([0, 1], said), ([2, 3], said)]


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(9, 3), (8, 4), (5, 1), (6, 6), (12, 4), (7, 7), (2, 1), (16, 2), (12, 2), (1, 1)]
)
def test_each_query_head_reads_its_own_key_value_head_under_its_own_pattern(heads, kv_heads):
    a, b = Segments(None, [1]), Segments(None, [2])
    shared, cut = heads // kv_heads, heads // 2
    made = parts(heads, kv_heads, first=a, second=b)
    assert reads(made) == {h: (h // shared, a if h < cut else b) for h in range(heads)}
    for first, last in ((0, cut), (cut, heads)):
        some = some_parts(first, last, origin=first, shared=shared, segments=a)
        assert reads(some) == {h - first: (h // shared - first // shared, a) for h in range(first, last)}


def reads(made: list[Part]) -> dict[int, tuple[int, Segments]]:
    """The key/value head that each query head reads, and its pattern, as a kernel pairs them."""
    found = {}
    for part in made:
        queries, keys = range(part.heads.start, part.heads.stop), range(part.kv_heads.start, part.kv_heads.stop)
        assert len(queries) % len(keys) == 0
        for i, h in enumerate(queries):
            assert h not in found
            found[h] = (keys[i * len(keys) // len(queries)], part.segments)
    return found


class Tokens(TextBlocks):
    """Some blocks without files: random tokens, documents at odd places."""

    def __init__(self) -> None:
        self.length = LENGTH

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 300, (LENGTH,), generator=torch.Generator().manual_seed(index))
        labels, positions, borders = tokens.clone(), torch.arange(LENGTH) + index * 7, [[], [5, 24, 29]][index]
        for border in borders:
            positions[border:], labels[border] = torch.arange(LENGTH - border), -100
        return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def batch(blocks) -> dict[str, torch.Tensor]:
    items = [blocks[i] for i in range(len(blocks))]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def model_here(checkpointing: bool) -> None:
    """Loss and gradients of this process's tokens, summed over all, against a model that sees the whole sequence."""
    distributed.init_process_group("gloo")
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["WORLD_SIZE"]))
    us, whole, pieces = join(ranks), batch(Tokens()), batch(SequenceShards(Tokens(), ranks, length=LENGTH))
    count = (whole["labels"][:, 1:] != -100).sum()
    results = []
    for degree, inputs in ((1, whole), (ranks.degree, pieces)):
        model = llama().double().train()
        chunk_loss(model, chunk=7)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def attend(*qkv, **settings):
            return parallel_attention(*qkv, together=us, **settings)

        enable(model, ATTENTION, attend=None if degree == 1 else attend, degree=degree)
        loss = model(**inputs, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for total, part in zip(*results, strict=True):
        distributed.all_reduce(part)
        torch.testing.assert_close(part, total, rtol=1e-9, atol=1e-11)
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_a_model_are_those_of_one_process(checkpointing):
    together.run(4, model_here, checkpointing)


@pytest.mark.parametrize(("count", "changes"), [(2, {}), (4, {"gradient_checkpointing": True})])
def test_training_with_a_sequence_over_two_processes_is_that_of_one(place, count, changes):
    """Four processes are two replicas of two. The last steps are in full attention, by exchange of heads where they divide."""
    changes = {**changes, "micro_batch_size": 1}
    run(place, "one", **changes)
    together.run(count, train_here, place, "two", changes, LONGLORA_SEQUENCE_PARALLEL="2")
    nearly_equal(place / "two", place / "one")


def refused_here(place: Path, name: str, said: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=said):
        train_here(place, name, changes)


def test_a_group_larger_than_what_a_process_holds_is_refused(place):
    said = r"128 tokens over 8 processes are 16 each, which must be a multiple of the group, 32: .* can be 1, 2, 4$"
    with pytest.raises(ValueError, match=said):
        refuse(sequence_misfits(POSITION.context, group_size=32, degree=8))
    with pytest.raises(ValueError, match=r"can be 1$"):
        refuse(sequence_misfits(100, group_size=26, degree=2))
    refuse(sequence_misfits(128, group_size=32, degree=4))


def test_heads_that_can_not_be_shared_out_are_refused_before_the_first_step_though_the_last_alone_need_it(place):
    said = r"shares 3 key/value heads out to 2 processes: LONGLORA_SEQUENCE_PARALLEL must divide 3, the nearest is 1"
    changes = {"attention": ATTENTION.model_copy(update={"full_attention_last": 0.5}), "micro_batch_size": 1}
    together.run(2, refused_here, place, "two", said, changes, LONGLORA_SEQUENCE_PARALLEL="2")
    assert not (place / "checkpoints").exists()
    assert not (place / "two.csv").exists()


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_positions_that_turn_by_the_length_of_a_text_are_refused_for_no_process_sees_it(place, method):
    said = f"position.method: {method} turns tokens by the length of their text, of which each of 2 processes"
    position = Position(method=method, context=POSITION.context)
    changes = {"position": position, "micro_batch_size": 1}
    together.run(2, refused_here, place, "two", said, changes, LONGLORA_SEQUENCE_PARALLEL="2")
    assert not (place / "two.csv").exists()


def test_a_roll_is_refused_before_the_first_step_for_it_mixes_the_end_with_the_start(place):
    changes = {"attention": ATTENTION.model_copy(update={"shift": "roll"}), "micro_batch_size": 1}
    said = (
        "a roll mixes the end of the sequence with its start: over several processes take attention.shift: boundaries"
    )
    together.run(2, refused_here, place, "two", said, changes, LONGLORA_SEQUENCE_PARALLEL="2")
    assert not (place / "two.csv").exists()


def test_shards_put_together_are_the_block():
    for index in range(2):
        whole, shards = (
            Tokens()[index],
            [SequenceShards(Tokens(), Ranks(r, 4, 4), length=LENGTH)[index] for r in range(4)],
        )
        for name in ("input_ids", "position_ids", "labels"):
            assert torch.cat([s[name] for s in shards]).equal(whole[name])
        assert torch.cat([s["shift_labels"] for s in shards])[:-1].equal(whole["labels"][1:])
        assert shards[-1]["shift_labels"][-1] == -100
        assert shards[2]["documents"].equal(
            (whole["position_ids"].diff(prepend=whole["position_ids"][:1] - 1) != 1).cumsum(0)
        )


@pytest.mark.parametrize("shift", ["boundaries", "none"])
@pytest.mark.parametrize("documents", [False, True])
def test_documents_are_looked_at_once_for_all_layers_and_one_alone_is_none(documents, shift, monkeypatch):
    """The second of two processes, without the first: what it would have sent stays random."""
    asked, looks = [], []

    def spy(owner, name, note):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **keywords: (note(keywords), real(*args, **keywords))[1])

    for where in (shifted, sequence_parallel):
        spy(where, "choose", lambda keywords: asked.append(keywords["documents"]))
    for owner, name in ((torch.Tensor, "cpu"), (torch.Tensor, "__bool__"), (torch, "isin")):
        spy(owner, name, lambda keywords: looks.append(1))
    monkeypatch.setattr(distributed, "P2POp", lambda *args: None)
    monkeypatch.setattr(distributed, "batch_isend_irecv", lambda moves: [])
    ids_BL = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if documents:
        ids_BL[0, 30:] = 1
    *qkv, _ = tensors(4, 2, torch.float32)
    own = [x[:, :, LENGTH // 2 :] for x in qkv]
    counts = []
    for _ in range(3):  # layers
        parallel_attention(
            *own, together=Together(None, Ranks(1, 2, 2)), group_size=6, document_ids_BL=ids_BL, shift=shift
        )
        counts.append(len(looks))
    assert counts[0] > 0 and counts[1] == counts[2] == counts[0]
    assert set(asked) == {documents}
