"""Training: the loss is right, a run resumes bit for bit, and what cannot work stops with its reason."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from specimens import ADAPTER, ATTENTION, FIT, POSITION, tokenizer
from training import cut_off, history, run, weights
from transformers import AutoConfig, TrainerControl, TrainerState, TrainingArguments

from longlora.data.packing import Pair
from longlora.data.packing import write as write_pairs
from longlora.evaluation import passkey
from longlora.evaluation.passkey import Passkey
from longlora.evaluation.windows import Window, token_nats
from longlora.model import integrity
from longlora.model.load import open_model
from longlora.model.merge import merge
from longlora.model.position import Position
from longlora.parallel.layout import accumulation
from longlora.section import raised_here
from longlora.training import checkpoint, trainer
from longlora.training import fit as module
from longlora.training.checkpoint import checkpoint_step, digest
from longlora.training.history import COLUMNS
from longlora.training.trainer import FullAttentionAtEnd, LongTrainer, Stop

ROOT = Path(__file__).parent.parent


def test_the_loss_falls_and_the_history_and_cost_are_written(place):
    run(place, "tuned", steps=20, save_steps=100)
    rows = history(place / "tuned.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["tokens"] == 20 * 4 * 128
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert json.loads((place / "tuned.json").read_text())["tuned"]["trainable_parameters"] > 300 * 36


def test_each_row_of_the_history_is_a_line_of_step_loss_speed_time_left_and_memory_that_prefect_shows(place, capsys):
    from flows.progress import LINE

    run(place, "tuned", steps=4)
    lines = [found for line in capsys.readouterr().out.splitlines() if (found := LINE.fullmatch(line))]
    rows = history(place / "tuned.csv")
    assert [line[0].split("  ")[:2] for line in lines] == [
        [f"step {row['step']:.0f}/4", f"loss {row['loss']:.4f}"] for row in rows
    ]
    paces = [float(line["pace"].replace(",", "")) for line in lines]
    assert all(10 < pace < 1e7 for pace in paces)
    assert all(0.1 < float(line["memory"]) < 100 for line in lines)
    assert lines[-1][0].split("  ")[3] == "0 s left"


def test_the_rates_are_the_sections_and_no_other(place):
    run(place, "tuned", lr_scheduler_type="constant_with_warmup", warmup_steps=0, learning_rate=3e-3)
    assert {row["learning_rate"] for row in history(place / "tuned.csv")} == {3e-3}


def test_the_saved_config_uses_a_cache_as_the_bases_does(place):
    tuned = run(place, "tuned", steps=1)
    assert json.loads((tuned / "config.json").read_text())["use_cache"] is True


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(place):
    assert weights(run(place, "one")) == weights(run(place, "two"))
    assert (place / "one.csv").read_bytes() == (place / "two.csv").read_bytes()
    assert weights(run(place, "three", seed=6)) != weights(place / "one")


def test_accumulation_changes_nothing_but_the_last_bits(place):
    run(place, "whole", micro_batch_size=4, recall_share=0.0)
    run(place, "parts", micro_batch_size=1, recall_share=0.0)
    for a, b in zip(history(place / "whole.csv"), history(place / "parts.csv"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_run_that_was_cut_off_resumes_bit_for_bit(place, monkeypatch):
    wanted = weights(run(place, "whole"))
    cut_off(place, "resumed", monkeypatch)
    assert [f.name for f in (place / "checkpoints").rglob("checkpoint-*")] == ["checkpoint-4"]
    assert weights(run(place, "resumed")) == wanted
    assert (place / "resumed.csv").read_bytes() == (place / "whole.csv").read_bytes()
    assert not list((place / "checkpoints").rglob("checkpoint-*"))


def test_a_run_that_was_killed_while_it_deleted_its_checkpoints_is_repeated(place, monkeypatch):
    wanted, rmtree = weights(run(place, "whole")), shutil.rmtree

    def killed(folder: Path, **given: object) -> None:
        if folder.name.startswith("partial-"):  # before a checkpoint is written
            return rmtree(folder, **given)
        next(file for file in sorted(folder.rglob("*")) if file.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as inside, pytest.raises(KeyboardInterrupt):
        inside.setattr(shutil, "rmtree", killed)
        run(place, "again", save_steps=FIT.steps)
    assert (place / "again").is_dir() and list((place / "checkpoints").rglob("*.safetensors"))
    assert weights(run(place, "anew", save_steps=FIT.steps)) == wanted
    assert not list((place / "checkpoints").rglob("*.safetensors"))


def test_a_run_that_was_cut_off_between_two_rows_has_the_same_history(place, monkeypatch):
    changes = {"save_steps": 4, "logging_steps": 5}
    run(place, "whole", steps=10, **changes)
    cut_off(place, "resumed", monkeypatch, steps=10, **changes)
    run(place, "resumed", steps=10, **changes)
    assert [row["step"] for row in history(place / "whole.csv")] == [5, 10]
    assert (place / "resumed.csv").read_bytes() == (place / "whole.csv").read_bytes()


def test_a_run_that_was_cut_off_goes_on_with_the_same_noise(place, monkeypatch):
    changes = {
        "neftune_noise_alpha": 5.0,
        "micro_batch_size": 1,
        "adapter": ADAPTER.model_copy(update={"dropout": 0.2}),
    }
    wanted = weights(run(place, "whole", **changes))
    cut_off(place, "resumed", monkeypatch, **changes)
    assert weights(run(place, "resumed", **changes)) == wanted
    assert (place / "resumed.csv").read_bytes() == (place / "whole.csv").read_bytes()


def test_a_sequence_over_several_processes_has_the_noise_of_the_whole(tmp_path):
    """transformers divides alpha by the root of the tokens x hidden size, of what the process sees."""
    settings = FIT.model_copy(update={"neftune_noise_alpha": 6.0})
    for degree, alpha in ((1, 6.0), (4, 3.0)):
        args = module.arguments(settings, checkpoints=tmp_path, accumulation=1, zero=None, degree=degree)
        assert args.neftune_noise_alpha == alpha
    assert module.arguments(FIT, checkpoints=tmp_path, accumulation=1, zero=None, degree=4).neftune_noise_alpha is None


def test_a_variable_that_is_empty_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("LONGLORA_CHECKPOINTS", "")
    assert checkpoint.checkpoint_folder("0123") == Path(".longlora/checkpoints/0123")


def test_a_second_training_of_the_same_waits_and_only_then_looks_for_checkpoints(place, monkeypatch, capsys):
    sections = (POSITION, ATTENTION, ADAPTER, FIT)
    name = digest([place / "tokens", place / "base"], sections=sections)
    path = place / "checkpoints" / f"{name}.lock"
    path.parent.mkdir()
    events: list[str] = []
    other = path.open("w")
    fcntl.flock(other, fcntl.LOCK_EX)

    def release() -> None:
        events.append("released")
        other.close()

    def look(checkpoints: Path) -> Path | None:
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        events.append("looked")
        return checkpoint.latest(checkpoints)

    monkeypatch.setattr(checkpoint, "LOOK", 0.05)
    monkeypatch.setattr(module, "latest", look)
    timer = threading.Timer(3, release)
    timer.start()
    run(place, "second")
    timer.join()
    assert events == ["released", "looked"]
    assert capsys.readouterr().out.count(f"waiting: another run trains the same (it holds {path})") == 1
    assert [file.name for file in (place / "checkpoints").iterdir()] == [path.name]
    run(place, "third")  # it was left free


def test_a_folder_for_checkpoints_without_locks_is_refused_in_a_line_that_names_it(tmp_path, monkeypatch):
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    with (
        pytest.raises(
            ValueError, match=rf"^{tmp_path}/name\.lock: Function not implemented: .* LONGLORA_CHECKPOINTS names$"
        ),
        checkpoint.checkpoint_lock(tmp_path / "name", first=True, device=torch.device("cpu")),
    ):
        pass


def test_a_signal_that_comes_while_the_processes_ask_one_another_ends_them_after_the_next_step(tmp_path, monkeypatch):
    stop, arguments = Stop(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def interrupted(asked: bool, device: torch.device) -> bool:
        stop.ask(signal.SIGTERM, None)
        return asked

    monkeypatch.setattr(trainer, "any_of", interrupted)
    told = []
    for _ in range(2):
        control = TrainerControl()
        stop.on_step_end(arguments, TrainerState(), control)
        told.append((control.should_training_stop, control.should_save, stop.agreed))
    assert told == [(False, False, False), (True, True, True)]


def test_a_foreign_checkpoint_is_never_resumed():
    sections = (POSITION, ATTENTION, ADAPTER, FIT)
    other = (POSITION, ATTENTION, ADAPTER, FIT.model_copy(update={"learning_rate": 4e-3}))
    assert digest([], sections=sections) != digest([], sections=other)


def test_a_changed_input_is_another_run(place):
    before = digest([place / "tokens"], sections=())
    file = place / "tokens/recall.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert digest([place / "tokens"], sections=()) != before


def test_other_code_is_another_run(tmp_path, monkeypatch):
    before = digest([], sections=())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "version", lambda package: "0.1")
        assert digest([], sections=()) != before
    shutil.copytree(ROOT / "longlora", tmp_path / "longlora")
    monkeypatch.setattr(checkpoint, "LIBRARY", tmp_path / "longlora")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "longlora/training/checkpoint.py"))
    assert digest([], sections=()) == before
    for name, other in (("report/page.py", False), ("training/loss.py", True)):
        with (tmp_path / "longlora" / name).open("a") as file:
            file.write("# changed\n")
        assert (digest([], sections=()) != before) == other


def test_a_loss_that_is_not_finite_ends_the_run(place, monkeypatch):
    with pytest.raises(ValueError, match=r"is (nan|inf) at step \d.* lower fit.learning_rate"):
        run(place, "tuned", learning_rate=1e12, steps=6)
    loss = LongTrainer.compute_loss
    monkeypatch.setattr(LongTrainer, "compute_loss", lambda *given, **named: loss(*given, **named) * torch.inf)
    with pytest.raises(ValueError, match="the loss is inf at step 1: lower fit.learning_rate, or look at the data"):
        run(place, "tuned")
    assert not (place / "tuned").exists()


def test_a_gradient_that_is_not_finite_is_in_no_checkpoint_and_the_run_goes_on_from_the_one_before(place, monkeypatch):
    wanted, step = weights(run(place, "whole", save_steps=2)), LongTrainer.training_step

    def struck(self, model, *given):
        loss = step(self, model, *given)
        if self.state.global_step == 3:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = torch.nan
        return loss

    with monkeypatch.context() as inside:
        inside.setattr(LongTrainer, "training_step", struck)
        with pytest.raises(ValueError, match="the norm of the gradients is nan at step 4, whose loss is finite"):
            run(place, "struck", save_steps=2)
    assert [f.name for f in (place / "checkpoints").rglob("checkpoint-*")] == ["checkpoint-2"]
    assert weights(run(place, "struck", save_steps=2)) == wanted


@pytest.mark.parametrize(
    ("batch", "micro", "replicas", "wanted"),
    [(8, 2, 2, 2), (6, 1, 3, 2), (7, 2, 1, "micro_batch_size = 2; the nearest is 8"), (4, 1, 3, "= 1 x 3; the nearest is 3"),
     (7, 1, 4, "= 1 x 4; the nearest is 8")],
)  # fmt: skip
def test_accumulation_is_derived_from_the_global_batch(batch, micro, replicas, wanted):
    if isinstance(wanted, int):
        assert accumulation(batch, micro_batch_size=micro, replicas=replicas) == wanted
    else:
        with pytest.raises(ValueError, match=rf"global_batch_size = {batch} must be a multiple of .*{wanted}"):
            accumulation(batch, micro_batch_size=micro, replicas=replicas)


def test_without_a_launcher_one_process_trains_on_one_of_the_gpus_it_sees(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        args = module.arguments(FIT, checkpoints=tmp_path, accumulation=2, zero=None)
        assert args.device == torch.device("cuda:0")
        assert args.n_gpu == 1  # else the Trainer would wrap the model in nn.DataParallel
        assert args.train_batch_size == FIT.micro_batch_size
    assert module.arguments(FIT, checkpoints=tmp_path, accumulation=2, zero=None).n_gpu == 0  # no GPU: as before


def test_the_last_steps_are_in_full_attention_when_asked(place):
    run(place, "sparse", steps=4, recall_share=0.0)
    run(place, "ended", steps=4, recall_share=0.0, attention=ATTENTION.model_copy(update={"full_attention_last": 0.5}))
    sparse, ended = history(place / "sparse.csv"), history(place / "ended.csv")
    assert sparse[:2] == ended[:2]
    assert sparse[2]["loss"] != ended[2]["loss"]


def test_a_second_training_begins_in_the_attention_of_the_first():
    said: list[str] = []
    args, control = TrainingArguments("x"), TrainerControl()
    asked = ATTENTION.model_copy(update={"full_attention_last": 0.5})
    at_end = FullAttentionAtEnd(lambda attention: said.append(attention.pattern), attention=asked, steps=2)
    for _ in range(2):
        at_end.on_train_begin(args, TrainerState(), control)
        for step in range(2):
            at_end.on_step_begin(args, TrainerState(global_step=step), control)
    assert said == ["full", "s2", "full"]  # the first is enabled before the training


def test_hayous_ratio_moves_only_the_b_matrices_more(place):
    plain = load_file(run(place, "plain", steps=1, warmup_steps=0) / "adapter_model.safetensors")
    faster = load_file(
        run(place, "faster", steps=1, warmup_steps=0, loraplus_lr_ratio=4.0) / "adapter_model.safetensors"
    )
    for name in plain:
        if "lora_B" in name:
            torch.testing.assert_close(faster[name], 4 * plain[name])
        else:
            torch.testing.assert_close(faster[name], plain[name])


def test_bfloat16_and_gradient_checkpointing_train_too(place):
    run(place, "plain")
    run(place, "spared", gradient_checkpointing=True)
    assert history(place / "plain.csv") == history(place / "spared.csv")
    run(place, "half", dtype="bfloat16")
    assert history(place / "half.csv")[0]["loss"] == pytest.approx(history(place / "plain.csv")[0]["loss"], rel=2e-2)


def test_full_fine_tuning_is_one_setting_away(place):
    tuned = run(place, "tuned", adapter=ADAPTER.model_copy(update={"method": "full"}))
    assert (tuned / "model.safetensors").exists()


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from training import run
run(Path({place!r}), "tuned", steps=400)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_whole_checkpoint(place, signal_number):
    script = SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT), place=str(place))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list((place / "checkpoints").rglob("checkpoint-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    code = process.wait(timeout=60)
    assert code == (-9 if signal_number == signal.SIGKILL else 143)
    checkpoints = list((place / "checkpoints").rglob("checkpoint-*"))
    assert checkpoints
    newest = max(checkpoints, key=checkpoint_step)
    assert {f.name for f in newest.iterdir()} >= {
        "parameters.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    }


def test_pairs_are_learnt_by_the_same_training_with_noise_if_asked_for(place, capsys):
    pairs = place / "pairs"
    pairs.mkdir()
    asked = [np.concatenate([np.full(20 + i, 7), [40, 41, 1]]) for i in range(30)]
    write_pairs([Pair(t, np.arange(len(t)) >= len(t) - 3) for t in asked], pairs / "train.safetensors", vocabulary=300)
    both = {"pairs": pairs, **ONLY_PAIRS}
    run(place, "taught", steps=8, **both)
    losses = [row["loss"] for row in history(place / "taught.csv")]
    assert losses[-1] < losses[0] - 0.3
    run(place, "untaught", steps=1, pairs=pairs)
    assert "the pairs are not trained on: fit.pairs_share is 0" in capsys.readouterr().out
    run(place, "noisy", steps=1, neftune_noise_alpha=5.0, **both)
    assert history(place / "noisy.csv")[0]["loss"] != losses[0]


ONLY_PAIRS = {"recall_share": 0.0, "pairs_share": 1.0, "global_batch_size": 2, "save_steps": 100}


def some_pairs(place: Path) -> list[Pair]:
    """Two that fill one block together, their answers of different lengths, written to place/pairs."""
    draw = np.random.default_rng(2)
    found = [Pair(draw.integers(0, 300, n), np.arange(n) >= n - answer) for n, answer in ((40, 3), (70, 9))]
    (place / "pairs").mkdir()
    write_pairs(found, place / "pairs/train.safetensors", vocabulary=300)
    return found


def test_of_pairs_the_answers_alone_are_learnt(place):
    nats, inside = 0.0, 0
    model = module.build(place / "base", position=POSITION, adapter=ADAPTER, dtype="float32").eval()
    for pair in some_pairs(place):
        logits_LV = model(torch.from_numpy(pair.tokens)[None]).logits[0].log_softmax(-1)
        for at in np.flatnonzero(pair.answer):
            nats -= logits_LV[at - 1, pair.tokens[at]].item()
            inside += 1
    full = ATTENTION.model_copy(update={"pattern": "full"})
    run(place, "taught", steps=1, pairs=place / "pairs", attention=full, **ONLY_PAIRS)
    assert inside == 12
    assert history(place / "taught.csv")[0]["loss"] == pytest.approx(nats / inside, rel=1e-5)


def test_under_dynamic_scaling_a_block_is_trained_on_as_by_a_model_that_read_no_other_before(place):
    """Else a training that resumes would go on with other frequencies than one that was never cut off."""
    dynamic = POSITION.model_copy(update={"method": "dynamic"})
    model = module.build(place / "base", position=dynamic, adapter=ADAPTER, dtype="float32").eval()
    tokens_BL, pairs_BL = torch.arange(128)[None], torch.cat([torch.arange(90), torch.arange(38)])[None]
    before_BLV = model(input_ids=tokens_BL, position_ids=pairs_BL).logits
    assert not model(input_ids=tokens_BL).logits.equal(before_BLV)
    assert model(input_ids=tokens_BL, position_ids=pairs_BL).logits.equal(before_BLV)


def test_pairs_are_learnt_on_a_model_that_was_extended_before(place):
    merge(place / "base", run(place, "longer", steps=1), out=place / "extended")
    (place / "base").rename(place / "short")
    (place / "extended").rename(place / "base")
    some_pairs(place)
    kept = {"position": Position(method="none", context=POSITION.context), "warmup_steps": 0}
    run(place, "taught", steps=1, pairs=place / "pairs", **kept, **ONLY_PAIRS)
    merge(place / "base", place / "taught", out=place / "out")
    before, after = (AutoConfig.from_pretrained(place / name) for name in ("base", "out"))
    assert after.rope_parameters == before.rope_parameters and after.rope_parameters["rope_type"] == "yarn"
    assert (after.max_position_embeddings, after.rope_parameters["original_max_position_embeddings"]) == (128, 64)
    weights_of = (load_file(place / name / "model.safetensors") for name in ("base", "out"))
    assert not torch.equal(*(w["model.embed_tokens.weight"] for w in weights_of))


# The way of a user with models of many families; tests/test_shifted.py holds their attention to a dense mask.

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1}
ONE_KEY = SIZES | {"num_key_value_heads": 1}
OWN_KEYS = SIZES | {"num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7, "q_lora_rank": 10}
SHARED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
INDEXER = {"index_n_heads": 2, "index_head_dim": 8}
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
FOUR = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES = {
    "llama": (lambda: transformers.LlamaConfig(**SIZES, attention_bias=True), FOUR),
    "llama, one key": (lambda: transformers.LlamaConfig(**ONE_KEY), FOUR),
    "mistral": (lambda: transformers.MistralConfig(**SIZES, sliding_window=32), FOUR),
    "qwen2": (lambda: transformers.Qwen2Config(**SIZES), FOUR),
    "qwen3": (lambda: transformers.Qwen3Config(**SIZES, head_dim=12), FOUR),
    "gemma": (lambda: transformers.GemmaConfig(**SIZES, head_dim=12), FOUR),
    "phi3": (lambda: transformers.Phi3Config(**SIZES, original_max_position_embeddings=64), ["qkv_proj", "o_proj"]),
    "phi": (lambda: transformers.PhiConfig(**SIZES), ["q_proj", "v_proj", "dense"]),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(**SIZES), ["query_key_value", "dense"]),
    "olmo2": (lambda: transformers.Olmo2Config(**SIZES), FOUR),
    "granite": (lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0, residual_multiplier=0.2), FOUR),
    "stablelm": (lambda: transformers.StableLmConfig(**SIZES, qk_layernorm=True), FOUR),
    "cohere2": (lambda: transformers.Cohere2Config(**SIZES, **SLIDING), FOUR),
    "smollm3": (lambda: transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]), FOUR),
    "glm4": (lambda: transformers.Glm4Config(**SIZES, head_dim=8), FOUR),
    "starcoder2": (lambda: transformers.Starcoder2Config(**SIZES), FOUR),
    "nemotron": (lambda: transformers.NemotronConfig(**SIZES), FOUR),
    "mixtral": (lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True), FOUR),
    "qwen3_moe": (lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, num_experts=4), FOUR),
    "deepseek_v3": (
        lambda: transformers.DeepseekV3Config(**OWN_KEYS, **EXPERTS, **LATENT, **SHARED),
        ["q_b_proj", "o_proj"],
    ),
    "llama4": (
        lambda: transformers.Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
        FOUR,
    ),
    "qwen3_5": (lambda: transformers.Qwen3_5TextConfig(**SIZES, **DELTA, head_dim=16), ["q_proj", "in_proj_qkv"]),
    "lfm2": (lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), ["q_proj", "out_proj"]),
}
REFUSED = {
    "mistral": (
        lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
        "looks back 8 tokens, less than a group of 32",
    ),
    "granite": (lambda: transformers.GraniteConfig(**SIZES, attention_dropout=0.1), "a dropout of 0.1, .* set it to 0"),
    "gemma2": (
        lambda: transformers.Gemma2Config(**SIZES, head_dim=12),
        "no fused attention .*soft caps .*take a base without",
    ),
    "gpt_oss": (
        lambda: transformers.GptOssConfig(**SIZES, head_dim=12, rope_parameters=PLAIN),
        "no fused attention .*sinks",
    ),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=12), "rotary settings per layer type"),
    "gemma4": (
        lambda: transformers.Gemma4TextConfig(
            **SIZES, **SLIDING, head_dim=12, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8
        ),
        "rotary settings per layer type",
    ),
    "deepseek_v32": (
        lambda: transformers.DeepseekV32Config(**OWN_KEYS, **EXPERTS, **LATENT, **SHARED, **INDEXER, index_topk=8),
        "DeepseekV32ForCausalLM has an indexer .*: take a base without",
    ),
    "minimax_m3": (
        lambda: transformers.MiniMaxM3VLTextConfig(
            **SIZES,
            **EXPERTS,
            **INDEXER,
            num_local_experts=4,
            head_dim=8,
            layer_types=["full_attention", "minimax_m3_sparse"],
        ),
        "MiniMaxM3.* has an indexer .*: take a base without",
    ),
    "falcon": (lambda: transformers.FalconConfig(**SIZES), "Falcon.* does not use transformers' attention interface"),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4), "no rotary positions"),
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def base_of(place: Path, config: transformers.PreTrainedConfig) -> None:
    """A random model of the family in place of the base's weights."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    (place / "base/model.safetensors").unlink()
    model.save_pretrained(place / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_merged_and_measured(family, place):
    config, targets = FAMILIES[family]
    base_of(place, config())
    adapter = ADAPTER.model_copy(update={"target_modules": targets})
    run(place, "tuned", steps=2, save_steps=100, adapter=adapter, dtype="bfloat16", gradient_checkpointing=True)
    assert merge(place / "base", place / "tuned", out=place / "merged").folded < 2e-5
    facts = integrity.measure(place / "base", extended=place / "merged", position=POSITION)["integrity"]
    assert {fact["reason"] for fact in facts.values() if not fact["value"]} == set()
    model = open_model(place / "merged")
    tokens_BL = torch.randint(300, (1, 100), generator=torch.Generator().manual_seed(0))
    config = AutoConfig.from_pretrained(place / "tuned")
    own = transformers.AutoModelForCausalLM.from_pretrained(place / "base", config=config, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(own, place / "tuned").eval()
    with torch.inference_mode():
        logits = adapted(input_ids=tokens_BL).logits
        torch.testing.assert_close(model(input_ids=tokens_BL).logits, logits, rtol=1e-4, atol=2e-5 * logits.abs().max())
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens_BL[0, 1:], reduction="none")
    windows = [Window(0, 0, 100, 99)]
    found = token_nats(model, documents=[tokens_BL[0].numpy()], windows=windows)  # over a cache, if there is one
    assert found[0] == pytest.approx(loss.numpy(), rel=1e-3)
    keys = Passkey(lengths=[210], depths=[0.5], samples=2, prompt="plain", seed=0, digits=3)
    passkey.measure(model, label="it", tokenizer=tokenizer(), settings=keys)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_served_is_refused_before_it_is_trained(family, place):
    config, words = REFUSED[family]
    base_of(place, config())
    linears = {"falcon": "query_key_value", "gpt2": "c_attn", "deepseek_v32": "q_b_proj"}
    adapter = ADAPTER.model_copy(update={"target_modules": [linears.get(family, "q_proj")]})
    with pytest.raises(ValueError, match=words) as refused:
        run(place, "tuned", adapter=adapter)
    assert raised_here(refused.value) and "\n" not in str(refused.value)


def test_pairs_are_not_packed_for_a_model_that_lets_documents_see_each_other(place):
    config, targets = FAMILIES["lfm2"]
    base_of(place, config())
    some_pairs(place)
    adapter = ADAPTER.model_copy(update={"target_modules": targets})
    with pytest.raises(ValueError, match="Lfm2ForCausalLM lets a document see another one .* set fit.pairs_share to 0"):
        run(place, "tuned", steps=1, pairs=place / "pairs", adapter=adapter, **ONLY_PAIRS)
