"""What training on one sequence costs in arithmetic, from the numbers of the architecture alone.

FLOPs as LongLoRA counts them (arXiv 2309.12307, Table 11); tests/test_plan.py holds them to every cell of the table. Two
conventions, kept apart: `forward_flops` counts attention over the whole L x L square, as the table does; `step_flops` counts the
causal half, which is what a kernel computes. longlora/planning/activations.py has the memory.

Letters: L tokens of a sequence; G of a group; d hidden size; n layers; H query heads; F feed-forward width; V vocabulary;
b bytes of a number in the run's dtype.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, computed_field

from longlora.attention.groups import group_size
from longlora.section import Frozen, nearest

LIKE_LLAMA = (
    *("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "olmo", "olmo2", "stablelm", "helium", "exaone4"),
    *("gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "phi3", "glm", "glm4"),
)
"""Families whose sizes say what their parameters are: in every layer attention, and a feed-forward of three matrices."""
TIED = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "smollm3")
"""Of these, the ones whose output head is the input embedding where their config does not say."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that are several in one, by the name the model gives it."""
FUSED_BY = {"phi3": ("qkv_proj", "gate_up_proj"), "glm": ("gate_up_proj",), "glm4": ("gate_up_proj",)}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


class Shape(Frozen):
    """The sizes of a decoder-only transformer whose feed-forward has three matrices (`LIKE_LLAMA`)."""

    hidden: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    """Fewer than `heads` under grouped-query attention."""
    head_dim: int = Field(gt=0)
    """Width of a head; heads x head_dim need not be the hidden size."""
    intermediate: int = Field(gt=0)
    vocab: int = Field(gt=0)
    tied: bool
    """The output head is the input embedding."""
    qkv_bias: bool
    """Qwen2 has biases on q, k and v."""
    qk_norm: bool
    """Qwen3 normalises queries and keys per head."""
    fused: tuple[str, ...] = ()
    """Those of `FUSED` that the model has in place of what they hold."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read what a transformers `config.json` holds.

        Raises:
            ValueError: a size is missing, or the family is none of `LIKE_LLAMA`.
        """
        family = str(config.get("model_type", "llama"))
        if family not in LIKE_LLAMA:
            raise ValueError(f"the plan knows dense decoders with a gated feed-forward, as llama has, not {family}")
        missing = [key for key in SIZES if config.get(key) is None]
        if missing:
            raise ValueError(f"the model's config lacks {', '.join(missing)}")
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", family in TIED)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            fused=FUSED_BY.get(family, ()),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each matrix of a layer, by the name the model gives it."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """As `linears`, by the name that the model's own matrices have."""
        inside = {part for name in self.fused for part in FUSED[name]}
        whole = {name: (self.hidden, sum(self.linears[part][1] for part in FUSED[name])) for name in self.fused}
        return {name: widths for name, widths in self.linears.items() if name not in inside} | whole

    @property
    def norms(self) -> int:
        """Parameters of all normalization layers: 266,240 in Llama-2 7B."""
        return (2 * self.layers + 1) * self.hidden + (2 * self.layers * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        matrices = sum(width * out for width, out in self.linears.values())
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.layers * (matrices + biases) + self.norms + self.embedding * (1 if self.tied else 2)


class Workload(Frozen):
    """The part of a recipe that costs time and memory."""

    context: int
    steps: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    pattern: Literal["s2", "full"]
    group_ratio: float
    shift: Literal["boundaries", "roll", "none"]
    scaling: str
    """Of positions, by `position.method`; it costs nothing, but not every one can be shared out."""
    full_attention_last: float = Field(ge=0, le=1)
    backend: str
    """Every backend is fused, and holds no scores, but `eager`."""
    method: Literal["lora", "full"]
    quantized: Literal["nf4"] | None
    rank: int = Field(gt=0)
    target_modules: tuple[str, ...]
    trainable: tuple[Literal["embeddings", "norms"], ...]
    gradient_checkpointing: bool
    loss_chunk: int | None = Field(gt=0)
    """Tokens whose logits are in memory at once; None, or as many as there are, is the plain loss."""
    mlp_tile: int | None = Field(gt=0)
    """Tokens that a feed-forward takes at once; None, or as many as there are, takes all."""
    dtype: Literal["float32", "bfloat16"]

    @property
    def group(self) -> int:
        """Tokens that a query's group spans; all of them in full attention."""
        if self.pattern == "full":
            return self.context
        return min(self.context, group_size(self.context, self.group_ratio))

    @property
    def fused(self) -> bool:
        return self.backend != "eager"

    @property
    def number_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def adapted(self) -> tuple[str, ...]:
        """The matrices with low-rank adapters."""
        return self.target_modules if self.method == "lora" else ()


def check(shape: Shape, *, workload: Workload) -> None:
    """Raise ValueError where the recipe's numbers do not fit together, or do not fit the architecture."""
    context, ratio = workload.context, workload.group_ratio
    if context < 2:
        raise ValueError(f"position.context = {context}: a sequence has at least 2 tokens, one to predict the other")
    if workload.pattern == "s2" and ratio > 1:
        raise ValueError(
            f"attention.group_ratio = {ratio}: a group of {round(ratio * context)} tokens is larger than the sequence of "
            f"{context}; the ratio is at most 1, the paper's is 0.25"
        )
    if workload.pattern == "s2" and ratio <= 0:
        raise ValueError(f"attention.group_ratio = {ratio}: a group is a share in (0, 1] of the sequence")
    if workload.pattern == "s2" and shape.heads < 2:
        raise ValueError(f"s2 moves the groups of half the heads, the model has {shape.heads}: attention.pattern=full")
    for target in workload.adapted:
        if target not in shape.targets:
            raise ValueError(f"adapter.target_modules: no matrix '{target}'{nearest(target, list(shape.targets))}")


def adapter_parameters(shape: Shape, *, workload: Workload) -> int:
    """Parameters of the A and B matrices: 8.39 M for rank 8 on q, k, v, o of Llama-2 7B."""
    widths = [shape.targets[target] for target in workload.adapted]
    return shape.layers * workload.rank * sum(width + out for width, out in widths)


def trained_parameters(shape: Shape, *, workload: Workload) -> int:
    """Parameters with a gradient; a tied head is trained with its embedding and counts once."""
    if workload.method == "full":
        return shape.parameters
    whole = {"embeddings": shape.embedding, "norms": shape.norms}
    return adapter_parameters(shape, workload=workload) + sum(whole[kind] for kind in set(workload.trainable))


class Flops(Frozen):
    """FLOPs of one forward pass over one sequence, by part; a multiplication and an addition are two."""

    attention: float
    projections: float
    ffn: float
    other: float
    """The output head."""

    @computed_field
    @property
    def total(self) -> float:
        return self.attention + self.projections + self.ffn + self.other


def forward_flops(shape: Shape, *, workload: Workload) -> Flops:
    """Table 11: attention 4 L^2 d n, the whole square (4 L G d n in s2), projections 8 L d^2 n, feed-forward 6 L d F n, other
    2 L d V. Fewer key/value heads make the projections smaller, not the attention. LoRA's own products, 0.1 % at rank 8, are
    left out as in the table.
    """
    length, layers = workload.context, shape.layers
    matrices = {name: width * out for name, (width, out) in shape.linears.items()}
    projections = sum(matrices[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return Flops(
        attention=4.0 * length * workload.group * shape.heads * shape.head_dim * layers,
        projections=2.0 * length * projections * layers,
        ffn=2.0 * length * (sum(matrices.values()) - projections) * layers,
        other=2.0 * length * shape.embedding,
    )


def step_flops(shape: Shape, *, workload: Workload) -> tuple[float, float]:
    """FLOPs computed to train on one sequence, recipe's last full-attention steps averaged in: (matrix products, attention).

    A frozen matrix is used forward and for the gradient of its input, a trained one for its own gradient too; checkpointing
    repeats the layers' forward. Attention: half the square forward, 2.5 times that backward (a fused kernel computes the
    scores again), once more under checkpointing; eager computes whole squares, and two of them backward.
    """
    flops = forward_flops(shape, workload=workload)
    full, again = workload.method == "full", int(workload.gradient_checkpointing)
    tiled = int(
        workload.mlp_tile is not None and workload.mlp_tile < workload.context
    )  # its forward is computed once more
    head_trained = full or (shape.tied and "embeddings" in workload.trainable)
    products = (
        (flops.projections + flops.ffn) * (2 + again + full) + flops.ffn * tiled + flops.other * (2 + head_trained)
    )
    products += 2.0 * workload.context * adapter_parameters(shape, workload=workload) * (3 + again)
    square = flops.attention * workload.context / workload.group
    attention = flops.attention + (square - flops.attention) * workload.full_attention_last
    return products, attention * (0.5 * (3.5 + again) if workload.fused else 3.0 + again)
