"""How batch and sequence are shared out to processes: numbers only, for the training itself, a check of its parameters, and a
plan of it."""

import math
import os
from collections.abc import Iterator

from longlora.section import refuse


def degree_of_sequences() -> int:
    """Processes that hold one sequence together, by LONGLORA_SEQUENCE_PARALLEL.

    Raises:
        ValueError: it holds no number from 1 on.
    """
    said = os.environ.get("LONGLORA_SEQUENCE_PARALLEL") or "1"
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"LONGLORA_SEQUENCE_PARALLEL={said}: must be a whole number from 1 on")
    return int(said)


def accumulation(global_batch_size: int, *, micro_batch_size: int, replicas: int) -> int:
    """Micro-batches per optimiser step and replica.

    Raises:
        ValueError: as `batch_misfits` says.
    """
    refuse(batch_misfits(global_batch_size, micro_batch_size=micro_batch_size, replicas=replicas))
    return global_batch_size // (micro_batch_size * replicas)


def batch_misfits(global_batch_size: int, *, micro_batch_size: int, replicas: int) -> Iterator[str]:
    """Says so where the replicas, each with whole micro-batches, cannot share the global batch out equally."""
    together = micro_batch_size * replicas
    if global_batch_size % together:
        fitting = max(1, round(global_batch_size / together)) * together
        parts = f"micro_batch_size x replicas = {micro_batch_size} x {replicas}"
        yield (
            f"fit.global_batch_size = {global_batch_size} must be a multiple of "
            f"{parts if replicas > 1 else f'micro_batch_size = {micro_batch_size}'}; the nearest is {fitting}"
        )


def sequence_misfits(length: int, *, group_size: int, degree: int) -> Iterator[str]:
    """Says so where one of the `degree` processes of a sequence would hold broken groups; names the admissible degrees."""
    if length % degree or (length // degree) % group_size:
        whole = length // group_size if length % group_size == 0 else 1
        admissible = [d for d in range(1, whole + 1) if whole % d == 0]
        yield (
            f"{length} tokens over {degree} processes are {length / degree:g} each, which must be a multiple of the group, "
            f"{group_size}: LONGLORA_SEQUENCE_PARALLEL can be {', '.join(map(str, admissible))}"
        )


def roll_misfits(length: int, *, group_size: int) -> Iterator[str]:
    """Says so where the sequence would end in a part of a group, which cannot be rolled."""
    if length % min(group_size, length):
        yield (
            f"attention.shift: roll needs whole groups, and {length} tokens are no multiple of the group, {group_size}: boundaries "
            "takes any length"
        )


def head_misfits(kv_heads: int, *, degree: int) -> Iterator[str]:
    """Says so where full attention cannot share the heads out to the `degree` processes of a sequence."""
    if kv_heads % degree:
        yield (
            f"full attention shares {kv_heads} key/value heads out to {degree} processes: LONGLORA_SEQUENCE_PARALLEL must "
            f"divide {kv_heads}, the nearest is {math.gcd(kv_heads, degree)}; or train in s2 alone, with "
            "attention.full_attention_last: 0"
        )


def sharing_misfits(
    length: int,
    *,
    pattern: str,
    group_size: int,
    shift: str,
    varying: str | None,
    full_attention_last: float,
    kv_heads: int,
    degree: int,
) -> Iterator[str]:
    """Says so where `degree` processes, or one, cannot hold a sequence through the whole training, its last steps included.
    `varying`: the `position.method` where a text's length decides how its tokens are turned, else None."""
    if degree > 1 and varying:
        yield (
            f"position.method: {varying} turns tokens by the length of their text, of which each of {degree} processes would "
            "see a part: llama3 or yarn, or LONGLORA_SEQUENCE_PARALLEL=1"
        )
    if degree > 1 and pattern == "s2":
        yield from sequence_misfits(length, group_size=group_size, degree=degree)
        if shift == "roll":
            yield "a roll mixes the end of the sequence with its start: over several processes take attention.shift: boundaries"
    elif pattern == "s2" and shift == "roll":
        yield from roll_misfits(length, group_size=group_size)
    if pattern == "full" or full_attention_last:
        yield from head_misfits(kv_heads, degree=degree)
