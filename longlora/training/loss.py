"""Cross-entropy whose logits exist only a chunk at a time: L x vocabulary is never held at once.

At L = 100,000 and 32,000 words the float32 logits alone are 12.8 GB, and their gradient as much again. PyTorch's
`linear_cross_entropy` takes the product with the head and the loss together, chunk by chunk, and computes the gradient in
the same pass. In bfloat16 it also adds up in bfloat16, so the value, but not the gradient, is computed again there. Tested against
the plain loss of transformers, values and gradients.

Letters: B batch, L tokens, N tokens of all rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy
from transformers import PreTrainedModel

IGNORED = -100


class HiddenHead(nn.Module):
    """Stands where the language-model head was and passes the hidden states on; the loss applies the head it keeps."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    @property
    def weight(self) -> torch.Tensor:
        return self.head.weight  # of a wrapper, if peft put one around it

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return hidden_BLD


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
    if dtype == torch.bfloat16:  # before there are gradients in memory
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
    return loss if exact is None else loss.float() + (exact - loss.detach().float())


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
    """The loss alone, added up in float32: a sum of thousands in bfloat16 takes in nothing smaller than 1/256 of itself."""
    total = torch.zeros((), device=hidden_ND.device)
    for hidden_nD, labels_n in zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True):
        logits_nV = linear(hidden_nD, weight_VD, bias_V).float()
        total += cross_entropy(logits_nV, labels_n, ignore_index=IGNORED, reduction="sum")
    return total if reduction == "sum" else total / (labels_N != IGNORED).sum()


def chunk_loss(model: PreTrainedModel, *, chunk: int) -> Callable[[], None]:
    """Make `model(labels=...)` compute its loss in chunks; return what puts the head back.

    Raises:
        ValueError: the model does something to its logits (soft-capping) that this loss would leave out.
    """
    # The comparison below would not see it: a cap does nothing to logits that are small.
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise ValueError(
            f"{type(model).__name__} caps its logits at {cap:g}, and the chunked loss takes them as the head gives them: take a "
            "base without final_logit_softcapping, or set it to null in its config"
        )
    head = model.get_output_embeddings()
    assert head is not None
    tokens_BL = torch.arange(8, device=head.weight.device)[None]
    probe = {"input_ids": tokens_BL, "labels": tokens_BL}
    half = head.weight.dtype == torch.bfloat16 or model.dtype == torch.bfloat16
    autocast = torch.autocast(head.weight.device.type, dtype=torch.bfloat16, enabled=half)
    with torch.inference_mode(), autocast:
        plain = model(**probe).loss

    def loss(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int | None = None,  # some families give it by its place
        num_items_in_batch: Any = None,
        shift_labels: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        # `logits` are hidden states here: HiddenHead passed them on.
        total = chunked_cross_entropy(
            logits,
            head.weight,
            labels if shift_labels is None else shift_labels,
            chunk=chunk,
            bias_V=head.bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            shifted=shift_labels is not None,
        )
        return total if num_items_in_batch is None else total / num_items_in_batch

    model.set_output_embeddings(HiddenHead(head))
    model.loss_function = loss
    with torch.inference_mode(), autocast:
        chunked = model(**probe).loss
    tolerance = 1e-2 if half else 1e-4
    if not torch.allclose(plain.float(), chunked.float(), rtol=tolerance):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head; the chunked loss is {chunked:.4f}, its own {plain:.4f}"
        )
    return lambda: model.set_output_embeddings(head)
