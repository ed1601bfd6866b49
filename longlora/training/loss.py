"""Cross-entropy whose logits exist only a chunk at a time: L x vocabulary is never held at once.

At L = 100,000 and 32,000 words the float32 logits alone are 12.8 GB, and their gradient as much again. PyTorch's
`linear_cross_entropy` takes the product with the head and the loss together, chunk by chunk, and computes the gradient in
the same pass. In 16 bits it also adds up in 16 bits, so the value, but not the gradient, is computed again there. Tested against
the plain loss of transformers, values and gradients.

Letters: B batch, L tokens, N tokens of all rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy
from transformers import PreTrainedModel

from longlora.attention.shifted import disabled
from longlora.model.quiet_peft import PeftModel

IGNORED = -100
CAPS = {"final_logit_softcapping": ", or set it to null in its config", "logits_soft_cap": ""}
"""What families call the cap on their logits, and what else than another base would do; RecurrentGemma's cannot be null."""


def chunked_cross_entropy(
    hidden_BLD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BL: torch.Tensor,
    *,
    chunk: int,
    bias_V: torch.Tensor | None = None,
    reduction: str = "mean",
    shifted: bool = False,
) -> torch.Tensor:
    """Next-token cross-entropy of `hidden_BLD @ weight_VD.T` + `bias_V`, at most `chunk` rows of logits in memory.

    Token t is judged against label t + 1, or, where labels are `shifted` already, against label t. A label of -100 does not
    count.
    """
    if not shifted:
        hidden_BLD, labels_BL = hidden_BLD[:, :-1], labels_BL[:, 1:]
    device = hidden_BLD.device.type
    # Autocast does not know this function. Trained norms leave the hidden states in float32.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BLD.dtype
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    hidden_ND, weight_VD, labels_N = hidden_BLD.flatten(0, 1).to(dtype), weight_VD.to(dtype), labels_BL.flatten()
    bias_V = None if bias_V is None else bias_V.to(dtype)
    exact = None
    if dtype.itemsize == 2:  # before there are gradients in memory
        exact = float32_value(hidden_ND, weight_VD, bias_V, labels_N, chunk=chunk, reduction=reduction)
    loss = linear_cross_entropy(
        hidden_ND,
        weight_VD,
        labels_N,
        linear_bias=bias_V,
        reduction=reduction,
        ignore_index=IGNORED,
        options=options,
    )
    if exact is not None:
        loss = Told.apply(loss, exact)
        assert isinstance(loss, torch.Tensor)
    return loss


class Told(torch.autograd.Function):
    """The value of `exact` with the gradient of `loss`, which itself may be infinite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None


@torch.no_grad()
def float32_value(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    *,
    chunk: int,
    reduction: str,
) -> torch.Tensor:
    """The loss alone, added up in float32: a sum of thousands in bfloat16 takes in nothing smaller than 1/256 of itself, and in
    float16 it overflows."""
    total = torch.zeros((), device=hidden_ND.device)
    for hidden_nD, labels_n in zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True):
        logits_nV = linear(hidden_nD, weight_VD, bias_V).float()
        total += cross_entropy(logits_nV, labels_n, ignore_index=IGNORED, reduction="sum")
    return total if reduction == "sum" else total / (labels_N != IGNORED).sum()


def chunk_loss(model: PreTrainedModel | PeftModel, *, chunk: int) -> Callable[[], None]:
    """Make `model(labels=...)` compute its loss in chunks; return what gives it its own head and loss back.

    Until then what it calls `logits` are hidden states, and it does not generate. No weight moves and none changes its name, so
    what is saved meanwhile opens as ever.

    Raises:
        ValueError: the model does something to its logits (soft-capping), or its head has trained parts (an adapter), that this
            loss would leave out; then it is as it was.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    # The comparison below would not see it: a cap does nothing to logits that are small.
    said = inner.config.get_text_config().to_dict()
    if cap := next((name for name in CAPS if said.get(name)), None):
        raise ValueError(
            f"{type(inner).__name__} caps its logits at {said[cap]:g}, and the chunked loss takes them as the head gives them: "
            f"take a base without {cap}{CAPS[cap]}"
        )
    head = inner.get_output_embeddings()
    assert head is not None
    must_be_weights_alone(head)
    own = vars(head).get("forward"), inner.loss_function  # accelerate may have put a forward on it

    def give_back() -> None:
        vars(head).pop("forward", None)
        vars(inner).pop("generate", None)
        if own[0]:
            head.forward = own[0]
        inner.loss_function = own[1]

    half = head.weight.dtype == torch.bfloat16 or inner.dtype == torch.bfloat16
    with at_rest(inner):
        plain = loss_of(inner, half=half)
        head.forward = hidden_states
        inner.loss_function = partial(loss_by, head=head, chunk=chunk)  # in a copy of the model, the copy's head
        inner.generate = no_generation  # type: ignore[method-assign]
        try:
            chunked = loss_of(inner, half=half)
        except BaseException:
            give_back()
            raise
    if not torch.allclose(plain, chunked, rtol=1e-2 if half else 1e-4):
        give_back()
        raise ValueError(
            f"{type(inner).__name__} changes its logits after the head; the chunked loss is {chunked:.4f}, its own {plain:.4f}"
        )
    return give_back


def hidden_states(hidden_BLD: torch.Tensor) -> torch.Tensor:
    """In place of the head, which the loss applies."""
    return hidden_BLD


def no_generation(*given: Any, **settings: Any) -> NoReturn:
    raise ValueError("under the chunked loss a model gives no logits: call what chunk_loss returned, then generate")


def must_be_weights_alone(head: nn.Module) -> None:
    """Raises ValueError: something else of the `head` is trained than its weight and bias, such as an adapter's matrices."""
    others = [
        name for name, p in head.named_parameters() if p.requires_grad and p is not head.weight and p is not head.bias
    ]
    if others:
        raise ValueError(
            f"the chunked loss takes the head's weight alone, and {others[0]} would not be trained: leave the head out of "
            "target_modules, or train it whole"
        )


@contextmanager
def at_rest(model: PreTrainedModel) -> Generator[None]:
    """No dropout and ordinary attention: passes differ by what is changed between them, and by nothing else."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with disabled(model) if model._supports_sdpa else nullcontext():  # pyright: ignore[reportPrivateUsage]
            yield
    finally:
        for m in training:
            m.training = True


@torch.inference_mode()
def loss_of(model: PreTrainedModel, *, half: bool) -> torch.Tensor:
    """Of a few tokens, in float32."""
    tokens_BL = torch.arange(8, device=model.device)[None]
    with torch.autocast(tokens_BL.device.type, dtype=torch.bfloat16, enabled=half):
        return model(input_ids=tokens_BL, labels=tokens_BL).loss.float()


def loss_by(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None = None,  # some families give it by its place
    num_items_in_batch: Any = None,
    shift_labels: torch.Tensor | None = None,
    *,
    head: nn.Module,
    chunk: int,
    **ignored: Any,
) -> torch.Tensor:
    """The loss behind the signature that transformers calls; what it calls logits are hidden states here."""
    total = chunked_cross_entropy(
        logits,
        head.weight,  # of a wrapper, if peft put one around it
        labels if shift_labels is None else shift_labels,
        chunk=chunk,
        bias_V=head.bias,
        reduction="mean" if num_items_in_batch is None else "sum",
        shifted=shift_labels is not None,
    )
    return total if num_items_in_batch is None else total / num_items_in_batch
