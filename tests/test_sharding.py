"""Measures in several real processes are those of one, byte for byte, and each process computes only its share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_longeval
import test_longqa
import test_needle
import test_passkey
import test_perplexity
import test_ruler
import together
import torch
import yaml
from specimens import FLOAT32
from transformers import LlamaForCausalLM

from longlora.data import tokens
from longlora.evaluation import answer, passkey, windows
from longlora.evaluation.longppl import LongPPL
from longlora.evaluation.perplexity import Sliding
from longlora.parallel import sharding
from longlora.stages import keytokens, longeval, longppl, longqa, needle, perplexity, ruler
from longlora.stages import passkey as passkey_stage

ROOT = Path(__file__).parent.parent
MEASURES = ("perplexity", "longppl", "passkey", "unshared", "needle", "ruler", "longeval", "longqa")
LONGPPL = LongPPL(
    length=45, short=12, stride=5, samples=3, alpha=0.4, beta=-4.5, seed=2
)  # fmt: skip


def prepare(place: Path) -> None:
    """A model and what it is asked, for each measure."""
    test_perplexity.tiny().save_pretrained(place / "reader")
    numbers = test_perplexity.texts(90, 20, 150)
    tokens.write(numbers, place / "numbers.safetensors", vocabulary=test_perplexity.VOCABULARY)
    for name, changes in (("finder", {}), ("odd", {"rope_parameters": DYNAMIC})):
        test_passkey.tiny(**changes).save_pretrained(place / name)
        test_passkey.byte_level().save_pretrained(place / name)
    test_ruler.tiny().save_pretrained(place / "writer")
    test_ruler.TOKENIZER.save_pretrained(place / "writer")
    words = [test_ruler.TOKENIZER(t)["input_ids"] for t in test_ruler.TEXTS]
    tokens.write(words, place / "words.safetensors", vocabulary=len(test_ruler.TOKENIZER))
    test_longqa.put(place / "q.jsonl", *test_longqa.CASES)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def measure(name: str, place: Path, out: Path) -> None:
    """One measure, in batches so small that there are several."""
    for module in (windows, passkey, answer):
        module.batch_tokens = lambda model: 700  # type: ignore[attr-defined]
    numbers, words = place / "numbers.safetensors", place / "words.safetensors"
    if name == "perplexity":
        given = test_perplexity.settings(bands=1, sliding=Sliding(stride=5, tokens=90))
        windows.BATCH_LOGITS = 2 * 6 * test_perplexity.VOCABULARY  # type: ignore[misc]
        perplexity.stage(place / "reader", numbers, out / "scores.json", out / "parts.csv", given, FLOAT32)
    elif name == "longppl":
        keytokens.stage(place / "reader", numbers, out / "keys.json", LONGPPL, FLOAT32)
        longppl.stage(place / "reader", out / "keys.json", numbers, out / "scores.json", LONGPPL, FLOAT32)
    elif name in ("passkey", "unshared"):
        model = place / ("finder" if name == "passkey" else "odd")
        passkey_stage.stage(model, out / "scores.json", test_passkey.settings(samples=5), FLOAT32)
    elif name == "needle":
        needle.stage(place / "writer", words, out / "scores.json", test_needle.settings(samples=4), FLOAT32)
    elif name == "longeval":
        given = test_longeval.settings(lengths=[1500], samples=3)
        longeval.stage(place / "writer", out / "scores.json", given, FLOAT32)
    elif name == "ruler":
        given = test_ruler.settings(lengths=[600], tasks=["single", "tracking"], samples=3)
        ruler.stage(place / "writer", words, out / "scores.json", given, FLOAT32)
    else:
        longqa.stage(
            place / "writer", place / "none", out / "scores.json", test_longqa.settings(place / "q.jsonl"), FLOAT32
        )


def share(name: str, place: Path, out: Path) -> None:
    """One process's part; it says how many forward passes it took."""
    torch.set_num_threads(1)
    passes, forward = [0], LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        passes[0] += 1
        return forward(self, *args, **kwargs)

    LlamaForCausalLM.forward = counted
    try:
        measure(name, place, out)
    finally:
        LlamaForCausalLM.forward = forward
    (place / f"{name}-{out.name}-{os.environ.get('RANK', 'alone')}").write_text(str(passes[0]))


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shares")
    prepare(place)
    return place


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def alone(name: str, ready: Path, monkeypatch) -> Path:
    out = ready / "one" / name
    if not out.exists():
        for module in (windows, passkey, answer):
            monkeypatch.setattr(module, "batch_tokens", module.batch_tokens)
        monkeypatch.setattr(windows, "BATCH_LOGITS", windows.BATCH_LOGITS)
        share(name, ready, out)
    return out


def all_measures(place: Path, count: str) -> None:
    """One after the other in the same processes, as each test would start them anew."""
    for name in MEASURES:
        share(name, place, place / count / name)


@pytest.mark.slow
def test_three_processes_write_what_one_writes(ready, monkeypatch):
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(ready / "kept"))
    together.run(3, all_measures, ready, "three", LONGLORA_CHECKPOINTS=str(ready / "kept"))
    for name in MEASURES:
        assert files(ready / "three" / name) == files(alone(name, ready, monkeypatch)), name
        whole = int((ready / f"{name}-{name}-alone").read_text())
        shares = [int((ready / f"{name}-{name}-{rank}").read_text()) for rank in range(3)]
        assert 0 < max(shares) < whole, name
    assert not list((ready / "kept").iterdir())


NUMBERS = np.array([-0.0, np.nan, np.inf, 1 / 3, -0.0, 7.0])


def exchanged(place: Path) -> None:
    """Numbers that every process filled in its share of, and parts by number, as it then has them."""
    mine = [number for number in range(len(NUMBERS)) if sharding.ours(number)]
    end = f"{sharding.world()}-{sharding.rank()}"
    for kind in (np.float64, np.float32):
        part = np.zeros(len(NUMBERS), dtype=kind)
        part[mine] = NUMBERS[mine]
        (place / f"{kind.__name__}-{end}").write_bytes(sharding.whole(part).tobytes())
    found = sharding.merged({number: [number, "ä" * number] for number in mine})
    (place / f"merged-{end}").write_text(json.dumps(sorted(found.items())))


@pytest.mark.slow
def test_all_processes_have_the_bytes_of_one(tmp_path):
    """No number says how many there were: neither the sign of a zero, nor what is not finite."""
    exchanged(tmp_path)
    together.run(3, exchanged, tmp_path)
    for kind in ("float64", "float32", "merged"):
        alone, *shares = [(tmp_path / f"{kind}-{end}").read_bytes() for end in ("1-0", "3-0", "3-1", "3-2")]
        assert shares == [alone] * 3, kind


def cut_off(place: Path, out: Path) -> None:
    """LongQA, ended by an error of the second process after its first answers."""
    keep = answer.keep

    def kept_once(file: Path, given: dict[int, list[int]]) -> None:
        keep(file, given)
        if os.environ["RANK"] == "1":
            raise OSError("the second process ends")

    answer.keep = kept_once
    measure("longqa", place, out)


@pytest.mark.slow
def test_what_several_processes_had_answered_one_goes_on_from(ready, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", str(kept))
    codes = together.ended(together.start(2, cut_off, ready, tmp_path / "out", LONGLORA_CHECKPOINTS=str(kept)))
    assert codes[1] == 1 and not (tmp_path / "out").exists()
    before = sum(len(file.read_text().splitlines()) for file in kept.rglob("*.1.jsonl"))
    assert before == 1
    asked: list[int] = []
    greedy: Callable = answer.greedy
    monkeypatch.setattr(answer, "greedy", lambda *a, **k: asked.append(len(a[1])) or greedy(*a, **k))
    for module in (windows, passkey, answer):
        monkeypatch.setattr(module, "batch_tokens", module.batch_tokens)
    measure("longqa", ready, tmp_path / "out")
    first = sum(len(file.read_text().splitlines()) for file in kept.rglob("*.0.jsonl"))
    assert sum(asked) <= len(test_longqa.CASES) - before and first == 0
    assert files(tmp_path / "out") == files(alone("longqa", ready, monkeypatch))


@pytest.mark.slow
def test_the_stage_runs_under_torchrun(ready, tmp_path):
    """As dvc.yaml starts it, with the launcher in place of python."""
    params = {"passkey": test_passkey.settings(samples=5).model_dump(), "precision": FLOAT32.model_dump()}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    written = []
    for command in ([], [*launcher, f"--master-port={together.free_port()}"]):
        file = tmp_path / f"{len(command)}.json"
        done = subprocess.run(
            [sys.executable, *command, "-m", "longlora.stages.passkey", str(ready / "finder"), str(file)],
            cwd=tmp_path,
            env={**env, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=together.PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("310 tokens: ") == 1
        written.append(json.loads(file.read_text()))
    assert written[0] == written[1]
