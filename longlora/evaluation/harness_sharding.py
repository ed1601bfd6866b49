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

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from longlora.parallel.sharding import gathered, merged, ours, rank, world


class Dealt(HFLM):
    """A model that is open already. Each method takes all requests, and gives all answers, in every process."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(total, greedy) for total, greedy in dealt(super().loglikelihood, requests, quiet=disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return dealt(super().loglikelihood_rolling, requests, quiet=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises ValueError: answers shall be drawn by chance, which would be another one in several processes."""
        if world() > 1:
            for request in requests:
                settings: dict[str, Any] = list(request.args)[1]
                if normalize_gen_kwargs(settings).get("do_sample"):
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
