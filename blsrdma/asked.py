"""One ask of a Lookup, from ask() until its bags are pooled: `Asked`, and where the pooled rows go."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blsrdma.errors import BagsError
from blsrdma.lookup_tables import address, is_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from blsrdma.lookup import Lookup
    from blsrdma.lookup_tables import Bags, TableFacts

    Out: TypeAlias = NDArray[np.float32] | torch.Tensor


class Asked:
    """The bags of one ask. The results live where they were put, for as long as the caller wants."""

    __slots__ = ("_bags", "_lookup", "_results", "_settled", "dropped", "number", "version")

    def __init__(self, lookup: Lookup, number: int, version: int, bags: Sequence[Bags], results: Any) -> None:
        self._lookup = lookup
        self._bags = bags  # kept alive: the lookup reads them until the ask is complete
        self._results = results
        self._settled = False
        self.dropped = False  # the caller does not want it any more
        self.number = number
        self.version = version  # of the tables, which answers all of it

    def ready(self) -> bool:
        """Whether all bags are pooled, or an owner has failed, so that wait() need not wait."""
        if self._settled:
            return True
        self._lookup._usable()
        return bool(self._lookup._core.ready(self.number))

    def wait(self, timeout: float | None = None) -> Any:
        """The pooled rows, float32 [bags, dim], a list of one array or tensor for each of the `bags` asked, in their
        order; where `out` was one array for all, that one.

        Raises PeerTimeout at the deadline, naming the owners that have not answered (the wait may be repeated);
        PeerFailed, PeerLeft or WindowCorrupt for an owner that this ask needs; LookupRefused.
        """
        if self._settled:
            return self._results
        lookup = self._lookup
        lookup._usable()
        outcome = lookup._core.wait(self.number, lookup._ns(timeout))
        if outcome:
            raise lookup._error(outcome)
        self._settled = True
        lookup._forget(self)
        return self._results

    def release(self) -> None:
        """The results are not wanted (any more). Until the ask is complete their memory stays in use all the same."""
        self.dropped = True
        if not self._settled:
            self._lookup._forget(self)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table's pooled rows go: an address, floats from one bag to the next, and the array itself."""

    address: int
    stride: int
    result: Any


def places(bags: Sequence[Bags], out: Sequence[Out | None] | None, tables: Mapping[int, TableFacts]) -> list[Place]:
    """A place for each of `bags`: as given in `out`, or in memory made for all that have none. Raises BagsError."""
    if out is not None and len(out) != len(bags):
        raise BagsError(f"out has {len(out)} places for {len(bags)} tables", bags[0].table if bags else 0)
    shapes = []
    for each in bags:
        facts = tables.get(each.table)
        if facts is None:
            raise BagsError(f"table {each.table}: no rank has it", each.table)
        shapes.append((max(0, len(each.offsets) - 1), facts.dim))
    given = list(out) if out is not None else [None] * len(bags)
    sizes = [0 if place is not None else count * dim for place, (count, dim) in zip(given, shapes, strict=True)]
    memory: Any = _memory(sum(sizes), bags)
    starts = accumulate(sizes, initial=0)
    found = []
    for each, place, shape, start in zip(bags, given, shapes, starts, strict=False):
        if place is None:
            result = memory[start : start + shape[0] * shape[1]].reshape(shape)
            found.append(Place(address(result), shape[1], result))
        else:
            found.append(Place(address(place), _stride(place, shape, each.table), place))
    return found


def slices(bags: Sequence[Bags], out: Any) -> list[Any]:
    """One place for each of `bags` in one array for all. Raises BagsError."""
    if len(getattr(out, "shape", ())) != 3 or out.shape[1] != len(bags):
        shape = list(getattr(out, "shape", ()))
        what = f"{type(out).__name__} {shape}"
        raise BagsError(
            f"out must be one array [bags, {len(bags)}, dim] or a sequence of {len(bags)}, not {what}",
            bags[0].table if bags else 0,
        )
    return [out[:, t] for t in range(len(bags))]


def _memory(floats: int, bags: Sequence[Bags]) -> Out:
    """Of the kind of the indices."""
    if bags and is_tensor(bags[0].indices):
        import torch

        return torch.empty(floats, dtype=torch.float32)
    return np.empty(floats, np.float32)


def _stride(place: Out, shape: tuple[int, int], table: int) -> int:
    kind = str(place.dtype).removeprefix("torch.")
    if kind != "float32" or tuple(place.shape) != shape:
        raise BagsError(
            f"table {table}: out is {kind} {list(place.shape)}, where float32 {list(shape)} is needed", table
        )
    if isinstance(place, np.ndarray):
        strides = tuple(stride // 4 for stride in place.strides)
        writable = bool(place.flags.writeable)
    else:
        strides, writable = place.stride(), place.device.type == "cpu"
    if not writable or (shape[1] > 1 and strides[1] != 1) or (shape[0] > 1 and strides[0] < shape[1]):
        raise BagsError(f"table {table}: the rows of out must be contiguous, apart and writable", table)
    return max(int(strides[0]), shape[1])
