"""The benchmarks run at their smallest size, go on where they were interrupted, and draw what they measured."""

import json
import sys

import matplotlib.image
import pytest
import torch
from transformers import LlamaConfig

from benchmarks import __main__ as bench
from benchmarks import attention, fresh, gpu, memory, step
from benchmarks.turns import take_turns
from longlora.attention.shifted import shifted_sparse_attention


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where the results go; peaks, each of which takes a process, are invented but for the test of their own."""
    for module in (attention, memory, step, bench.loss):
        monkeypatch.setattr(module, "rise_mb", lambda *words: 7.0 + len(words))
    return tmp_path / "bench.json"


def run(out, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench", "--small", "--out", str(out), *words])
    bench.main()
    return json.loads(out.read_text())


def test_the_smallest_sizes_give_ratios_intervals_and_a_picture(out, monkeypatch):
    results = run(out, monkeypatch, "attention", "step", "loss", "memory", "preparation")
    assert {"processor", "threads", "bfloat16", "torch", "transformers"} <= results["machine"].keys()
    for part, ours in {"attention": "s2", "step": "s2", "loss": "chunked", "preparation": "preparation"}.items():
        for case in results["parts"][part].values():
            assert case["methods"][ours]["ratio"] == 1
            for said in case["methods"].values():
                low, high = said["interval"]
                assert 0 < low <= said["ratio"] <= high
    assert [c["length"] for c in results["parts"]["memory"].values()] == [256, 512]
    picture = matplotlib.image.imread(out.with_suffix(".png"))
    assert picture.shape[:2] == (880, 1430)
    assert picture[..., :3].std() > 0.05


def test_what_is_there_is_not_measured_again_unless_named(out, monkeypatch):
    first = run(out, monkeypatch, "loss")
    measured = []
    monkeypatch.setattr(bench, "PARTS", {"loss": bench.loss})
    monkeypatch.setattr(
        bench.loss, "measure", lambda length, patience: measured.append(length) or first["parts"]["loss"]["256"]
    )
    run(out, monkeypatch)
    assert measured == []
    run(out, monkeypatch, "loss")
    assert measured == [256]
    out.write_text(json.dumps({**first, "machine": {"processor": "another"}}))
    assert run(out, monkeypatch)["machine"] == first["machine"]
    assert measured == [256, 256]


def test_an_unknown_part_is_refused(out, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(out, monkeypatch, "atention")
    assert "no benchmark atention: there are attention, step" in capsys.readouterr().err


def test_roll_and_mask_is_the_roll_of_the_paper():
    (q, k, v), _ = attention.prepared(64, torch.float64)
    ours = shifted_sparse_attention(q, k, v, group_size=16, shift="roll").transpose(1, 2)
    torch.testing.assert_close(
        attention.roll_and_mask(q, k, v), ours, atol=1e-6, rtol=1e-5
    )  # its softmax is in float32


def test_a_ratio_is_ours_by_theirs_and_lies_in_its_interval(monkeypatch):
    seconds = iter([1.0, 4.0, 2.0, 4.0, 1.0, 5.0])
    monkeypatch.setattr("benchmarks.turns.seconds", lambda work: next(seconds))
    found = take_turns({"ours": lambda: None, "theirs": lambda: None}, ours="ours", patience=0)
    assert found["theirs"] == {"seconds": 4.0, "ratio": 0.25, "interval": [0.2, 0.5], "turns": 3}


def test_a_peak_is_the_logits_that_are_held_at_once():
    copy = 1024 * 32000 * 4 / 2**20
    assert 2 * copy < fresh.rise_mb("loss", "plain", 1024) < 4.5 * copy


def test_the_line_of_a_straight_growth_is_itself():
    rows = [{"length": n, "peak_mb": {"ours": 5 + n * 0.03}} for n in (1000, 2000, 8000)]
    slope, start, off = memory.line(rows, "ours")
    assert (round(slope, 9), round(start, 9), round(off, 9)) == (30, 5, 0)


def test_the_gpu_benchmark_compares_methods_that_agree(monkeypatch):
    """On a CPU, where it has no clock and no memory to read: that every case runs, and that ours and full attention are right."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setitem(gpu.LAYERS, "small", (4, 2, 16))
    names = ["full", "s2 sdpa", "authors"]
    assert list(gpu.attention_case("small", 64, names, turns=1)) == names
    q, k, v = (torch.randn(1, heads, 64, 16, dtype=torch.float64) for heads in (4, 2, 2))
    mine, theirs = (gpu.METHODS[name](q, k, v) for name in ("s2 sdpa", "authors"))
    torch.testing.assert_close(mine[:, :, :2], theirs[:, :, :2])  # heads that rest
    torch.testing.assert_close(mine[:, 8:, 2:], theirs[:, 8:, 2:])  # those that move, but for the first tokens:
    assert not torch.allclose(mine[:, :8, 2:], theirs[:, :8, 2:])  # theirs see the sequence's end
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, use_cache=False
    )
    cases = dict(gpu.step_cases(config, {64: ("s2", "full", "authors")}))
    assert [name.rpartition(" ")[2] for name in cases] == ["s2", "full", "authors"]


def test_the_gpu_benchmark_says_when_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu.main()
    assert not list(tmp_path.iterdir())
