"""Pairs share blocks without seeing each other, none cut, none lost."""

import numpy as np
import pytest
import torch
from specimens import ATTENTION, llama

from longlora.attention.shifted import enable
from longlora.data.packing import Pair, PairBlocks, block, pack, read, training_blocks, write
from longlora.data.tokens import write as write_documents


def pair(first: int, size: int, answers: int) -> Pair:
    """`size` tokens from `first` on, of which the last `answers` are learnt."""
    return Pair(np.arange(first, first + size), np.arange(size) >= size - answers)


PAIRS = [pair(10, 9, 2), pair(30, 20, 5), pair(60, 12, 1), pair(80, 7, 3), pair(100, 11, 4), pair(120, 5, 2)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pairs").mkdir()
    write(PAIRS, tmp_path / "pairs/train.safetensors", vocabulary=300)
    (tmp_path / "tokens").mkdir()
    write_documents([np.full(200, 250)], tmp_path / "tokens/train.safetensors", vocabulary=300)
    write_documents([np.full(24, 251)], tmp_path / "tokens/recall.safetensors", vocabulary=300)
    return tmp_path


def test_pairs_are_read_as_they_were_written(folder):
    for a, b in zip(read(folder / "pairs/train.safetensors"), PAIRS, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.answer, b.answer)
    write([], folder / "none.safetensors", vocabulary=300)
    assert read(folder / "none.safetensors") == []


def test_packing_loses_none_overfills_none_and_wastes_little():
    lengths = np.random.default_rng(1).integers(1, 1000, 500).tolist()
    blocks = pack(lengths, room=1000)
    assert sorted(i for b in blocks for i in b) == list(range(500))
    assert max(sum(lengths[i] for i in b) for b in blocks) <= 1000
    assert len(blocks) <= 1.05 * sum(lengths) / 1000 + 1
    assert pack(lengths, room=1000) == blocks
    with pytest.raises(ValueError, match="a pair has 9 tokens, a block 8"):
        pack([3, 9], room=8)


def test_a_block_learns_the_answers_and_starts_anew_with_each_pair():
    sample = block([PAIRS[0], PAIRS[4]], length=24)
    ignored = -100
    assert sample["input_ids"].tolist() == [*range(10, 19), *range(100, 111), 0, 0, 0, 0]
    assert sample["labels"].tolist() == [ignored] * 7 + [17, 18] + [ignored] * 7 + [107, 108, 109, 110] + [ignored] * 4
    assert sample["position_ids"].tolist() == [*range(9), *range(11), *range(4)]


def test_an_answer_that_begins_a_pair_is_not_learnt_from_the_pair_before():
    sample = block([pair(10, 4, 1), pair(20, 3, 3)], length=8)
    assert sample["labels"].tolist() == [-100, -100, -100, 13, -100, 21, 22, -100]


@pytest.mark.parametrize("pattern", ["s2", "full"])
def test_no_pair_sees_another_in_its_block(pattern):
    model = llama(window=64).train()
    enable(model, ATTENTION.model_copy(update={"pattern": pattern}))

    def logits(first: Pair) -> torch.Tensor:
        sample = {k: v[None] for k, v in block([first, PAIRS[1], PAIRS[4]], length=48).items()}
        return model(input_ids=sample["input_ids"], position_ids=sample["position_ids"], use_cache=False).logits

    one, other = logits(PAIRS[0]), logits(pair(200, 9, 2))
    torch.testing.assert_close(one[:, 9:], other[:, 9:])
    assert not torch.allclose(one[:, :9], other[:, :9])


def test_in_full_attention_a_packed_pair_has_the_logits_it_has_alone():
    model = llama(window=64).train()
    enable(model, ATTENTION.model_copy(update={"pattern": "full"}))
    sample = {k: v[None] for k, v in block([PAIRS[0], PAIRS[1]], length=40).items()}
    packed = model(input_ids=sample["input_ids"], position_ids=sample["position_ids"], use_cache=False).logits
    alone = model(input_ids=torch.tensor(PAIRS[1].tokens)[None], use_cache=False).logits
    torch.testing.assert_close(packed[:, 9:29], alone, rtol=1e-4, atol=1e-5)


def test_each_pair_comes_once_a_round_in_an_order_of_the_seed(folder):
    file = folder / "pairs/train.safetensors"
    one = PairBlocks(file, length=24, samples=9, seed=1)
    assert len(one.blocks) == 3
    seen = [t for i in range(3) for t in one[i]["input_ids"].tolist() if t]
    assert sorted(seen) == sorted(int(t) for p in PAIRS for t in p.tokens)
    orders = {tuple(PairBlocks(file, length=24, samples=9, seed=s).plan) for s in range(6)}
    assert len(orders) > 1
    assert np.array_equal(one.plan, PairBlocks(file, length=24, samples=9, seed=1).plan)


def kinds(folder, *, pairs_share, recall_share, samples=20):
    blocks = training_blocks(
        folder / "tokens",
        folder / "pairs",
        length=24,
        samples=samples,
        pairs_share=pairs_share,
        recall_share=recall_share,
        seed=4,
    )
    first = [int(blocks[i]["input_ids"][0]) for i in range(len(blocks))]
    return ["text" if t == 250 else "recall" if t == 251 else "pairs" for t in first]


def test_text_recall_and_pairs_are_mixed_as_asked(folder):
    mixed = kinds(folder, pairs_share=0.25, recall_share=0.5)
    assert [mixed.count(kind) for kind in ("text", "recall", "pairs")] == [5, 10, 5]
    assert mixed != sorted(mixed)
    assert kinds(folder, pairs_share=1.0, recall_share=0.0) == ["pairs"] * 20
    assert kinds(folder, pairs_share=0.5, recall_share=0.5).count("recall") == 10
    with pytest.raises(ValueError, match=r"0.75 \+ 0.5: must be at most 1"):
        kinds(folder, pairs_share=0.75, recall_share=0.5)


def test_pairs_that_are_not_there_are_missed(folder):
    write([], folder / "pairs/train.safetensors", vocabulary=300)
    with pytest.raises(ValueError, match="pairs_share = 0.5 needs pairs: name pairs.sources"):
        kinds(folder, pairs_share=0.5, recall_share=0.0)
    assert kinds(folder, pairs_share=0.0, recall_share=0.0) == ["text"] * 20
