"""How well a model reads facts back, by how far back they lie: recall exercises on held-out text, asked in full attention.

Perplexity of running text hardly depends on what lies a group back, so it cannot tell what lets tokens see over a group's
border. Answers do: each is a number or a word that stood in the text once before, at any distance up to the whole length.
The measure is the loss on an answer's tokens, which moves long before a greedy answer turns from wrong to right.
"""

import random
import re
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.data.recall import exercise, words_of


def answer(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens at the end of a question with its answer are the answer's last word and what closes it."""
    text = tokenizer.decode(tokens)
    last = re.split(r"\s", text.rstrip(".\n"))[-1]
    return len(tokenizer(last + text[len(text.rstrip(".\n")) :], add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    length: int,
    group: int,
    count: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Mean loss of an answer (nats), share of the answers whose greedy reading is right, and how many there were.

    By the distance from the start of the fact to the start of its question: `near` up to `group` tokens, which groups of
    that size can join, and `far` beyond.
    """
    words = words_of(texts, length=length)
    dice = random.Random(seed)
    found: dict[str, list[tuple[float, bool]]] = {"near": [], "far": []}
    for _ in range(count):
        tokens, asked = exercise(
            texts, words=words, tokenizer=tokenizer, length=length, reach=length, nearness=1.0, dice=dice
        )
        tokens_L = torch.tensor(tokens, device=model.device)
        logits_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0].float()
        loss_L = torch.nn.functional.cross_entropy(logits_LV[:-1], tokens_L[1:], reduction="none")
        right_L = logits_LV[:-1].argmax(-1) == tokens_L[1:]
        for fact, _, question, end in asked:
            first = end - answer(tokens[question:end], tokenizer) - 1  # what predicts the first token of the answer
            side = "near" if question - fact <= group else "far"
            found[side].append((float(loss_L[first : end - 1].sum()), bool(right_L[first : end - 1].all())))
    return {
        side: {
            "nats": round(sum(nats for nats, _ in each) / len(each), 6),
            "right": round(sum(right for _, right in each) / len(each), 6),
            "answers": len(each),
        }
        for side, each in found.items()
    }
