"""Arrays of any size from all ranks to rank 0, over an exchange whose windows stay small."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dlrm.errors import Disagreement

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blsrdma import Exchange
    from dlrm.collective import Collective

WINDOW_BYTES = 1 << 18


def gather(exchange: Exchange | Collective, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    """One array per rank, flat, of the sender's dtype, at rank 0; None elsewhere. Collective; dtypes must agree.

    Sizes go to everyone first, so that all ranks take part in the same number of rounds.
    """
    ranks, window = exchange.world_size, exchange.window_bytes
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    with exchange.post(np.full(ranks, data.nbytes, np.int64)) as received:
        sizes = [int(size[0]) for size in received]
    results = [np.empty(size, np.uint8) for size in sizes]
    for start in range(0, max(sizes), window):
        chunk = data[start : start + window]
        counts = [len(chunk)] + [0] * (ranks - 1)
        with exchange.post(chunk, counts) as received:
            if exchange.rank == 0:
                for result, part in zip(results, received, strict=True):
                    result[start : start + len(part)] = part
    return [result.view(array.dtype) for result in results] if exchange.rank == 0 else None


def gather_json(exchange: Exchange | Collective, value: Any) -> list[Any] | None:
    """One JSON value per rank at rank 0; None elsewhere. Collective."""
    parts = gather(exchange, np.frombuffer(json.dumps(value).encode(), np.uint8))
    return None if parts is None else [json.loads(part.tobytes()) for part in parts]


def barrier(exchange: Exchange | Collective) -> None:
    """Return when every rank has called it. Collective."""
    with exchange.post(np.empty(0, np.uint8), [0] * exchange.world_size):
        pass


def agree(exchange: Exchange | Collective, facts: dict[str, str]) -> None:
    """Raise Disagreement, on every rank, where ranks do not bring the same facts. Collective."""
    message = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    ranks = exchange.world_size
    with exchange.post(np.tile(message, ranks), [len(message)] * ranks) as received:
        all_facts = [json.loads(part.tobytes()) for part in received]
    for rank, other in enumerate(all_facts):
        different = [name for name in facts if other.get(name) != all_facts[0][name]]
        if different:
            name = different[0]
            raise Disagreement(f"{name}: rank {rank} has {other.get(name)}, rank 0 has {all_facts[0][name]}")


def largest(exchange: Exchange | Collective, values: list[int]) -> list[int]:
    """The largest over all ranks of each value, on every rank. Collective; as many values everywhere."""
    message = np.array(values, np.int64)
    with exchange.post(np.tile(message, exchange.world_size)) as received:
        return [int(value) for value in np.max([np.asarray(part) for part in received], axis=0)]
