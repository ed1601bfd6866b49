"""The experiments' masks are what they are called, every arm is valid, and the verdict on an order follows the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import scaled_dot_product_attention

from experiments import patterns
from experiments.arm import settings_of
from experiments.tables import order, rows_of
from longlora.adapter import Adapter
from longlora.attention import Attention, shifted_sparse_attention
from longlora.fit import Fit
from longlora.section import read_params, section_of

HERE = Path(__file__).parent.parent / "experiments"
LENGTH, SIZE = 24, 8


def test_masks_agree_with_the_library_where_both_have_the_pattern():
    qkv = torch.randn(3, 1, 4, LENGTH, 6, generator=torch.manual_seed(0)).double().unbind()
    plain = shifted_sparse_attention(*qkv, group_size=SIZE)
    turned = shifted_sparse_attention(*[x[:, [2, 3, 0, 1]] for x in qkv], group_size=SIZE)

    def masked(pattern, layer=0):
        allowed_HLL = patterns.mask(pattern, heads=4, length=LENGTH, size=SIZE, layer=layer)
        return scaled_dot_product_attention(*qkv, attn_mask=allowed_HLL)

    moved, resting = torch.cat([turned[:, 2:], plain[:, 2:]], 1), torch.cat([plain[:, :2], turned[:, :2]], 1)
    assert torch.allclose(masked("swapped"), torch.cat([moved[:, :2], resting[:, 2:]], 1))
    assert torch.allclose(masked("only-shifted"), moved)
    assert torch.allclose(masked("across-layers", layer=2), resting)
    assert torch.allclose(masked("across-layers", layer=1), moved)


def test_a_roll_back_leaks_in_half_of_the_heads_and_nothing_else_does():
    future_LL = torch.ones(LENGTH, LENGTH).triu(1).bool()
    leaks = {
        pattern: (patterns.mask(pattern, heads=2, length=LENGTH, size=SIZE, layer=1) & future_LL).sum((1, 2)).tolist()
        for pattern in ("across-layers", "only-shifted", "dilated", "roll-back", "swapped")
    }
    # the last half group comes before the first one in its group
    assert leaks.pop("roll-back") == [0, (SIZE // 2) ** 2]
    assert all(counts == [0, 0] for counts in leaks.values())


def test_dilated_sees_as_many_tokens_as_a_group_holds():
    seen_L = patterns.mask("dilated", heads=2, length=LENGTH, size=SIZE, layer=0)[0].sum(-1)
    assert seen_L[-1] == SIZE and seen_L[0] == 1


def test_every_arm_is_valid_and_stands_in_the_graph_and_in_a_table():
    arms = set(read_params(HERE / "arms.yaml")["arms"])
    for name in arms:
        settings = settings_of(HERE / "arms.yaml", name)
        for kind in (Attention, Adapter, Fit):
            section_of(kind, settings, kind.__name__.lower())
    graph = yaml.safe_load((HERE / "dvc.yaml").read_text())["stages"]["arm"]["matrix"]["arm"]
    tables = read_params(HERE / "tables.yaml")["tables"]
    assert sorted(graph) == sorted(arms) == sorted({row["arm"] for table in tables for row in table["rows"]})


def test_an_order_agrees_disagrees_or_stays_open(tmp_path):
    ours = {"a": [3.0, 3.1, 2.9], "b": [3.5, 3.6, 3.4], "c": [2.9, 3.3, 2.8], "d": [2.0, 2.1, 1.9], "e": [9, 9.1, 8.9]}
    for arm, values in ours.items():
        for seed, value in enumerate(values):
            one = {"perplexity": {"2048": value}, "loss": np.log(value) - 0.5}
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(one))
    paper = {"a": 8.0, "b": 9.0, "c": 8.5, "d": 10.0, "e": 8.01}
    table = {"rows": [{"arm": arm, "says": arm.upper(), "paper": value} for arm, value in paper.items()]}
    rows = rows_of(table, tmp_path)
    against, open_ = order(rows)
    assert set(against) == {f"{x} is better than {y} here" for x, y in ("DA", "DB", "DC", "DE", "BE", "CE")}
    assert open_ == ["A / C"]  # B / C is clear by pairs, A / E is less than one per cent apart in the paper
    assert rows[0].leak == pytest.approx(-0.5)
    (tmp_path / "a-1.json").unlink()
    (tmp_path / "a-2.json").unlink()
    with pytest.raises(ValueError, match="a has 1 results"):
        rows_of(table, tmp_path)
