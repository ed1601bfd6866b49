"""What training holds in memory between a layer's forward and its backward, from the numbers of the architecture alone.

As autograd saves it in a decoder layer of transformers 5: tests/test_plan.py holds it to what `saved_tensors_hooks` and the
memory profiler see in a small Llama. Letters: d hidden size; F feed-forward width; b bytes of a number in the run's dtype.
"""

from longlora.planning.cost import FUSED, Shape, Workload
from longlora.section import Frozen

LOGIT_BYTES = 12
"""Per token and word at the loss's peak: logits in float32 (4), their saved log-softmax (4), its gradient (4), as the memory
profiler sees them. Not fitted: Table 12's own slope asks for 16, since the authors' transformers kept a shifted copy besides."""

SCORE_BYTES = 14
"""Per attention score when nothing is fused: the softmax saved in float32 and cast (4 + 2), their gradients (4 + 2), the score (2).
Not fitted: it meets the paper's Table 13 (no FlashAttention) within 6 %."""

ATTENTION = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
FEED_FORWARD = (("gate_proj", "up_proj"), ("down_proj",))
"""The matrices of a layer, those together that read the same tensor."""


class Activations(Frozen):
    """Bytes that one micro-batch holds on one GPU, beside parameters, gradients and optimiser."""

    kept: float
    """From forward to backward: every layer's input under checkpointing, else all that every layer saves."""
    layer: float
    """On top, while a layer is differentiated."""
    head: float
    """On top, while the loss is differentiated, logits apart."""
    logits: float
    """With `head`: the logits and what the loss makes of them."""


def activations(shape: Shape, *, workload: Workload, tokens: int, trained_bytes: int = 4) -> Activations:
    """Activation memory of `tokens` tokens, the sum of their contexts where several sequences are in memory.

    Where all weights are trained the layers' inputs are as wide as a weight, of `trained_bytes`; else the embedding's are cast.
    """
    stream = max(workload.number_bytes, trained_bytes if workload.method == "full" else 0)
    width, layer = shape.hidden * stream, layer_bytes(shape, workload=workload)
    if (
        stream > workload.number_bytes
    ):  # norms' results in float32, which autocast casts for each matrix that reads them
        layer += shape.hidden * (2 * (stream - workload.number_bytes) + 3 * workload.number_bytes)
    moving = float(tokens * moving_bytes(shape, workload=workload))
    if workload.mlp_tile is not None and workload.mlp_tile < tokens:
        wide = feed_forward_bytes(shape, workload=workload)
        layer += width - wide  # of the feed-forward its input alone
        tile = workload.mlp_tile * (wide + moving_bytes(shape, workload=workload))
        moving = max(tile + 2.0 * tokens * width, float(tokens * attention_moving_bytes(shape, workload=workload)))
    again = workload.gradient_checkpointing
    return Activations(
        kept=float(tokens * shape.layers * (width if again else layer)),
        layer=tokens * layer + moving if again else moving,
        # The last hidden state in float32 for the norm; scaled, as the head's input, and its gradient.
        head=float(tokens * (4 * shape.hidden + 3 * width)),
        logits=float(LOGIT_BYTES * shape.vocab * min(tokens, workload.loss_chunk or tokens)),
    )


def layer_bytes(shape: Shape, *, workload: Workload) -> int:
    """Bytes per token that autograd saves in one layer.

    Two norms' inputs in float32 (8 d) and, where norms are trained, their results before scaling (2 b d); the inputs of
    trained matrices; q, k, v and the attention's result; the feed-forward's; the low-rank products.
    """
    norms = 2 * shape.hidden if workload.method == "full" or "norms" in workload.trainable else 0
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    own = norms + attention + inputs(shape, workload, of=ATTENTION)
    scores = saved_scores(shape, workload)
    return 8 * shape.hidden + workload.number_bytes * own + feed_forward_bytes(shape, workload=workload) + scores


def feed_forward_bytes(shape: Shape, *, workload: Workload) -> int:
    """The feed-forward's part of it: gate, its activation and up (3 b F), and the inputs of trained matrices."""
    return workload.number_bytes * (3 * shape.intermediate + inputs(shape, workload, of=FEED_FORWARD))


def inputs(shape: Shape, workload: Workload, *, of: tuple[tuple[str, ...], ...]) -> int:
    """Numbers per token: the inputs of the trained ones among these matrices, and their low-rank products.

    In one precision the matrices that read the same tensor share it, and o_proj's is the attention's result, counted there;
    autocast (16 bit) casts an adapter's input for every adapter.
    """
    full, names = workload.method == "full", {name for names in of for name in names}
    adapted = [parts for target in workload.adapted if names.issuperset(parts := FUSED.get(target, (target,)))]
    if workload.number_bytes == 2 and not full:
        sharing = adapted
    else:
        trained = set(shape.linears) if full else {part for parts in adapted for part in parts}
        sharing = [names for names in of if names != ("o_proj",) and trained & set(names)]
    return workload.rank * len(adapted) + sum(shape.linears[names[0]][0] for names in sharing)


def attention_moving_bytes(shape: Shape, *, workload: Workload) -> int:
    """Bytes per token, over what the layer saved, while the attention is differentiated: the gradients of its result, q, k and v,
    and of the layer's result."""
    return workload.number_bytes * (2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.hidden)


def moving_bytes(shape: Shape, *, workload: Workload) -> int:
    """Bytes per token, over what the layer saved, at the highest point of its backward, in the feed-forward: the gradients of
    gate and up, and down's input where it is not among the saved."""
    b, down_saved = workload.number_bytes, workload.method == "full" or "down_proj" in workload.target_modules
    moving = b * ((2 if down_saved else 3) * shape.intermediate + shape.hidden)
    if b == 2 and "down_proj" in workload.adapted:
        moving += 4 * shape.intermediate  # peft lifts the adapter's input to float32
    scores = SCORE_BYTES * shape.heads * span(workload) if not workload.fused else 0
    return max(moving, scores - saved_scores(shape, workload))


def saved_scores(shape: Shape, workload: Workload) -> int:
    """Bytes per token of the attention weights that eager attention saves."""
    return 0 if workload.fused else (4 if workload.number_bytes == 4 else 6) * shape.heads * span(workload)


def span(workload: Workload) -> int:
    """The most keys a query ever meets in the run."""
    return workload.context if workload.full_attention_last else workload.group
