"""The experiments' patterns are what they are called, every arm is valid, and the verdict on an order follows the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import scaled_dot_product_attention

from experiments import patterns
from experiments.arm import settings_of
from experiments.tables import order, retrieval_table, rows_of
from longlora.adapter import Adapter
from longlora.attention import Attention, shifted_sparse_attention
from longlora.fit import Fit
from longlora.passkey import Passkey
from longlora.perplexity import Perplexity
from longlora.position import Position
from longlora.section import read_params, section_of

ROOT = Path(__file__).parent.parent
HERE = ROOT / "experiments"
ARMS = read_params(HERE / "arms.yaml")
LENGTH, SIZE = 24, 8


def mask(pattern: str, layer: int) -> torch.Tensor:
    """mask_HLL of four heads: True where a query may look."""
    place_L = torch.arange(LENGTH)
    distance_LL = place_L[:, None] - place_L

    def same(group_L: torch.Tensor) -> torch.Tensor:
        return group_L[:, None] == group_L

    past_LL = distance_LL >= 0
    resting, moved = same(place_L // SIZE) & past_LL, same((place_L + SIZE // 2) // SIZE) & past_LL
    seat_L = (place_L + SIZE // 2) % LENGTH
    rolled = same(seat_L // SIZE) & (seat_L[:, None] >= seat_L)
    dilated = past_LL & (distance_LL % (LENGTH // SIZE) == 0)
    first, second = {
        "across-layers": [(resting, resting), (moved, moved)][layer % 2],
        "only-shifted": (moved, moved),
        "dilated": (dilated, dilated),
        "roll-back": (resting, rolled),
        "swapped": (moved, resting),
    }[pattern]
    return torch.stack([first, first, second, second])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("pattern", ["across-layers", "only-shifted", "dilated", "roll-back", "swapped"])
def test_a_pattern_is_its_dense_mask(pattern, layer):
    dice = torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 6, generator=dice).double() for heads in (4, 2, 2))
    out = patterns.attend(q, k, v, pattern=pattern, size=SIZE, layer=layer)
    dense = scaled_dot_product_attention(q, k, v, attn_mask=mask(pattern, layer), enable_gqa=True)
    assert torch.allclose(out, dense)


def test_swapped_is_the_librarys_attention_with_its_heads_turned():
    q, k, v = torch.randn(3, 1, 4, LENGTH, 6, generator=torch.manual_seed(0)).double().unbind()
    turned = [x[:, [2, 3, 0, 1]] for x in (q, k, v)]
    library = shifted_sparse_attention(*turned, group_size=SIZE).transpose(1, 2)[:, [2, 3, 0, 1]]
    assert torch.allclose(patterns.attend(q, k, v, pattern="swapped", size=SIZE, layer=0), library)


def test_a_roll_back_leaks_in_half_of_the_heads_and_nothing_else_does():
    future_LL = torch.ones(LENGTH, LENGTH).triu(1).bool()
    names = ("across-layers", "only-shifted", "dilated", "roll-back", "swapped")
    leaks = {pattern: (mask(pattern, 1) & future_LL).sum((1, 2)).tolist() for pattern in names}
    # the last half group comes before the first one in its group
    assert leaks.pop("roll-back") == [0, 0, (SIZE // 2) ** 2, (SIZE // 2) ** 2]
    assert all(counts == [0] * 4 for counts in leaks.values())


@pytest.mark.parametrize("study", list(ARMS))
def test_every_arm_is_valid_and_stands_in_the_graph_and_in_a_table(study):
    for name in ARMS[study]["arms"]:
        settings = settings_of(ROOT, study, name)
        for kind in (Position, Attention, Adapter, Fit, Perplexity, Passkey):
            section_of(kind, settings, kind.__name__.lower())
    graph = yaml.safe_load((HERE / "dvc.yaml").read_text())["stages"][study]["matrix"]["arm"]
    tables = [table for table in read_params(HERE / "tables.yaml")["tables"] if table["study"] == study]
    assert sorted(graph) == sorted(ARMS[study]["arms"]) == sorted({row["arm"] for t in tables for row in t["rows"]})


@pytest.fixture
def results(tmp_path):
    """Writes what arms found: perplexities by seed, and passkeys and seconds if they matter."""

    def write(arms, keys=None, seconds=None):
        folder = tmp_path / "made-up"
        folder.mkdir()
        for arm, values in arms.items():
            for seed, value in enumerate(values):
                found = (keys or {}).get(arm, [0.0] * 3)[seed]
                one = {
                    "perplexity": {"512": 1.0, "2048": value},
                    "passkey": {"2048": found},
                    "loss": np.log(value) - 0.5,
                }
                one["seconds_per_step"] = (seconds or {}).get(arm, 1.0) + seed
                (folder / f"{arm}-{seed}.json").write_text(json.dumps(one))
        return tmp_path

    return write


def test_an_order_agrees_disagrees_or_stays_open(results):
    ours = {"a": [3.0, 3.1, 2.9], "b": [3.5, 3.6, 3.4], "c": [2.9, 3.3, 2.8], "d": [2.0, 2.1, 1.9], "e": [9, 9.1, 8.9]}
    paper = {"a": 8.0, "b": 9.0, "c": 8.5, "d": 10.0, "e": 8.01}
    rows = [{"arm": arm, "says": arm.upper(), "paper": value} for arm, value in paper.items()]
    table, folder = {"study": "made-up", "rows": rows}, results(ours)
    rows = rows_of(table, folder)
    against, open_, count = order(rows)
    assert set(against) == {f"{x} is better than {y} here" for x, y in ("DA", "DB", "DC", "DE", "BE", "CE")}
    assert open_ == ["A / C"]  # B / C is clear by pairs, A / E is less than one per cent apart in the paper
    assert count == 9
    assert rows[0].leak == pytest.approx(-0.5)
    (folder / "made-up" / "a-1.json").unlink()
    (folder / "made-up" / "a-2.json").unlink()
    with pytest.raises(ValueError, match="a has 1 results"):
        rows_of(table, folder)


def test_retrieval_is_told_against_full_attention_and_cost_against_s2(results):
    names = ["full-attention", "s2-only", "demo"]
    keys = {"full-attention": [0.9, 1.0, 0.95], "s2-only": [0.3, 0.4, 0.3], "demo": [0.9, 0.95, 1.0]}
    folder = results({name: [3.0, 3.1, 2.9] for name in names}, keys, {"full-attention": 2.0, "demo": 1.3})
    table = {"study": "made-up", "rows": [{"arm": name, "says": name, "paper": None} for name in names]}
    lines = retrieval_table(rows_of(table, folder))
    assert "| demo | 2.999 ± 0.248 | 95 ± 12 % | 1.30 |" in lines
    assert lines[-2:] == [
        "- s2-only: -62 points from full attention throughout, clear of the seeds' noise.",
        "- demo: +0 points from full attention throughout, within the seeds' noise, but costs more than 1.1 of S2-Attn.",
    ]
