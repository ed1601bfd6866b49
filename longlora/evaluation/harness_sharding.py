"""The model as lm-evaluation-harness asks it, its requests dealt out to the processes of a launcher.

The harness can deal out documents by itself (`lm.rank`, `lm.world_size`; lm_eval/evaluator.py), at the price of other scores: each
process draws few-shot examples of its own, requests that fill up a share are answered twice, metrics come together in another
order, which moves bootstrapped errors, and a process without a document ends. So here every process takes itself for the only one
and makes all requests; each answers those of its share of the documents, and all know all answers. Whatever follows from them is
then what it is in one process.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from longlora.parallel.sharding import gathered, merged, ours, rank, world


class Dealt(HFLM):
    """A model that is open already. Each method takes all requests, and gives all answers, in every process. One request at a time
    is computed."""

    kept = 0
    """Tokens at the end of a prompt whose logits are asked for."""
    cut = 0
    """Requests of this process that were longer than the model's positions, and lost their beginning."""

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """The harness makes the logits of whole prompts, of which it takes those of continuations."""
        self.kept = max((len(continuation) for _, _, continuation in requests), default=0)
        self.cut += sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits (1, L, vocabulary) of the last tokens alone; the harness counts from the end."""
        assert len(inps) == 1 and not args and not kwargs
        with torch.no_grad():
            return self.model(input_ids=inps, use_cache=False, logits_to_keep=self.kept).logits

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_1L, mask_1L = super().tok_batch_encode(strings, padding_side=padding_side, truncation=truncation)
        if left_truncate_len is None or ids_1L.shape[1] <= left_truncate_len:
            return ids_1L, mask_1L
        self.cut += 1
        return ids_1L[:, -left_truncate_len:], mask_1L[:, -left_truncate_len:]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(total, greedy) for total, greedy in dealt(super().loglikelihood, requests, quiet=disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return dealt(super().loglikelihood_rolling, requests, quiet=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises ValueError: answers may be as long as all the model can read, or shall be drawn by chance, which would be another
        one in several processes."""
        for request in requests:
            settings: dict[str, Any] = dict(normalize_gen_kwargs(list(request.args)[1], self.max_gen_toks))
            if (room := settings["max_gen_toks"]) >= self.max_length:
                raise ValueError(
                    f"task {request.task_name} has answers of up to {room} tokens, which leaves no room for a prompt in the "
                    f"model's {self.max_length} positions: set max_gen_toks in the task below that, or ask another model"
                )
            if world() > 1 and settings.get("do_sample"):
                raise ValueError(
                    f"task {request.task_name} draws its answers by chance (do_sample), so its scores would depend on the "
                    "number of processes: measure it in one, without LONGLORA_EVALUATION_LAUNCHER"
                )
        return dealt(super().generate_until, requests, quiet=disable_tqdm)


def dealt(answer: Callable[..., list[Any]], requests: list[Instance], *, quiet: bool) -> list[Any]:
    """The answers to all requests; this process's `answer` gives those to its documents. Requests of one document, such as the
    choices of a question, share a forward pass, and stay together.

    Raises:
        ValueError: the processes were given different requests.
    """
    if world() == 1:
        return answer(requests, disable_tqdm=quiet)
    must_be_the_same(requests)
    documents = {key: number for number, key in enumerate(dict.fromkeys(map(document, requests)))}
    mine = [number for number, request in enumerate(requests) if ours(documents[document(request)])]
    given = answer([requests[n] for n in mine], disable_tqdm=quiet or rank() > 0) if mine else []
    found = merged(dict(zip(mine, given, strict=True)))
    return [found[number] for number in range(len(requests))]


def document(request: Instance) -> tuple[str | None, int | None]:
    return request.task_name, request.doc_id


def must_be_the_same(requests: list[Instance]) -> None:
    said = hashlib.sha256(repr([(*document(r), r.idx, r.args) for r in requests]).encode()).digest()
    if len(set(gathered(said))) > 1:
        tasks = ", ".join(dict.fromkeys(str(r.task_name) for r in requests))
        raise ValueError(
            f"the processes were given different requests, so a task is made differently each time it is read ({tasks}): "
            "measure it in one process, without LONGLORA_EVALUATION_LAUNCHER"
        )
