"""A prefix of many texts, read once into a cache: whether a model's cache serves for it, reading over it, parting and cutting it.

Letters: B texts of a batch, L tokens of a text, A last places whose next token is asked for.
"""

from copy import copy

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from longlora.model.position import varies

CHUNK = 512
"""Tokens of one forward pass over a cache: its mask has chunk x length entries, a share chunk / 2 length of them wasted."""


def shareable(model: PreTrainedModel) -> bool:
    """Whether a prefix's cache serves longer texts: every layer keeps all of it, and no rotary angle depends on the length."""
    layers = DynamicCache(config=model.config).layers
    return steady(model) and all(type(layer) is DynamicLayer for layer in layers)


def steady(model: PreTrainedModel) -> bool:
    """Whether rotary angles, if there are any, are the same for every length; else a forward pass changes the model's."""
    return not varies(model.config.get_text_config())


def read(model: PreTrainedModel, tokens_BL: torch.Tensor, *, cache: DynamicCache | None, keep: int) -> torch.Tensor:
    """First choices (B, keep) after the last `keep` tokens; over a cache in chunks, so that no mask is length x length."""
    if cache is None:
        return model(input_ids=tokens_BL, use_cache=False, logits_to_keep=keep).logits.argmax(dim=-1)
    chunk, length = max(CHUNK, keep), tokens_BL.shape[1]
    # The first chunk is the short one: a short last one would hold too few logits.
    first = (length - 1) % chunk + 1
    choice_BA = tokens_BL[:, :0]
    for start, end in zip([0, *range(first, length, chunk)], range(first, length + 1, chunk), strict=True):
        out = model(input_ids=tokens_BL[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=keep)
        choice_BA = out.logits.argmax(dim=-1)
    return choice_BA


def beginning(cache: DynamicCache, *, length: int, rows: int) -> DynamicCache:
    """The cache's first `length` tokens for `rows` texts that go on apart: views, until they do."""
    assert 0 < length <= cache.get_seq_length()
    part = copy(cache)
    part.layers = [copy(layer) for layer in cache.layers]
    for layer in part.layers:
        assert layer.keys is not None and layer.values is not None
        layer.keys, layer.values = (x[..., :length, :].expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
    return part


def cut(cache: DynamicCache, length: int) -> None:
    """Leave the cache's first `length` tokens."""
    surplus = cache.get_seq_length() - length
    assert surplus >= 0
    if surplus:
        cache.crop(-surplus)
