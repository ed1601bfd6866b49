"""What a GGUF file says is what the model computes: held to a forward pass from ggml's definitions, to transformers' own reading
of GGUF, and to llama.cpp where it is installed. What llama.cpp would read otherwise is refused, and nothing is left."""

import json
import shutil
from pathlib import Path

import ggml
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from specimens import folder, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flows.cli.main import main
from longlora.model.gguf import changes_at, write
from longlora.model.position import extend

TINY = Path(__file__).parent.parent / "tiny" / "model"
WINDOW, CONTEXT, LENGTH = 32, 96, 90  # s = 3, and texts beyond the window
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": WINDOW}
ROPES = {
    "as it is": {},
    "another base": {"rope_theta": 350.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn, its temperature told": YARN | {"attention_factor": 1.31},
    "yarn, temperatures as DeepSeek says them": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn on another ramp": YARN | {"beta_fast": 5.0, "beta_slow": 0.5},
    "yarn on an exact ramp": YARN | {"truncate": False},
    "llama3": LLAMA3 | {"original_max_position_embeddings": WINDOW},
    "linear, and then yarn": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 1.5, 2.0, 3.0],
        "factor": 3.0,
        "attention_factor": 1.1,
        "original_max_position_embeddings": WINDOW,
    },
}

TWO = ROPES["linear, and then yarn"] | {"short_factor": [1.0, 1.1, 1.0, 1.2]}


def made(place: Path, *, context: int = CONTEXT, tied: bool = True, bias: bool = False, **rope: object) -> Path:
    """A random Llama whose heads are not its width, whose biases and norms matter, and where positions are felt."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=310,  # ten rows more than tokens
        hidden_size=54,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        rope_parameters={"rope_theta": 100.0, "rope_type": "default"} | rope,
    )
    model = LlamaForCausalLM(config)
    for name, each in model.named_parameters():
        if each.dim() == 1:
            torch.nn.init.normal_(each, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    model.save_pretrained(place)
    tokenizer(window=context).save_pretrained(place)
    return place


def tokens(length: int = LENGTH) -> list[int]:
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(7)).tolist()


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids])).logits[0].double().numpy()


def opened(place: Path, **settings: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **settings).eval()


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return np.abs(one - other).max() / np.abs(other).max()


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_ggmls_definitions_give_the_models_logits(tmp_path, rope):
    model = made(tmp_path / "model", **rope)
    write(model, out=tmp_path / "a.gguf")
    assert apart(ggml.logits(tmp_path / "a.gguf", tokens()), logits(opened(model), tokens())) < 2e-5


@pytest.mark.parametrize(("context", "length"), [(WINDOW, WINDOW), (WINDOW + 1, LENGTH)])
def test_of_two_lists_the_context_that_a_file_is_opened_with_takes_one(tmp_path, context, length):
    model = made(tmp_path / "model", **TWO)
    write(model, out=tmp_path / "a.gguf")
    own = logits(opened(model), tokens(length))
    assert apart(ggml.logits(tmp_path / "a.gguf", tokens(length), context=context), own) < 2e-5
    other = WINDOW if context > WINDOW else CONTEXT
    assert apart(ggml.logits(tmp_path / "a.gguf", tokens(length), context=other), own) > 1e-2
    assert changes_at(model) == WINDOW


def test_lists_of_whole_numbers_and_a_window_beside_the_settings_are_read_as_transformers_reads_them(tmp_path):
    lists = {"short_factor": [1, 1, 1, 2], "long_factor": [1, 2, 3, 4]}
    model = made(tmp_path / "model", **TWO | lists)
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"original_max_position_embeddings": 48}))
    assert changes_at(model) == 48
    write(model, out=tmp_path / "a.gguf")
    for length, context in ((48, 48), (49, 49)):
        own = logits(opened(model), tokens(length))
        assert apart(ggml.logits(tmp_path / "a.gguf", tokens(length), context=context), own) < 2e-5


@pytest.mark.parametrize("tied", [True, False])
def test_untied_heads_and_biases_too(tmp_path, tied):
    model = made(tmp_path / "model", tied=tied, bias=True)
    write(model, out=tmp_path / "a.gguf")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert ("output.weight" in names) == (not tied) and "blk.1.attn_q.bias" in names
    assert apart(ggml.logits(tmp_path / "a.gguf", tokens()), logits(opened(model), tokens())) < 2e-5


@pytest.mark.parametrize("method", ["linear", "yarn", "ntk", "llama3"])
def test_the_demos_base_extended_by_each_method(tmp_path, method):
    shutil.copytree(TINY, tmp_path / "model")
    extend(LlamaConfig.from_pretrained(TINY), method=method, context=2048).save_pretrained(tmp_path / "model")
    write(tmp_path / "model", out=tmp_path / "a.gguf")
    told, _ = ggml.read(tmp_path / "a.gguf")
    assert told["llama.context_length"] == 2048
    ids = torch.randint(3, 259, (700,), generator=torch.Generator().manual_seed(7)).tolist()
    assert apart(ggml.logits(tmp_path / "a.gguf", ids), logits(opened(tmp_path / "model"), ids)) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_file_as_the_same_model(tmp_path, tied):
    model = made(tmp_path / "model", tied=tied, rope_theta=350.0)  # its reader knows the base, and no scaling
    write(model, out=tmp_path / "a.gguf")
    read = opened(tmp_path, gguf_file="a.gguf")
    assert read.config.tie_word_embeddings == tied and read.config.max_position_embeddings == CONTEXT
    assert apart(logits(read, tokens()), logits(opened(model), tokens())) < 1e-7


def test_what_is_said_of_yarn_is_what_a_reader_shows(tmp_path):
    write(made(tmp_path / "model", **YARN), out=tmp_path / "mine.gguf")
    told, _ = ggml.read(tmp_path / "mine.gguf")
    scaling = {name.rpartition(".")[2]: value for name, value in told.items() if ".rope.scaling." in name}
    assert scaling == {"type": "yarn", "factor": 3.0, "original_context_length": WINDOW, "finetuned": True}
    assert (told["general.name"], told["llama.context_length"], told["llama.vocab_size"]) == ("mine", CONTEXT, 310)


@pytest.mark.parametrize(
    ("dtype", "kind", "error"),
    [("f32", torch.float32, 0), ("f16", torch.float16, 2e-3), ("bf16", torch.bfloat16, 2e-2)],
)
def test_matrices_are_of_the_type_asked_for_rounded_as_torch_does_and_vectors_whole(tmp_path, dtype, kind, error):
    model = made(tmp_path / "model")
    write(model, out=tmp_path / "a.gguf", dtype=dtype)
    whole = opened(model).state_dict()
    types = {}
    for tensor in GGUFReader(tmp_path / "a.gguf").tensors:
        types.setdefault(len(tensor.shape), set()).add(tensor.tensor_type.name.lower())
    assert types == {1: {"f32"}, 2: {dtype}}
    _, tensors = ggml.read(tmp_path / "a.gguf")
    told = torch.from_numpy(tensors["blk.1.ffn_down.weight"]).float()
    assert torch.equal(told, whole["model.layers.1.mlp.down_proj.weight"].to(kind).float())
    assert torch.equal(torch.from_numpy(tensors["output_norm.weight"]).float(), whole["model.norm.weight"])
    opened(model).to(kind).save_pretrained(tmp_path / "rounded")
    tokenizer().save_pretrained(tmp_path / "rounded")
    write(tmp_path / "rounded", out=tmp_path / "b.gguf")  # by default as stored
    assert {t.tensor_type.name.lower() for t in GGUFReader(tmp_path / "b.gguf").tensors if len(t.shape) == 2} == {dtype}
    assert apart(ggml.logits(tmp_path / "b.gguf", tokens()), logits(opened(model), tokens())) <= max(error, 2e-6) * 10


def test_the_same_model_gives_the_same_bytes_also_in_several_files(tmp_path):
    model = made(tmp_path / "model", tied=False)
    write(model, out=tmp_path / "a.gguf")
    opened(model).save_pretrained(tmp_path / "many", max_shard_size="30KB")
    tokenizer(window=CONTEXT).save_pretrained(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    (tmp_path / "there").mkdir()
    write(tmp_path / "many", out=tmp_path / "there" / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "there" / "a.gguf").read_bytes()


def config(**changes: object):
    def change(place: Path) -> None:
        file = place / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def rope(**changes: object):
    return config(rope_parameters={"rope_theta": 100.0} | changes)


def huge(place: Path) -> None:
    model = opened(place)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 1e6
    model.save_pretrained(place)


def other(place: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=310, num_key_value_heads=1, head_dim=12, **sizes)).save_pretrained(place)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (other, r"holds a qwen3 model \(Qwen3ForCausalLM\): only LlamaForCausalLM is written"),
        (config(hidden_act="gelu"), "hidden_act 'gelu': llama.cpp's Llama has silu"),
        (config(num_hidden_layers=3), r"9 tensors are not what config.json asks for, first model.layers.2"),
        (config(intermediate_size=50), r"6 tensors .* first .*down_proj.weight: \[54, 52\], must be \[54, 50\]"),
        (rope(rope_type="dynamic", factor=3.0), "'dynamic' scaling changes with the length"),
        (rope(rope_type="default", partial_rotary_factor=0.5), "turns a part of each head only"),
        (huge, "model.layers.1.mlp.down_proj.weight holds what f16 cannot"),
        (lambda place: (place / "config.json").unlink(), r"no model at .*model \(no config.json there\)"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused_in_one_line_and_nothing_is_left(tmp_path, harm, said):
    model = made(tmp_path / "model")
    harm(model)
    with pytest.raises(ValueError, match=said) as error:
        write(model, out=tmp_path / "a.gguf", dtype="f16")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_write_that_breaks_off_leaves_no_file_and_a_file_that_is_there_is_kept(tmp_path, monkeypatch):
    model = made(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("longlora.model.gguf.Writer.write_tensor_data", full)
        with pytest.raises(OSError, match="no space left"):
            write(model, out=tmp_path / "a.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"a.gguf is there already"):
        write(model, out=tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_the_command_writes_a_folders_model_and_names_mistakes(tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["longlora", "export", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return str(ended.value.code)

    monkeypatch.chdir(tmp_path)
    model = ["--model", str(folder(tmp_path / "model"))]
    assert run("a.gguf", "--gguf", "--dtype", "f16", *model) == "0"
    assert f"a.gguf: 0.1 MB, made from {tmp_path}/model" in capsys.readouterr().out
    assert ggml.read(tmp_path / "a.gguf")[0]["general.file_type"] == 1
    two = str(made(tmp_path / "two", **TWO))
    assert run("two.gguf", "--gguf", "--model", two) == "0"
    assert f"MB, made from {two}. Opened with a context of more than 32 tokens, llama.cpp" in capsys.readouterr().out
    assert "a.gguf is there already" in run("a.gguf", "--gguf", *model)
    assert run("b.gguf", "--gguf", "--dtype", "q4", *model) == "2"
    assert "'q4' is not one of 'f32', 'f16', 'bf16'" in capsys.readouterr().err
    assert "--dtype is of a GGUF file: say --gguf too" in run("b.gguf", "--dtype", "f16", *model)
    assert "there is no folder" in run("none/b.gguf", "--gguf", *model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "model", "two", "two.gguf"]
