"""How a global batch is shared out: numbers only, for the training itself, a check of its parameters, and a plan of it."""

from collections.abc import Iterator

from longlora.section import refuse


def accumulation(global_batch_size: int, *, micro_batch_size: int, replicas: int) -> int:
    """Micro-batches per optimiser step and replica.

    Raises:
        ValueError: as `misfits`.
    """
    refuse(misfits(global_batch_size, micro_batch_size=micro_batch_size, replicas=replicas))
    return global_batch_size // (micro_batch_size * replicas)


def misfits(global_batch_size: int, *, micro_batch_size: int, replicas: int) -> Iterator[str]:
    """Says so where the replicas, each with whole micro-batches, cannot share the global batch out equally."""
    together = micro_batch_size * replicas
    if global_batch_size % together:
        fitting = max(1, round(global_batch_size / together)) * together
        parts = f"micro_batch_size x replicas = {micro_batch_size} x {replicas}"
        yield (
            f"fit.global_batch_size = {global_batch_size} must be a multiple of "
            f"{parts if replicas > 1 else f'micro_batch_size = {micro_batch_size}'}; the nearest is {fitting}"
        )
