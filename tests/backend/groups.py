"""What the backend's tests share: a group on a rank of tests.ranks, and the same on gloo to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from blsrdma import Options


@contextlib.contextmanager
def group(
    rank: int, world: int, store: Any, backend: str = "bls", timeout: float = 30.0, **options: Any
) -> Iterator[Any]:
    """The default group, as long as the block lasts."""
    dist.init_process_group(
        backend, store=dist.PrefixStore(backend, store), rank=rank, world_size=world,
        timeout=timedelta(seconds=timeout), pg_options=Options(**options) if options else None,
    )  # fmt: skip
    try:
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def both(rank: int, world: int, store: Any, work: Any, *args: Any) -> None:
    """`work(rank, world, *args)` gives tensors; the same bits on bls and on gloo."""
    with group(rank, world, store):
        ours = work(rank, world, *args)
    with group(rank, world, store, "gloo"):
        theirs = work(rank, world, *args)
    assert len(ours) == len(theirs) > 0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        same(mine, other, number)


def in_turn(rank: int, world: int, store: Any, *works: Callable[[int, int, Any], None]) -> None:
    """One after the other in the same processes, for what they import takes longer than they do."""
    for number, work in enumerate(works):
        work(rank, world, dist.PrefixStore(str(number), store))


def same(mine: Any, other: Any, number: Any = None) -> None:
    assert mine.dtype == other.dtype and mine.shape == other.shape, number
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (mine, other)]
    assert torch.equal(*bits), f"result {number}: {mine} is not {other}"
