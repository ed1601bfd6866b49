"""The experiments' patterns are what they are called, every arm is valid, and the verdict on an order follows the numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from experiments import answers, cost, patterns
from experiments.arm import settings_of
from experiments.tables import by_perplexity, draw, in_all, order, page, paper_table, retrieval_table, rows_of
from longlora.attention.shifted import Attention, enable, shifted_sparse_attention
from longlora.evaluation.passkey import Passkey
from longlora.evaluation.perplexity import Perplexity
from longlora.model.adapter import Adapter
from longlora.model.position import Position
from longlora.planning.cost import Shape, forward_flops
from longlora.section import read_params, section_of
from longlora.training.fit import Fit

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
        "sinks": (resting | (place_L < patterns.SINKS) & past_LL, moved | (place_L < patterns.SINKS) & past_LL),
    }[pattern]
    return torch.stack([first, first, second, second])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("pattern", ["across-layers", "only-shifted", "dilated", "roll-back", "swapped", "sinks"])
def test_a_pattern_is_its_dense_mask(pattern, layer):
    dice = torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 6, generator=dice).double() for heads in (4, 2, 2))
    out = patterns.attend(q, k, v, pattern=pattern, size=SIZE, layer=layer)
    dense = scaled_dot_product_attention(q, k, v, attn_mask=mask(pattern, layer), enable_gqa=True)
    assert torch.allclose(out, dense)


@pytest.mark.parametrize("by", range(SIZE))
def test_groups_may_begin_anywhere(by):
    dice = torch.manual_seed(0)
    qkv = torch.randn(3, 2, 4, LENGTH, 6, generator=dice).double()
    place_L = torch.arange(LENGTH)
    group_L = (place_L - by) // SIZE
    seen_LL = (group_L[:, None] == group_L) & (place_L[:, None] >= place_L)
    dense = scaled_dot_product_attention(*qkv, attn_mask=seen_LL)
    assert torch.allclose(patterns.moved(qkv, SIZE, by=by), dense)


def test_wandering_groups_wander():
    qkv = torch.randn(3, 1, 4, LENGTH, 6, generator=torch.manual_seed(0)).double()
    torch.manual_seed(1)
    outs = [patterns.wandering(qkv, SIZE) for _ in range(8)]
    assert len({tuple(out.flatten().tolist()) for out in outs}) > 2


def test_a_pattern_gives_way_to_full_attention_in_the_last_steps():
    from longlora.training import fit

    model = SimpleNamespace(set_attn_implementation=lambda name: said.append(name), config=SimpleNamespace())
    said, real = [], []
    settings = section_of(Attention, settings_of(ROOT, "retrieval", "last-8"), "attention")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "enable", lambda model, attention: real.append(attention.pattern))
        with patterns.in_place_of_s2("wandering"):
            fit.enable(model, settings)
            fit.enable(model, settings.model_copy(update={"pattern": "full"}))
    assert said == ["WANDERING_0.25"] and real == ["full"]


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
    """Writes what arms found: perplexities by seed, losses of far answers and seconds if they matter."""

    def write(arms, far=None, seconds=None):
        folder = tmp_path / "made-up"
        folder.mkdir()
        for arm, values in arms.items():
            for seed, value in enumerate(values):
                answers = {"nats": (far or {}).get(arm, [0.0] * 3)[seed], "right": 0.5}
                one = {
                    "perplexity": {"512": 1.0, "2048": value},
                    "passkey": {"2048": 0.5 + seed / 10},
                    "answers": {"near": answers, "far": answers},
                }
                if arm != "untrained":
                    one |= {"loss": np.log(value) - 0.5, "seconds_per_step": (seconds or {}).get(arm, 1.0) + seed}
                (folder / f"{arm}-{seed}.json").write_text(json.dumps(one))
        return tmp_path

    return write


def test_an_order_agrees_disagrees_or_stays_open(results):
    ours = {"a": [3.0, 3.1, 2.9], "b": [3.5, 3.6, 3.4], "c": [2.9, 3.3, 2.8], "d": [2.0, 2.1, 1.9], "e": [9, 9.1, 8.9]}
    ours["untrained"] = [30.0] * 3
    paper = {"a": 8.0, "b": 9.0, "c": 8.5, "d": 10.0, "e": 8.01, "untrained": None}
    rows = [{"arm": arm, "says": arm.upper(), "paper": value} for arm, value in paper.items()]
    table, folder = {"study": "made-up", "rows": rows}, results(ours)
    rows = rows_of(table, folder)
    against, open_, count = order(rows, by_perplexity)
    assert {one.partition(" here")[0] for one in against} == {
        f"{x} is better than {y}" for x, y in ("DA", "DB", "DC", "DE", "BE", "CE")
    }
    assert "B is better than E here, by 157.2 %" in against
    assert in_all([rows, rows]) == (
        "Over all tables, in the paper's order: by perplexity 4 of 18 pairs, and 12 the other way round; "
        "by far answers 0 of 18 pairs, and 0 the other way round. The rest is undecided."
    )
    assert open_ == ["A / C"]  # B / C is clear by pairs, A / E is less than one per cent apart in the paper
    assert count == 9
    assert rows[0].leak == pytest.approx(-0.5)
    (folder / "made-up" / "b-1.json").unlink()
    with pytest.raises(ValueError, match=r"b has 2 results in .*, a 3$"):
        rows_of(table, folder)
    (folder / "made-up" / "a-1.json").unlink()
    (folder / "made-up" / "a-2.json").unlink()
    with pytest.raises(ValueError, match="a has 1 results"):
        rows_of(table, folder)


def test_a_paper_table_compares_by_perplexity_and_by_answers(results, tmp_path):
    ours, far = {"a": [3.0, 3.0, 3.0], "b": [3.1, 3.1, 3.1]}, {"a": [5.0, 5.1, 4.9], "b": [4.0, 4.1, 3.9]}
    said = [{"arm": "untrained", "says": "nothing", "paper": None}]
    said += [{"arm": arm, "says": arm.upper(), "paper": value} for arm, value in {"a": 8.0, "b": 9.0}.items()]
    table = {"study": "made-up", "title": "Table", "paper": "PG19", "rows": said}
    rows = rows_of(table, results(ours | {"untrained": [30.0] * 3}, far))
    lines = paper_table(table, rows)
    assert "| nothing | none | 30.000 ± 0.000 | 0.00 ± 0.00 | 50 ± 0 % | none |" in lines
    assert "| A | 8.0 | 3.000 ± 0.000 | 5.00 ± 0.25 | 50 ± 0 % | -0.50 |" in lines
    by_perplexity, by_answers = (line for line in lines if line.startswith("By "))
    assert "1 of the 1 pairs" in by_perplexity and "0 of the 1 pairs" in by_answers
    assert lines[-1] == "- The other way round: B is better than A here, by 1.00 nats."
    draw([(table, rows)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    said[-1]["paper"] = 8.01
    assert paper_table(table, rows_of(table, tmp_path))[-1].startswith("No two rows are 1 % or more apart")


def test_retrieval_is_told_against_s2_and_as_a_share_of_the_way_to_full_attention(results):
    names = ["untrained", "full-attention", "s2-only", "demo", "same"]
    far = {
        "full-attention": [4.9, 5.0, 4.95],
        "s2-only": [8.3, 8.4, 8.3],
        "demo": [6.6, 6.65, 6.7],
        "same": [8.2, 8.3, 8.4],
    }
    folder = results({name: [3.0, 3.1, 2.9] for name in names}, far, {"full-attention": 2.0, "demo": 1.3})
    table = {"study": "made-up", "rows": [{"arm": name, "says": name, "paper": None} for name in names]}
    lines = retrieval_table(rows_of(table, folder))
    assert "| demo | 2.999 ± 0.248 | 60 ± 25 % | 50 ± 0 % | 50 ± 0 % | 6.65 ± 0.12 | 1.18 ± 0.26 |" in lines
    assert "| untrained | 2.999 ± 0.248 | 60 ± 25 % | 50 ± 0 % | 50 ± 0 % | 0.00 ± 0.00 | none |" in lines
    assert lines[-3:] == [
        "- full-attention: -3.38 ± 0.07 nats, clear of the seeds' noise, 100 % of the way to full attention.",
        "- demo: -1.68 ± 0.19 nats, clear of the seeds' noise, 50 % of the way to full attention.",
        "- same: -0.03 ± 0.29 nats, within the seeds' noise.",
    ]


@pytest.mark.parametrize("study", list(ARMS))
def test_the_pages_are_what_the_results_say(study):
    tables = [table for table in read_params(HERE / "tables.yaml")["tables"] if table["study"] == study]
    assert (
        page(study, [(table, rows_of(table, HERE / "results")) for table in tables])
        == (HERE / f"{study}.md").read_text()
    )


class Letters:
    """A tokenizer whose tokens are the letters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    bos_token_id = None


@pytest.mark.parametrize(
    "question, end",
    [
        ("What is the code? The code is 123.\n", "123.\n"),
        ("print Ada\n4567\n", "4567\n"),
        ("What did we send to Ada? We sent old house.\n", "house.\n"),
    ],
)
def test_an_answer_is_the_last_word_with_what_closes_it(question, end):
    letters = Letters()
    assert answers.answer(letters(question)["input_ids"], letters) == len(end)


def test_answers_are_told_by_distance_and_only_answers_count():
    """A model that copies what followed the same letters before, the more of them the better: it is right up to its reach."""

    class Copies:
        device = "cpu"

        def __init__(self, reach):
            self.reach = reach

        def __call__(self, input_ids, **_):
            text, logits = "".join(map(chr, input_ids[0])), torch.zeros(1, input_ids.shape[1], 128)
            for place in range(3, len(text)):
                found = text.rfind(text[place - 2 : place + 1], max(0, place - self.reach), place)
                if found >= 0:
                    logits[0, place, ord(text[found + 3])] = 20.0
            return SimpleNamespace(logits=logits)

    texts = [
        "the people of the several states have conferred upon their government many great and lasting powers " * 20
    ]
    settings = {"tokenizer": Letters(), "texts": texts, "length": 1024, "group": 256, "count": 12, "seed": 1}
    blind, near, whole = (answers.measure(Copies(reach), **settings) for reach in (1, 256, 1024))
    assert blind["far"] == {
        "nats": pytest.approx(blind["far"]["nats"]),
        "right": 0.0,
        "answers": whole["far"]["answers"],
    }
    # It copies the full stop of "is 123. Remember it" with what follows: few of its answers are right to the end of the line.
    assert near["near"]["right"] > 0 == near["far"]["right"] < whole["far"]["right"]
    assert near["near"]["nats"] < blind["near"]["nats"] - 10
    assert near["near"]["nats"] == pytest.approx(whole["near"]["nats"], abs=0.5)
    assert whole["far"]["nats"] < near["far"]["nats"] - 10
    assert min(whole["far"]["answers"], whole["near"]["answers"]) >= 30


def test_flops_that_are_counted_are_those_of_the_formula_and_shifted_groups_have_two_halves():
    shape = Shape.from_config(json.loads((ROOT / "tiny/model/config.json").read_text()))
    attention = section_of(Attention, settings_of(ROOT, "paper"), "attention")
    parts = {}
    for pattern in ("full", "s2"):
        model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model", local_files_only=True).train()
        enable(model, attention.model_copy(update={"pattern": pattern}))
        formula = forward_flops(shape, workload=cost.workload(512, pattern, attention))
        parts[pattern] = cost.counted(model, 512), formula
    counted, formula = parts["full"]
    assert counted == formula
    counted, formula = parts["s2"]
    assert counted.attention == formula.attention * 15 / 16
    assert counted.model_copy(update={"attention": formula.attention}) == formula
