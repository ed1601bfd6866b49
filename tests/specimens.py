"""Small things to test on: random models and a tokenizer trained on a paragraph. All sizes differ."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.attention.shifted import Attention
from longlora.model.adapter import Adapter
from longlora.model.load import Precision
from longlora.model.position import Position
from longlora.training.fit import Fit

FLOAT32 = Precision(dtype="float32")
TEXT = (
    "The committee met on the 14th of March, heard nine witnesses, and wrote a report of 260 pages that nobody read. "
    * 40
)


def llama(*, seed: int = 0, tied: bool = True, vocabulary: int = 300, window: int = 64) -> LlamaForCausalLM:
    """A random Llama with an odd number of heads and grouped keys."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=4,
        max_position_embeddings=window,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer(*, window: int = 64) -> PreTrainedTokenizerFast:
    """Byte-level pairs, single digits, and marks for begin and end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", model_max_length=window)


def folder(place: Path, *, tied: bool = True, window: int = 64) -> Path:
    """A whole model folder, as the backbone stage leaves one."""
    llama(tied=tied, window=window).save_pretrained(place)
    tokenizer(window=window).save_pretrained(place)
    return place


def older_names(place: Path) -> None:
    """Have the tokenizer of the folder `place` in the files of GPT-2's."""
    raw = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "tokenizer.json").unlink()
    (place / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (place / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in raw["merges"]))
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<eos>", "model_max_length": 64}
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **marks}))


ATTENTION = Attention(pattern="s2", shift="boundaries", group_ratio=0.25, full_attention_last=0.0, backend="sdpa")
POSITION = Position(method="yarn", context=128)
ADAPTER = Adapter(
    method="lora",
    quantized=None,
    rank=3,
    alpha=6.0,
    dropout=0.0,
    target_modules=["q_proj", "v_proj"],
    trainable=["embeddings", "norms"],
)
FIT = Fit(
    steps=6,
    global_batch_size=4,
    micro_batch_size=2,
    recall_share=0.25,
    pairs_share=0.0,
    neftune_noise_alpha=None,
    learning_rate=3e-3,
    loraplus_lr_ratio=1.0,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=2,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    max_grad_norm=1.0,
    dtype="float32",
    gradient_checkpointing=False,
    activation_offloading=False,
    mlp_tile=None,
    loss_chunk=50,
    save_steps=2,
    logging_steps=1,
    seed=5,
)
