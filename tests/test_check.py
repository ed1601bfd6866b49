"""params.yaml is checked as a whole before anything is computed: sections by their own classes, then one against another."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dummy
import pytest
from omegaconf import OmegaConf

from flows import parameters
from flows.run_dir import RunDir
from longlora.check import check, sections_of
from longlora.check_paths import KNOWN, QUARTERS
from longlora.evaluation import longqa
from longlora.evaluation.breakdown import PARTED, upper_depth
from longlora.model import integrity, licence
from longlora.model.position import Position
from longlora.section import read_params
from tasks.stages import Stage

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny/model"
KINDS = sections_of((ROOT / "dvc.yaml").read_text())


PAIRS = (
    "evaluate.longqa=[base]",
    "pairs.sources=[{kind: file, name: README.md, split: null, take: null, license: x}]",
    "fit.pairs_share=0.5",
)


def params(*overrides: str) -> dict:
    merged = OmegaConf.merge(read_params(ROOT / "params.yaml"), OmegaConf.from_dotlist(list(overrides)))
    return OmegaConf.to_container(merged)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LONGLORA_EVALUATION_LAUNCHER", raising=False)


def test_the_sections_of_the_pipeline_are_those_of_params_yaml_and_right():
    assert KINDS.keys() == params().keys()
    check(params(), KINDS)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["passkey.samples=0"], ["passkey.samples = 0: Input should be greater than 0"]),
        (["fit.lr_scheduler_type=cosin"], ["fit.lr_scheduler_type = 'cosin'"]),
        (["perplexity.last=99999", "fit.steps=0"], ["perplexity: the shortest of lengths", "fit.steps = 0"]),
        (["gate.rules=[{name: x, metric: integrity/whole}]"], ["rule 'x' needs one of at_most and at_least"]),
        (
            ["position.context=8192"],
            [
                "perplexity.lengths = [512, 1024, 2048, 4096] lacks position.context = 8192, which the gate's rule 'it reads",
                "set perplexity.lengths=[512, 1024, 2048, 4096, 8192]",
                "set passkey.lengths=[512, 1024, 2048, 4096, 8192]",
            ],
        ),
        (
            ["passkey.lengths=[1024,4096]"],
            ["passkey.lengths = [1024, 4096] has none from 256 up to the base's window, 512,", "add 512"],
        ),
        (
            ["perplexity.lengths=[255,4096]", "perplexity.last=9", "perplexity.bands=null"],
            ["perplexity.lengths = [255, 4096] has none from 256 up to the base's window, 512,", "add 512"],
        ),
        (
            ["passkey.depths=[0.5,0.9,1.0]"],
            [
                "passkey.depths = [0.5, 0.9, 1.0]: at least half must be at most 0.5, where the gate's rule 'it retrieves from"
            ],
        ),
        (
            ["passkey.depths=[0.0,0.5,1.0]", "passkey.samples=1"],
            ["passkey.samples = 1 at 3 of passkey.depths: 3 at each length, and at least 5", "set passkey.samples=2"],
        ),
        (
            [
                "needle.depths=[1.0]",
                "evaluate.needle=[extended]",
                "gate.more_rules=[{name: x, metric: needle/extended/target, at_least: 0.5}]",
            ],
            [
                "needle.depths = [1.0]: at least half must be at most 0.5, where the gate's rule 'x' is asked; add 0.0;",
                "needle.samples = 4 at 1 of needle.depths: 4 at each length, and at least 5",
            ],
        ),
        (
            [
                "ruler.samples=2",
                "ruler.tasks=[single,tracking]",
                "evaluate.ruler=[extended]",
                "gate.more_rules=[{name: x, metric: ruler/extended/target, at_least: 0.5}]",
            ],
            [
                "ruler.samples = 2 at 2 of ruler.tasks: 4 at each length, and at least 5 say something, where the gate's rule 'x'"
            ],
        ),
        (
            [
                "ruler.samples=1",
                "evaluate.ruler=[extended]",
                "gate.more_rules=[{name: x, metric: ruler/extended/target/task/tracking, at_least: 0.5}]",
            ],
            ["ruler.samples = 1 at 1 task: 1 at each length, and at least 5", "set ruler.samples=5"],
        ),
        (
            [
                "passkey.samples=4",
                "gate.more_rules=[{name: x, metric: passkey/extended/target/depth/0.00, at_least: 0.5}]",
            ],
            [
                "passkey.samples = 4 at 1 depth: 4 at each length, and at least 5 say something, where the gate's rule 'x'"
            ],
        ),
        (
            [
                "longeval.samples=1",
                "evaluate.longeval=[extended]",
                "gate.more_rules=[{name: x, metric: longeval_lines/extended/target, at_least: 0.5}]",
            ],
            ["longeval.samples = 1 at 1 task: 1 at each length", "set longeval.samples=5"],
        ),
        (
            ["gate.rules=[{name: x, metric: sliding_perplexity/extended/3072, at_most: 1}]"],
            ["perplexity.lengths = [512, 1024, 2048, 4096] lacks 3072, which the gate's rule 'x' asks for"],
        ),
        (
            ["blocks.source=text", "blocks.name=/no/texts", "backbone.name=no/model"],
            [
                "backbone.name = 'no/model': nothing is there; a run sees only what git tracks, so give an absolute path",
                "blocks.name = '/no/texts': nothing is there",
            ],
        ),
        (["blocks.source=text", "blocks.name=flows"], ["blocks.name = 'flows': the folder holds no .txt or .md file"]),
        (["blocks.source=jsonl", "blocks.name=docs"], ["blocks.name = 'docs': the folder holds no .jsonl file"]),
        (
            ["blocks.held_out.texts={source: text, name: /no/books, split: null, field: text}"],
            ["blocks.held_out.texts.name = '/no/books': nothing is there"],
        ),
        (
            [PAIRS[1].replace("README.md", "/no/qa.jsonl"), PAIRS[2]],
            ["pairs.sources.0.name = '/no/qa.jsonl': nothing is"],
        ),
        (
            ["position.context=512"],
            ["position.context = 512 must be above the 512 that the base reaches, or method: none"],
        ),
        (["blocks.recall.reach=5000"], ["blocks.recall.reach = 5000 must be at most position.context = 4096"]),
        (["blocks.recall.reach=20"], ["blocks.recall.reach = 20 has no room for a fact and its question; at least 64"]),
        (["blocks.recall.count=0"], ["fit.recall_share = 0.5 needs exercises, and blocks.recall.count is 0"]),
        (["fit.pairs_share=0.1"], ["fit.pairs_share = 0.1 needs pairs: name pairs.sources"]),
        (["fit.recall_share=0.7", "fit.pairs_share=0.4"], ["fit.pairs_share + fit.recall_share = 0.4 + 0.7: must be"]),
        (["fit.global_batch_size=3", "fit.micro_batch_size=2"], ["must be a multiple of micro_batch_size = 2"]),
        (
            ["attention.shift=roll", "position.context=4098", "blocks.recall.reach=4096"],
            [
                "attention.shift: roll needs whole groups, and 4098 tokens are no multiple of the group, 1026: boundaries takes"
            ],
        ),
        (
            ["fit.activation_offloading=true"],
            ["fit.activation_offloading lays off what gradient checkpointing keeps: set"],
        ),
        (["retrain.patterns=[s2]"], ["retrain.patterns names s2, which is attention.pattern already: name full"]),
        (["evaluate.longeval=[base]", "longeval.lengths=[]"], ["longeval has neither tasks with lengths nor cases"]),
        (
            ["evaluate.longeval=[base]", "longeval.cases=[a/x.jsonl,b/x.jsonl]"],
            ["longeval.cases: b/x.jsonl and a/x.jsonl would have one score, 'x'"],
        ),
        (["evaluate.longqa=[base]", "longqa.held_out=true"], ["longqa.cases names no file"]),
        (
            [*PAIRS, "longqa.cases=[qa/a.jsonl]"],
            ["pairs.contamination.cases = null leaves out longqa.cases qa/a.jsonl, so", "set it to qa/a.jsonl"],
        ),
        (
            [*PAIRS, "longqa.cases=[qa/a.jsonl,qb/b.jsonl]", "pairs.contamination.cases=qa"],
            ["pairs.contamination.cases = qa leaves out longqa.cases qb/b.jsonl", "a folder that holds all of"],
        ),
        (
            [*PAIRS, "longqa.cases=[qa/a.ndjson]", "pairs.contamination.cases=qa"],
            ["longqa.cases qa/a.ndjson is asked, and pairs are held against .json, .jsonl, .parquet files only"],
        ),
        (["evaluate.harness=[base]"], ["harness.tasks names no task"]),
        (
            ["evaluate.ruler=[extend]"],
            ["evaluate.ruler names 'extend', and there is no such model; did you mean 'extended'?"],
        ),
        (
            ["rivals.models=[good,'x;touch PWNED;/../mine']"],
            [
                "rivals.models = ['good', 'x;touch PWNED;/../mine']: 'x;touch PWNED;/../mine' is no name: letters, digits"
            ],
        ),
        (["rivals.models=['..']"], ["'..' is no name"]),
        (["evaluate.ruler=['x;touch PWNED']"], ["evaluate.ruler names 'x;touch PWNED', and there is no such model"]),
        (["retrain.patterns=['x;touch PWNED']"], ["retrain.patterns.0 = 'x;touch PWNED'"]),
        (["evaluate.longqa=[base,base]"], ["evaluate.longqa = ['base', 'base']: base stands twice"]),
        (["longqa.cases=[a.jsonl,a.jsonl]"], ["longqa.cases = ['a.jsonl', 'a.jsonl']: a.jsonl stands twice"]),
        (
            ["rescale.methods=[linear]", "evaluate.perplexity=[extended]"],
            [
                "rescale.methods = ['linear'] lacks 'yarn', which the gate's rule 'it reads long texts better",
                "evaluate.perplexity = ['extended'] lacks 'base', which the gate's rule 'it reads short texts",
            ],
        ),
        (
            ["position.method=ntk"],
            [
                "rescale.methods = ['linear', 'yarn'] lacks 'ntk', which the gate's rule 'it reads long texts better than be"
            ],
        ),
        (
            ["rescale.methods=[linear,yarn,nkt,none]"],
            ["names 'nkt', and there is no such scaling; did you mean 'ntk'?", "names 'none', and there is no such"],
        ),
        (
            ["position.method=ntk", "rivals.models=[ntk]"],
            ["rivals.models names 'ntk', which is the base under that scaling: give the folder another name"],
        ),
        (
            ["rivals.models=[full,window]"],
            [
                "rivals.models names 'full', which is a model or a length of the pipeline's own: give the folder another",
                "rivals.models names 'window'",
            ],
        ),
        (["rescale.methods=[yarn,yarn]"], ["rescale.methods = ['yarn', 'yarn']: yarn stands twice"]),
        (
            ["gate.rules=[{name: x, metric: ruler/extended/target, at_least: 0.5}]"],
            ["evaluate.ruler = [] lacks 'extended', which the gate's rule 'x' asks for: add it"],
        ),
        (
            ["gate.more_rules=[{name: z, metric: longqa_f1/extended/4096, at_least: 0.5}]"],
            ["evaluate.longqa = [] lacks 'extended', which the gate's rule 'z' asks for: add it"],
        ),
        (
            ["gate.more_rules=[{name: y, metric: ruler/extended/target, at_least: 0.5}]"],
            ["evaluate.ruler = [] lacks 'extended', which the gate's rule 'y' asks for: add it"],
        ),
    ],
)
def test_what_would_fail_or_be_refused_after_the_training_is_one_line_before(overrides, said):
    with pytest.raises(ValueError, match="^params: ") as caught:
        check(params(*overrides), KINDS)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


def test_data_that_was_there_when_the_run_was_made_may_be_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = params("blocks.source=text", "blocks.name=/no/texts")
    (tmp_path / "sources.yaml").write_text("backbone: {tiny/model: 1.dir}\nblocks: {/no/texts: 2.dir}\npairs: {}\n")
    check(gone, KINDS)
    (tmp_path / "empty").mkdir()  # has a hash, too
    (tmp_path / "sources.yaml").write_text("backbone: {tiny/model: 1.dir}\nblocks: {empty: 3.dir}\n")
    with pytest.raises(ValueError, match=r"^params: blocks.name = 'empty': the folder holds no .txt or .md file$"):
        check(params("blocks.source=text", "blocks.name=empty"), KINDS)
    (tmp_path / "sources.yaml").write_text("backbone: {tiny/model: 1.dir}\nblocks: {}\npairs:\n")
    with pytest.raises(ValueError, match="^params: blocks.name = '/no/texts': nothing is there$"):
        check(gone, KINDS)


def test_texts_are_there_where_the_stage_finds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine" / ".kept").mkdir(parents=True)
    (tmp_path / "mine" / ".kept" / "a.txt").touch()
    asked = params("blocks.source=text", "blocks.name=~/mine")
    with pytest.raises(ValueError, match=r"^params: blocks.name = '~/mine': the folder holds no .txt or .md file$"):
        check(asked, KINDS)
    (tmp_path / "mine" / "A1.TXT").touch()
    check(asked, KINDS)


def test_the_recipe_in_the_docs_is_right(tmp_path):
    said = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/data-and-model.md").read_text(), re.DOTALL)
    assert said
    (tmp_path / "text.txt").write_text("x")
    recipe = said.group(1).replace("/data/my-model", "tiny/model").replace("/data/my-texts", str(tmp_path))
    whole = read_params(ROOT / "params.yaml")
    mine = OmegaConf.to_container(OmegaConf.merge(whole, OmegaConf.create(recipe)))
    check(mine, KINDS)


@pytest.mark.parametrize("checked", ["qa/a.jsonl", "qa", "./qa/"])
def test_pairs_that_are_held_against_all_that_is_asked_are_right(checked):
    check(params(*PAIRS, "longqa.cases=[qa/a.jsonl]", f"pairs.contamination.cases={checked}"), KINDS)


def test_a_harness_that_is_not_installed_is_said_unless_another_environment_may_have_it(monkeypatch):
    asked = params("evaluate.harness=[base]", "harness.tasks=[x]")
    monkeypatch.setattr("longlora.check.PathFinder.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        check(asked, KINDS)
    monkeypatch.setenv("LONGLORA_EVALUATION_LAUNCHER", "ssh node python")
    check(asked, KINDS)


def test_models_of_retrain_and_rivals_can_be_asked_and_are_for_perplexity_without_being_named():
    rule = "gate.rules=[{name: x, metric: passkey/champion/target, at_least: 0.5}]"
    check(params("rivals.models=[champion]", "retrain.patterns=[full]", "evaluate.ruler=[champion,full]", rule), KINDS)
    for label in ("champion", "yarn"):
        with pytest.raises(ValueError, match=f"names '{label}', which is asked without that: leave it out"):
            check(params("rivals.models=[champion]", f"evaluate.passkey=[base,extended,{label}]"), KINDS)


def test_what_a_run_starts_from_is_a_scaling_or_within_the_window_the_base():
    check(params("position.method=ntk", "rescale.methods=[linear,yarn,ntk]"), KINDS)
    check(params("position.method=none"), KINDS)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("perplexity/extended/target, at_least: 1", "perplexity/extended/target is never below 1"),
        ("passkey/extended/target, at_least: -0.05", "passkey/extended/target is never below 0"),
        (
            "passkey/extended/target, at_least: 0, times: passkey/base/window",
            "passkey/extended/target is never below 0",
        ),
        (
            "perplexity/extended/long, at_most: 1.05, times: perplexity/extended/long",
            "it compares perplexity/extended/long",
        ),
        (
            "passkey/extended/target, at_least: -0.05, plus: passkey/extended/target",
            "it compares passkey/extended/target",
        ),
        ("passkey/extended/target, at_least: -0.05, plus: passkey/yarn/target", None),
        (
            "perplexity/extended/target, at_most: 1.05, times: perplexity/extended/target, with_interval: true",
            "it compares perplexity/extended/target",
        ),
        ("passkey/extended/target, at_least: 0, with_interval: true", "passkey/extended/target is never below 0"),
        ("perplexity/extended/target, at_least: 1, with_interval: true", None),
        ("passkey/extended/target, at_most: 0", None),
        ("perplexity/extended/target, at_least: 0.5, times: perplexity/base/target", None),
        ("perplexity/extended/target, at_most: 0.9, times: perplexity/extended/target", None),
        ("passkey/extended/target, at_most: 1", "passkey/extended/target is never above 1; set at_most lower"),
        ("passkey/extended/target, at_most: 1, plus: passkey/yarn/target", "passkey/extended/target is never above 1"),
        (
            "passkey/extended/target, at_least: -1, plus: passkey/yarn/target",
            "passkey/extended/target is never below 0",
        ),
        (
            "passkey/extended/target/depth/0.00/low, at_least: 0",
            "passkey/extended/target/depth/0.00/low is never below",
        ),
        ("passkey/extended/target, at_most: 1, times: passkey/yarn/target", None),
        ("passkey/extended/target/trials, at_least: 5", None),
        ("perplexity/extended/target/low, at_least: 1", None),
        ("integrity/target, at_least: 4096", None),
        ("mine/extended, at_least: 0", None),
    ],
)
def test_a_rule_of_the_gate_that_holds_of_any_model_is_refused(rule, said):
    asked = params(f"gate.more_rules=[{{name: mine, metric: {rule}}}]")
    if said is None:
        check(asked, KINDS)
        return
    with pytest.raises(ValueError, match=f"^params: the gate's rule 'mine' holds of any model: {said}"):
        check(asked, KINDS)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("passkey/extended/target, at_least: 80", "passkey/extended/target is never above 1; set at_least lower"),
        (
            "passkey/extended/target, at_least: 1.1, plus: passkey/yarn/target",
            "passkey/extended/target is never above 1",
        ),
        (
            "passkey/extended/target, at_most: -1.1, plus: passkey/yarn/target",
            "passkey/extended/target is never below 0",
        ),
        ("passkey/extended/target, at_least: 1, with_interval: true", "passkey/extended/target is always below 1"),
        (
            "passkey/base/target, at_most: 0, with_interval: true",
            "passkey/base/target is always above 0; set at_most h",
        ),
        (
            "perplexity/extended/target, at_most: 0.99",
            "perplexity/extended/target is never below 1; set at_most higher",
        ),
        (
            "integrity/whole, at_least: 1, with_interval: true",
            "integrity/whole has no interval; leave out with_interval",
        ),
        (
            "passkey/extended/target/low, at_least: 0.5, with_interval: true",
            "passkey/extended/target/low has no interval",
        ),
        ("passkey/extended/target, at_least: 1", None),
        ("integrity/target/value, at_least: 4096", None),
        ("passkey/extended/target, at_least: 0, plus: passkey/yarn/target, with_interval: true", None),
        ("mine/extended, at_least: 80, with_interval: true", None),
    ],
)
def test_a_rule_of_the_gate_that_holds_of_no_model_is_refused(rule, said):
    asked = params(f"gate.more_rules=[{{name: mine, metric: {rule}}}]")
    if said is None:
        check(asked, KINDS)
        return
    with pytest.raises(ValueError, match=f"^params: the gate's rule 'mine' holds of no model: {said}"):
        check(asked, KINDS)


LONG = ["evaluate.longppl=[base,extended]", "evaluate.keytokens=[yarn]"]
FILE_ALONE = ["longeval.tasks=[]", "longeval.lengths=[]", "longeval.samples=1", "longeval.cases=[qa/16384.jsonl]"]
FILE_ALONE += ["evaluate.longeval=[extended]"]
LONGEVAL = ["evaluate.longeval=[extended]", "longeval.tasks=[lines]", "longeval.cases=[qa/20_topics.jsonl]"]
ANSWERS = ["evaluate.longqa=[extended]", "longqa.cases=[qa/a.jsonl]", "longqa.length=3000"]
BEYOND = [
    "position.context=5000",
    "perplexity.lengths=[512,5000]",
    "passkey.lengths=[512,5000]",
    "perplexity.bands=null",
]


@pytest.mark.parametrize(
    ("overrides", "path", "said"),
    [
        (LONG, "longppl/extended/base", "behind the model stands who picked the tokens, of evaluate.keytokens = ['yarn']"),
        (LONG, "longppl/extended", "behind the model stands who picked the tokens, of evaluate.keytokens = ['yarn']"),
        (LONG, "longppl/extended/yarn", None),
        (["evaluate.ruler=[extended]", "ruler.tasks=[single,common]"], "ruler/extended/target/task/tracking",
         "ruler.tasks are single, common"),
        (["evaluate.ruler=[extended]"], "ruler/extended/target/tasks/single", "behind the length stands task, or nothing"),
        (["evaluate.ruler=[extended]", "ruler.samples=5"], "ruler/extended/4096/task/tracking", None),
        (["evaluate.ruler=[extended]"], "ruler/extended/effective", None),
        (LONGEVAL, "longeval_topics/extended/4096", "longeval.tasks = ['lines'] lacks 'topics', which the gate's rule 'm'"),
        (LONGEVAL, "longeval_lines/extended/3000", "longeval.lengths = [2048, 4096] lacks 3000"),
        ([*LONGEVAL, "longeval.lengths=[]"], "longeval_lines/extended/4096", "longeval.lengths = [] lacks 4096"),
        (LONGEVAL, "longeval_topics/extended/topics", "behind the model stands a length: a number, target, window"),
        (LONGEVAL, "longeval_topics/extended/20_topics", None),
        (FILE_ALONE, "longeval_lines/extended/16384", None),
        (FILE_ALONE, "longeval_lines/extended/8192", "longeval.lengths = [] lacks 8192"),
        (["evaluate.ruler=[extended]"], "ruler/extended/effective/value", None),
        (LONGEVAL, "passkey/extended/20_topics", "behind the model stands a length"),
        ([], "passkey/extended", "behind the model stands a length: a number, target, window, lowest, short, long"),
        ([], "passkey/extended/depth/0.00", "behind the model stands a length"),
        ([], "passkey/extended/target/depht/0.00", "behind the length stands depth, or nothing"),
        ([], "position_nats/extended/4000", "a band ends every 256 tokens up to 4096"),
        ([], "position_nats/extended/3840", None),
        ([], "position_nats/full/long", "evaluate.perplexity = ['base', 'extended'] lacks 'full'"),
        ([], "perplexity/extended/documents", None),
        ([], "passkey/extended/documents", "behind the model stands a length"),
        ([], "perplexity/extended/target/foo", "target stands nothing, or one of value, low, high, tokens"),
        *(
            ([], path, f"behind {path.rpartition('/')[0]} stands nothing{stands}")
            for path, stands in (
                ("perplexity/extended/target/places", ", or one of value, low, high, tokens"),
                ("perplexity/extended/target/trials", ", or one of value, low, high, tokens"),
                ("perplexity/extended/documents/value", ""),
                ("passkey/extended/target/depth/0.50/tokens", ", or one of value, low, high, trials"),
                ("position_nats/extended/3840/tokens", ", or one of value, low, high"),
                ("integrity/whole/trials", ", or one of value"),
                ("licence/base/low", ", or one of value"),
            )
        ),
        ([], "passkey/extended/target/effective", "behind the length stands depth, or nothing"),
        ([], "passkey/extended/target/tokens", "behind the length stands depth, or nothing"),
        ([], "passkey/extended/target/trials", None),
        ([], "perplexity/extended/target/tokens", None),
        ([], "integrity/whole/value", None),
        (["evaluate.ruler=[extended]"], "ruler/extended/effective/threshold", None),
        (["evaluate.ruler=[extended]"], "ruler/extended/effective/low", "effective stands nothing, or one of value, threshold"),
        (LONGEVAL, "longeval_lines/extended/4096/tokens", None),
        (ANSWERS, "longqa/extended/cases/trials", "behind longqa/extended/cases stands nothing"),
        (ANSWERS, "longqa/extended/f1/trials", None),
        (ANSWERS, "longqa_f1/extended", "longqa_f1/extended, and behind the model stands a length"),
        (ANSWERS, "longqa_depth/extended", "behind the model stands a depth"),
        ([], "perplexity/extended/target/depth/0.50", "behind perplexity/extended/target stands nothing"),
        ([], "perplexity/extended/target/high", None),
        ([], "passkey/extended/target/depth/0.50/low", None),
        ([], "passkey/extended/target/depth/0.50/loww", "behind passkey/extended/target/depth/0.50 stands nothing"),
        (LONG, "longppl/extended/yarn/lo", "behind longppl/extended/yarn stands nothing"),
        (LONG, "longppl/extended/yarn/tokens", None),
        (ANSWERS, "longqa/extended", "behind the model stands what was sc"),
        (ANSWERS, "longqa/extended/exat", "asks for longqa/extended/exat; did you mean 'exact'?"),
        (ANSWERS, "longqa/extended/rouge_l", None),
        (ANSWERS, "longqa/extended/cut", None),
        (ANSWERS, "longqa_f1/extended/1000", "lengths of documents are powers of two, and longqa.length = 3000"),
        (ANSWERS, "longqa_f1/extended/f1", "lengths of documents are powers of two"),
        (ANSWERS, "longqa_f1/extended/3000", None),
        ([*ANSWERS, *BEYOND], "longqa_f1/extended/target", "asks for longqa_f1/extended/target, and lengths of documents"),
        (ANSWERS, "longqa_f1/extended/target", None),
        (ANSWERS, "longqa_f1/extended/1024/depth/0.5", "depths of questions are 0.25, 0.50, 0.75, 1.00"),
        (ANSWERS, "longqa_f1/extended/1024/depth/0.50", None),
        (ANSWERS, "longqa_f1/extended/1024/dept/0.50", "behind longqa_f1/extended/1024 stands nothing"),
        (ANSWERS, "longqa_depth/extended/0.50", "one of 0.25, 0.50, 0.75, 1.00 and one of exact, f1, evidence, evidence_floor"),
        (ANSWERS, "longqa_depth/extended/0.50/rouge_l", "and one of exact, f1, evidence"),
        (ANSWERS, "longqa_depth/extended/0.50/f1", None),
        ([], "integrity/hole", "asks for integrity/hole; did you mean 'whole'?"),
        ([], "integrity/whole/foo", "behind integrity/whole stands nothing"),
        ([], "licence/text", "asks for licence/text; did you mean 'texts'?"),
        ([], "numbers/extendet", "asks for numbers/extendet; did you mean 'extended'?"),
        ([], "numbers/untrained", None),
        (["rivals.models=[mine]", "retrain.patterns=[full]"], "numbers/ntk", "there are: base, extended, linear, yarn, full, mine"),
        (["position.method=ntk"], "numbers/untrained", "asks for numbers/untrained; there are: base"),
        ([], "numbers", "asks for numbers; there are: base"),
        ([], "numbers/teacher", None),
        ([], "mine/extended", None),
    ],
)  # fmt: skip
def test_the_path_of_a_rule_leads_to_a_score(overrides, path, said):
    asked = params(*overrides, f"gate.more_rules=[{{name: m, metric: {path}, at_least: 0.1, plus: mine/other}}]")
    if said is None:
        check(asked, KINDS)
        return
    with pytest.raises(ValueError, match=f"^params: .*{re.escape(said)}") as caught:
        check(asked, KINDS)
    assert "\n" not in str(caught.value)


def test_facts_and_scores_of_answers_are_those_that_are_measured():
    measured = integrity.measure(TINY, extended=TINY, position=Position(method="none", context=64))["integrity"]
    assert {*KNOWN["integrity"]} == measured.keys()
    own = {"license": "MIT", "name": "x"}
    assert KNOWN["licence"] == tuple(
        licence.measure(own, texts=own, pairs=[], licence=licence.Licence(checked=[]))["licence"]
    )
    assert {*KNOWN["longqa"]} == {*longqa.METRICS, *PARTED, "cases", "cut"}
    assert [*QUARTERS] == [f"{upper_depth(depth):.2f}" for depth in (0.0, 0.3, 0.6, 0.9)]


PICKED = ["evaluate.longppl=[yarn,extended]", "evaluate.keytokens=[yarn,extended]"]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            "longppl/extended/extended, at_most: 3",
            "asks for longppl/extended/extended, over tokens that the model picked",
        ),
        (
            "longppl/extended/extended, at_most: 1, times: longppl/yarn/extended",
            "over tokens that the model picked itself",
        ),
        ("longppl/yarn/yarn, at_least: 1, times: longppl/extended/yarn", None),
        ("longppl/extended/yarn, at_most: 1, times: longppl/yarn/yarn", None),
        ("longppl/extended/yarn, at_most: 1, times: longppl/yarn/extended", "over other tokens: name one evaluator"),
        (
            "longppl/untrained/yarn, at_most: 3",
            "asks for longppl/untrained/yarn, over tokens that the model picked itself",
        ),
    ],
)
def test_a_rule_on_longppl_is_over_tokens_that_another_model_picked(rule, said):
    asked = params(*PICKED, f"gate.more_rules=[{{name: m, metric: {rule}}}]")
    if said is None:
        check(asked, KINDS)
        return
    with pytest.raises(ValueError, match=f"^params: the gate's rule 'm' .*{said}"):
        check(asked, KINDS)


WITH_SPREAD = "gate.more_rules=[{{name: m, metric: {}, with_interval: true}}]"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["perplexity.samples=1"], "perplexity.samples = 1 shows no spread, and the gate's rule 'it reads short texts"),
        (["blocks.held_out.names=[1981-Carter-1]"], "blocks.held_out.names = ['1981-Carter-1'] shows no spread"),
        (
            [*LONG, "longppl.samples=1", WITH_SPREAD.format("longppl/extended/yarn, at_most: 9")],
            "longppl.samples = 1 shows no spread, and the gate's rule 'm' asks for an interval: at least 2 do",
        ),
        (
            ["evaluate.needle=[extended]", "needle.samples=1", WITH_SPREAD.format("needle/extended/target, at_least: 0.2")],
            "needle.samples = 1 shows no spread",
        ),
        (["perplexity.samples=2", "blocks.held_out.names=[a,b]"], None),
        (["perplexity.samples=1", "gate.rules=[{name: m, metric: perplexity/extended/target, at_most: 9}]"], None),
        (
            ["evaluate.needle=[extended]", "needle.samples=6", WITH_SPREAD.format("needle/extended/target, at_least: 0.2")],
            None,
        ),
    ],
)  # fmt: skip
def test_an_interval_that_one_document_can_not_show_is_not_asked_for(overrides, said):
    if said is None:
        check(params(*overrides), KINDS)
        return
    with pytest.raises(ValueError, match=f"^params: {re.escape(said)}"):
        check(params(*overrides), KINDS)


def test_a_few_questions_of_the_harness_judge_nothing(monkeypatch):
    asked = ["evaluate.harness=[extended]", "harness.tasks=[x]", "harness.limit=4"]
    rule = "gate.more_rules=[{name: m, metric: harness/extended/x/acc, at_least: 0.5}]"
    monkeypatch.setenv("LONGLORA_EVALUATION_LAUNCHER", "python")
    check(params(*asked), KINDS)
    check(params(*asked[:2], "harness.limit=5", rule), KINDS)
    check(params(*asked[:2], rule), KINDS)
    with pytest.raises(
        ValueError, match=r"harness.limit = 4: .* at least 5 .* rule 'm' is asked; set harness.limit=null"
    ):
        check(params(*asked, rule), KINDS)


def test_what_is_wrong_with_a_file_of_cases_is_said_before_the_training(tmp_path):
    file = tmp_path / "a.jsonl"
    asked = params("evaluate.longqa=[extended]", "longqa.held_out=false", f"longqa.cases=[{file}]")
    check(asked, KINDS)  # not there: another machine may have scored it
    case = {"document": "A pound was paid, and a pound was owed.", "question": "What?", "answers": ["a pound"]}
    file.write_text(json.dumps(case | {"evidence": ["pound"]}))
    with pytest.raises(ValueError, match=r"a.jsonl:1: evidence: 'pound' stands 2 times in the document"):
        check(asked, KINDS)


GAINS = "training has gained more in long texts than in short ones"
INSIDE = [
    "rescale.methods=[linear,yarn]",
    "position.method=none",
    "position.context=512",
    "perplexity.lengths=[384,512]",
    "passkey.lengths=[256,512]",
    "blocks.recall.reach=512",
]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (INSIDE, "position.method = none leaves nothing beyond the base's window"),
        (["position.method=linear"], "under untrained linear scaling no length is read well"),
    ],
)
def test_gains_are_not_asked_for_where_they_say_nothing(overrides, said):
    with pytest.raises(
        ValueError, match=rf"params: {said}.*so the gate's rule '{GAINS}' says nothing: name it in gate.not_asked"
    ):
        check(params(*overrides), KINDS)
    check(params(*overrides, f"gate.not_asked=[{{name: {GAINS}, why: it says nothing}}]"), KINDS)


@pytest.mark.parametrize(
    ("overrides", "rule", "said"),
    [
        (
            ["perplexity.sliding=null"],
            "sliding_perplexity/extended/target, at_most: 9",
            "perplexity.sliding = null, and",
        ),
        (
            ["perplexity.bands=null"],
            "position_nats/extended/4096, at_most: 9",
            "perplexity.bands = null, and the gate's rule 'm'",
        ),
        (
            [],
            "passkey/extended/target/depth/0.0, at_least: 0.5",
            "asks for passkey/extended/target/depth/0.0, and the depths of",
        ),
        ([], "passkey/extended/2000/depth/0.00, at_least: 0.5", r"passkey.lengths = .* lacks 2000"),
        (
            ["passkey.lengths=[384,4096]"],
            "passkey/extended/512, at_least: 0.5",
            r"passkey.lengths = \[384, 4096\] lacks 512",
        ),
        (
            ["evaluate.longppl=[extended]", "evaluate.keytokens=[]"],
            None,
            "evaluate.longppl names models, and evaluate.keytokens",
        ),
    ],
)
def test_what_a_rule_asks_for_is_measured(overrides, rule, said):
    more = [f"gate.more_rules=[{{name: m, metric: {rule}}}]"] if rule else []
    with pytest.raises(ValueError, match=said):
        check(params(*overrides, *more), KINDS)


def test_held_out_questions_are_about_the_trainings_own_texts():
    elsewhere = "blocks.held_out={names: [], share: 0.0, texts: {source: text, name: tests, split: null, field: text}}"
    asked = ["evaluate.longqa=[extended]", "longqa.held_out=true", "pairs.casebook={lengths: [250], depths: [0.5]}"]
    asked[-1] = asked[-1].replace("}", ", kinds: [cloze], samples: 1, collections: 0.0, seed: 1}")
    with pytest.raises(ValueError, match=r"longqa\.held_out asks about documents held out of the training's own texts"):
        check(params(elsewhere, *asked), KINDS)


def test_a_window_that_is_not_known_here_is_not_asked_for():
    check(params("backbone.source=hub", "passkey.lengths=[1024,4096]"), KINDS)


def test_a_base_under_yarn_reaches_what_its_scaling_says(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = {"max_position_embeddings": 1024, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="position.context = 4096 must be above the 4096 that the base reaches"):
        check(params(f"backbone.name={tmp_path}"), KINDS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 1024},
        {"type": "dynamic", "factor": 2.0},
        "yarn",
    ],
)
def test_a_scaling_that_is_not_known_without_loading_the_base_is_not_asked_about(tmp_path, rope):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8192, "rope_scaling": rope}))
    check(params(f"backbone.name={tmp_path}"), KINDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON: Expecting value"),
        ("[1]", "is a list, and must be an object"),
        *(
            (f'{{"max_position_embeddings": {said}}}', "says max_position_embeddings")
            for said in ('"256"', "true", "256.0")
        ),
    ],
)
def test_a_base_whose_config_can_not_be_read_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^backbone.name: {tmp_path}/config.json {said}"):
        check(params(f"backbone.name={tmp_path}"), KINDS)


def test_what_no_stage_takes_is_not_asked_about():
    few = {name: kind for name, kind in KINDS.items() if name != "pairs"}
    check(params("blocks.recall.reach=5000"), few)


PROBE = """
import sys
from longlora.check import main
status = main([])
assert not {"torch", "transformers", "peft", "numpy"} & {n for n, m in sys.modules.items() if hasattr(m, "__file__")}
sys.exit(status)
"""


def test_the_process_loads_no_torch_and_finds_what_classes_of_the_library_say(tmp_path):
    def run(*overrides: str) -> "subprocess.CompletedProcess[str]":
        for name in ("dvc.yaml", "tiny"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(ROOT / name)
        OmegaConf.save(params(*overrides), tmp_path / "params.yaml")
        return subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True)

    fine, wrong = run(), run("position.method=yarm", "perplexity.bands=7")
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "", "")
    idle = ["fit.steps=4", "attention.full_attention_last=0.1", "adapter.method=full", "fit.loraplus_lr_ratio=16"]
    short = run(*idle)
    assert (short.returncode, short.stdout.splitlines()) == (
        0,
        [
            "note: fit.warmup_steps = 5 of fit.steps = 4: fit.learning_rate is never reached",
            "note: attention.full_attention_last = 0.1 of fit.steps = 4 is no step: all are under S2-Attn",
            "note: fit.loraplus_lr_ratio = 16 is for low-rank matrices, and adapter.method = full has none",
        ],
    )
    assert wrong.returncode == 2
    with pytest.raises(ValueError) as caught:
        check(params("position.method=yarm", "perplexity.bands=7"), KINDS)
    assert wrong.stderr == f"error: {caught.value}\n"


def run_dir(folder: Path, status: str) -> RunDir:
    stage = Stage("gate", "", {}, (), (), (), status)
    return RunDir(SimpleNamespace(), SimpleNamespace(), folder, SimpleNamespace(), [stage])


def look_at(run: RunDir) -> None:
    with parameters.checked_meanwhile(run):
        pass


def test_a_run_asks_only_if_it_computes_and_has_stages_of_the_library(own, capsys):
    look_at(run_dir(own, "stale"))
    dummy.with_a_stage_of_the_library(own)
    look_at(run_dir(own, "unchanged"))
    missing = "; ".join(rf"key 'gate\.{key}' is missing" for key in ("rules", "more_rules", "not_asked"))
    said = rf"^params: {missing}; unknown key 'gate\.least'"
    with pytest.raises(ValueError, match=said):
        look_at(run_dir(own, "stale"))
    (own / "longlora").mkdir()
    (own / "longlora" / "__init__.py").touch()
    look_at(run_dir(own, "stale"))
    assert "not checked: the library of this run is older" in capsys.readouterr().out
    (own / "longlora" / "check.py").write_text("print('note: a word')")
    look_at(run_dir(own, "stale"))
    assert capsys.readouterr().out == "note: a word\n"
    (own / "longlora" / "check.py").write_text("raise RuntimeError('a defect')")
    look_at(run_dir(own, "stale"))
    assert "not checked: RuntimeError: a defect" in capsys.readouterr().out


def test_a_sweep_is_refused_before_any_run(own):
    dummy.with_a_stage_of_the_library(own)
    done = dummy.called(own, "sweep", "train.rank=1,2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: params: key 'gate.rules' is missing")
    assert not (own / ".longlora" / "worktrees").exists()


def test_a_plan_is_of_sections_that_are_right_and_asks_no_more_of_them(own):
    """Who plans a longer context need not say how it will be measured: that is `run`'s to ask."""
    longer = ["plan", "--set", "position.context=8192"]
    assert dummy.called(ROOT, *longer).returncode == 0
    done = dummy.called(ROOT, *longer, "--set", "fit.learning_rate=-3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: params: fit.learning_rate = -3: Input should be greater than 0\n"
    dummy.with_a_stage_of_the_library(own)
    done = dummy.called(own, "plan")
    assert done.stderr.startswith("error: params: key 'gate.rules' is missing")
    assert "unknown key 'gate.least'" in done.stderr
