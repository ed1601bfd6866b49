"""Training blocks hold every token once, and say where each document starts."""

import numpy as np
import pytest
import torch

from longlora.data.text_blocks import TextBlocks
from longlora.data.tokens import write


@pytest.fixture
def folder(tmp_path):
    """Documents whose tokens say where they are from: document d, place p -> 100 d + p."""
    write(
        [100 * d + np.arange(n) for d, n in enumerate([23, 61, 17, 40])], tmp_path / "train.safetensors", vocabulary=500
    )
    write([np.full(16, 490), np.full(16, 491)], tmp_path / "recall.safetensors", vocabulary=500)
    return tmp_path


def test_blocks_hold_every_training_token_once_a_round(folder):
    blocks = TextBlocks(folder, length=16, samples=8, recall_share=0.0, seed=1)
    seen = torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist()
    assert len(seen) == len(set(seen)) == 8 * 16


def test_positions_start_anew_with_each_document_and_no_loss_crosses_the_border(folder):
    blocks = TextBlocks(folder, length=16, samples=8, recall_share=0.0, seed=1)
    for sample in map(blocks.__getitem__, range(8)):
        document_L = sample["input_ids"] // 100
        new_L = torch.cat([torch.tensor([False]), document_L[1:] != document_L[:-1]])
        assert torch.equal(sample["labels"] == -100, new_L)
        assert torch.equal(sample["position_ids"] == 0, new_L | (torch.arange(16) == 0))
        step_L = sample["position_ids"].diff()
        assert torch.equal(step_L == 1, ~new_L[1:])


def test_the_order_is_drawn_from_the_seed_and_holds_the_asked_share(folder):
    a, b, c = (TextBlocks(folder, length=16, samples=20, recall_share=0.25, seed=s) for s in (1, 1, 2))
    assert np.array_equal(a.plan, b.plan) and not np.array_equal(a.plan, c.plan)
    drills = [int(a[i]["input_ids"][0]) for i in range(20) if a.plan[i] < 0]
    assert sorted(drills) == [490, 490, 490, 491, 491] or sorted(drills) == [490, 490, 491, 491, 491]


def test_impossible_blocks_are_refused(folder):
    with pytest.raises(ValueError, match="hold 141 tokens, a block needs 200"):
        TextBlocks(folder, length=200, samples=1, recall_share=0.0, seed=1)
    with pytest.raises(ValueError, match="an exercise has 16 tokens, a block 20|recall exercise has 16 tokens"):
        TextBlocks(folder, length=20, samples=1, recall_share=1.0, seed=1)[0]
