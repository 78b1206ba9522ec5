"""The pooled lookup's kernel on the simulated device: the CPU kernels' bits, whatever the shapes and what is hot."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from blsrdma.errors import BagsError, SettingsError
from blsrdma.gpu import pooling
from blsrdma.gpu.pooling import NOTED, GpuBags, GpuTable, PooledLookup, bags_per_group, bytes_moved, shape
from blsrdma.lookup_tables import Bags, RowFormat, Rows
from dlrm.data.batch import Batch
from dlrm.placement import Piece
from dlrm.shape import ModelShape
from dlrm.tables import Tables
from tests.gpu.memory import OnDevice
from tests.lookup.bags import FORMATS, draw, pooled, rows, same_bits

SAMPLES = 11


def together(on: OnDevice, bags: list[Bags], samples: int, relative: bool) -> GpuBags:
    """The bags of several tables on the device: with offsets over all of them, or with those of each table."""
    counts = [len(each.indices) for each in bags]
    firsts = np.cumsum([0, *counts[:-1]])
    offsets = [np.asarray(each.offsets) for each in bags]
    joined = [*(each[:-1] + first for each, first in zip(offsets, firsts, strict=True)), [sum(counts)]]
    weighted = bags[0].weights is not None
    return GpuBags(
        samples,
        on.put(np.concatenate([np.asarray(each.indices) for each in bags])),
        sum(counts),
        on.put(np.concatenate(offsets if relative else joined)),
        samples + 1 if relative else samples,
        on.put(firsts) if relative else 0,
        on.put(np.concatenate([np.asarray(each.weights) for each in bags])) if weighted else 0,
    )


def resident(
    on: OnDevice, number: int, table: Rows, hot: str, rng: np.random.Generator, mean: bool = False
) -> GpuTable:
    """A table with all rows hot, the first few, or some through a map; the others' memory holds nothing of use."""
    data = np.asarray(table.data)
    count = len(data)
    if hot == "all":
        return GpuTable(number, count, on.put(data), mean=mean)
    some = count // 3
    if hot == "none":
        return GpuTable(number, count, 0, 0, cold=on.put_on_host(data), mean=mean)
    if hot == "first":
        cold = data.copy().view(np.uint8)
        cold[:some] = 0xFF
        return GpuTable(number, count, on.put(data[:some]), some, cold=on.put_on_host(cold), mean=mean)
    chosen = rng.permutation(count)[:some]
    slots = np.full(count, -1, np.int32)
    slots[chosen] = np.arange(some)
    cold = data.copy().view(np.uint8)
    cold[chosen] = 0xFF
    return GpuTable(number, count, on.put(data[chosen]), some, on.put_on_host(cold), on.put(slots), mean=mean)


def messages(on: OnDevice, starts: list[int], tables: int, dim: int, offset: int = 0) -> list[int]:
    """Room for a message to each destination, filled with what no sum is."""
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    return [on.put(torch.full((count * tables * dim,), torch.nan), offset) for count in counts]


def gathered(on: OnDevice, to: list[int], starts: list[int], tables: int, dim: int) -> torch.Tensor:
    """All messages one after another, [samples, tables, dim]."""
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    return torch.cat([on.floats(at, count, tables, dim) for at, count in zip(to, counts, strict=True)])


def wanted_of(tables: list[Rows], bags: list[Bags], means: list[bool]) -> torch.Tensor:
    """The same by the CPU."""
    return torch.stack([pooled(*each) for each in zip(tables, bags, means, strict=True)], 1)


@pytest.mark.parametrize("format_", FORMATS)
def test_the_cpus_bits(on: OnDevice, format_: RowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format, with weights and without, sums and means, dims of all code paths, hot rows and cold ones; bags that
    a group of lanes has for itself, and stretches of several."""
    check_bits(on, format_, (4, 12, 36, 64, 128, 200), monkeypatch)
    if format_ == "fp32":
        check_bits(on, format_, (6, 42), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("format_", [format_ for format_ in FORMATS if format_ != "fp32"])
def test_other_dims(on: OnDevice, format_: RowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Element by element: kernels that take g++ a second each."""
    check_bits(on, format_, (6, 42, 130), monkeypatch)


def check_bits(on: OnDevice, format_: RowFormat, dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    starts = [0, 0, 3, 8, 8, SAMPLES]
    choices = itertools.cycle(["all", "first", "map", "none"])
    cases = itertools.product(dims, (False, True))
    for (dim, weighted), (warps, longest) in zip(cases, itertools.cycle(((1, 12), (1, 3), (8192, 12))), strict=False):
        monkeypatch.setattr(pooling, "WARPS_WANTED", warps)
        tables = [rows(t, int(rng.integers(1, 60)), dim, format_) for t in range(3)]
        bags = [draw(rng, t, len(table.data), SAMPLES, longest, weighted) for t, table in enumerate(tables)]
        means = [bool(rng.integers(2)) for _ in tables]
        lookup = PooledLookup(
            on.device,
            [resident(on, t, table, next(choices), rng, means[t]) for t, table in enumerate(tables)],
            dim, format_,
        )  # fmt: skip
        to = messages(on, starts, len(tables), dim)
        number = lookup.launch(together(on, bags, SAMPLES, bool(rng.integers(2))), to, starts)
        found = gathered(on, to, starts, len(tables), dim)
        lookup.check(number)
        assert same_bits(found, wanted_of(tables, bags, means)), (dim, weighted, means)
        lookup.close()


def test_long_bags_and_empty_ones(on: OnDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bags of hundreds of rows next to empty ones, in warps that several groups share; a table of one row."""
    monkeypatch.setattr(pooling, "WARPS_WANTED", 1)
    for dim in (16, 128):
        lengths = np.array([0, 300, 0, 0, 1, 65, 0, 31, 32, 33, 0])
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        rng = np.random.default_rng(dim)
        tables = [rows(0, 1, dim, "fp32"), rows(1, 500, dim, "fp32")]
        bags = [
            Bags(t, torch.from_numpy(rng.integers(0, n, int(offsets[-1]))), offsets) for t, n in enumerate((1, 500))
        ]
        lookup = PooledLookup(on.device, [resident(on, t, table, "all", rng) for t, table in enumerate(tables)], dim)
        to = messages(on, [0, len(lengths)], 2, dim)
        lookup.check(lookup.launch(together(on, bags, len(lengths), False), to, [0, len(lengths)]))
        found = gathered(on, to, [0, len(lengths)], 2, dim)
        assert same_bits(found, wanted_of(tables, bags, [False, False]))


def test_values_that_are_no_numbers(on: OnDevice) -> None:
    """Infinities, subnormal numbers and -0 as on the CPU; NaN where it has NaN."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -1e-45, 65504.0, 6e-8, 3e38, 1.0, torch.nan])
    count = len(special)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    for dtype in (torch.float32, torch.float16):
        table = Rows(special[:, None].expand(count, 8).to(dtype).contiguous())
        format_: RowFormat = "fp32" if dtype == torch.float32 else "fp16"
        bags = Bags(0, pairs.reshape(-1), torch.arange(0, 2 * len(pairs) + 1, 2))
        lookup = PooledLookup(on.device, [resident(on, 0, table, "all", np.random.default_rng())], 8, format_)
        to = messages(on, [0, len(pairs)], 1, 8)
        lookup.check(lookup.launch(together(on, [bags], len(pairs), False), to, [0, len(pairs)]))
        found, wanted = gathered(on, to, [0, len(pairs)], 1, 8)[:, 0], pooled(table, bags)
        assert same_bits(torch.nan_to_num(found, 7.0), torch.nan_to_num(wanted, 7.0))
        assert torch.equal(found.isnan(), wanted.isnan())


def test_a_rank_that_owns_tables_and_pieces(on: OnDevice) -> None:
    """What dlrm's owner of a whole table and of some rows of another one sends: the same messages."""
    model = ModelShape((50, 40, 30), 16, (4, 16), (22, 1))
    piece = range(10, 25)
    owner = Tables(model, [Piece(0), Piece(2, piece)], seed=1, pooling="mean")
    rng = np.random.default_rng(2)
    drawn = [draw(rng, t, count, SAMPLES, 9, True) for t, count in enumerate(model.table_rows)]
    batch = Batch(
        0, torch.zeros(SAMPLES, 4), tuple(torch.as_tensor(each.indices) for each in drawn),
        tuple(torch.as_tensor(each.offsets) for each in drawn),
        weights=tuple(torch.as_tensor(each.weights) for each in drawn),
    )  # fmt: skip
    stored = owner.stored()
    lookup = PooledLookup(
        on.device,
        [
            GpuTable(0, 50, on.put(stored[0]), mean=True),
            GpuTable(2, len(piece), on.put(stored[1]), first=piece.start, all_rows=30),
        ],
        16,
    )
    starts = [0, 4, 8, SAMPLES]
    to = messages(on, starts, 2, 16)
    lookup.check(lookup.launch(together(on, [drawn[0], drawn[2]], SAMPLES, True), to, starts))
    assert same_bits(gathered(on, to, starts, 2, 16), owner.lookup_all(batch))


def test_more_than_one_launch_holds(on: OnDevice) -> None:
    """More tables, and more destinations, than the arguments of one kernel; messages that others write to, too."""
    tables, samples, dim = pooling.TABLES + 3, pooling.DESTINATIONS + 5, 4
    rng = np.random.default_rng(0)
    data = [rows(t, 9, dim, "fp32") for t in range(tables)]
    bags = [draw(rng, t, 9, samples, 2, False) for t in range(tables)]
    lookup = PooledLookup(
        on.device,
        [GpuTable(t, 9, on.put(data[t].data), position=tables - t) for t in range(tables)],
        dim,
        message_tables=tables + 1,
    )
    starts = list(range(samples + 1))
    for relative in (False, True):
        to = messages(on, starts, tables + 1, dim)
        lookup.check(lookup.launch(together(on, bags, samples, relative), to, starts))
        found = gathered(on, to, starts, tables + 1, dim)
        assert found[:, 0].isnan().all()
        assert same_bits(found[:, 1:].flip(1), wanted_of(data, bags, [False] * tables))


def test_messages_that_are_not_aligned(on: OnDevice) -> None:
    """Addresses that only a float is aligned to: slower, and the same."""
    table, bags = rows(0, 20, 32, "fp32"), draw(np.random.default_rng(1), 0, 20, SAMPLES, 5, False)
    for table_offset, message_offset in ((4, 0), (0, 4)):
        lookup = PooledLookup(on.device, [GpuTable(0, 20, on.put(table.data, table_offset))], 32)
        to = messages(on, [0, SAMPLES], 1, 32, message_offset)
        lookup.check(lookup.launch(together(on, [bags], SAMPLES, False), to, [0, SAMPLES]))
        assert same_bits(gathered(on, to, [0, SAMPLES], 1, 32)[:, 0], pooled(table, bags))


@pytest.mark.parametrize("value", [20, -1, 1 << 40, -(1 << 63)])
def test_an_index_that_is_no_row(on: OnDevice, value: int) -> None:
    """It adds nothing, the other bags are whole, and the check names it; the next launch is checked by itself."""
    rng = np.random.default_rng(4)
    tables = [rows(t, 20, 8, "fp32") for t in range(2)]
    bags = [draw(rng, t, 20, SAMPLES, 5, False) for t in range(2)]
    position = len(bags[1].indices) // 2
    sample = int(np.searchsorted(np.asarray(bags[1].offsets), position, side="right")) - 1
    good = bags[1].indices[position].item()
    for relative in (False, True):
        lookup = PooledLookup(on.device, [resident(on, 5 + t, tables[t], "map", rng) for t in range(2)], 8)
        to = messages(on, [0, SAMPLES], 2, 8)
        bags[1].indices[position] = value
        bad = lookup.launch(together(on, bags, SAMPLES, relative), to, [0, SAMPLES])
        found = gathered(on, to, [0, SAMPLES], 2, 8)
        bags[1].indices[position] = good
        after = lookup.launch(together(on, bags, SAMPLES, relative), to, [0, SAMPLES])
        text = rf"table 6: index {value} at position {position} \(sample {sample}\)"
        with pytest.raises(BagsError, match=text) as error:
            lookup.check(bad)
        assert (error.value.table, error.value.position, error.value.value) == (6, position, value)
        lookup.check(after)
        lookup.check(bad)  # was said
        wanted = wanted_of(tables, bags, [False, False])
        others = [s for s in range(SAMPLES) if s != sample]
        assert same_bits(found[others], wanted[others])
        assert same_bits(found[:, 0], wanted[:, 0])


@pytest.mark.parametrize(("place", "value"), [(3, -1), (3, 1 << 40), (3, 0), (0, -5), (SAMPLES, 1 << 62)])
def test_offsets_that_are_none(on: OnDevice, place: int, value: int) -> None:
    """Nothing is read out of bounds (the simulated device would stop), and the check names a table and a position."""
    table = rows(0, 20, 8, "fp32")
    bags = draw(np.random.default_rng(3), 0, 20, SAMPLES, 5, True)
    bags.offsets[place] = value
    lookup = PooledLookup(on.device, [resident(on, 0, table, "all", np.random.default_rng())], 8)
    to = messages(on, [0, SAMPLES], 1, 8)
    number = lookup.launch(together(on, [bags], SAMPLES, True), to, [0, SAMPLES])
    with pytest.raises(BagsError, match="table 0: offset"):
        lookup.check(number)


def test_errors_that_nobody_asked_for(on: OnDevice) -> None:
    """A launch that was not checked is, before its place is used again."""
    lookup = PooledLookup(on.device, [GpuTable(0, 1, on.put(torch.ones(1, 4)))], 4)
    to = messages(on, [0, 1], 1, 4)
    one = Bags(0, torch.tensor([1]), torch.tensor([0, 1]))
    lookup.launch(together(on, [one], 1, False), to, [0, 1])
    good = together(on, [Bags(0, torch.tensor([0]), torch.tensor([0, 1]))], 1, False)
    for _ in range(NOTED - 1):
        lookup.launch(good, to, [0, 1])
    with pytest.raises(BagsError, match="index 1 at position 0"):
        lookup.launch(good, to, [0, 1])


def test_tables_that_cannot_be(on: OnDevice) -> None:
    for table, text in (
        (GpuTable(3, 10, 0), "table 3: 10 hot rows, and no address"),
        (GpuTable(3, 10, 16, 11), "11 hot rows of 10"),
        (GpuTable(3, 10, 16, 5), "there is no address of the others"),
        (GpuTable(3, 10, 16, first=5, all_rows=12), "rows 5 to 15 of 12"),
        (GpuTable(3, 10, 16, all_rows=12, mean=True), "receiver's to take"),
        (GpuTable(3, 10, 16, position=1), "position 1 of 1"),
    ):
        with pytest.raises(SettingsError, match=text):
            PooledLookup(on.device, [table], 4)
    lookup = PooledLookup(on.device, [GpuTable(0, 1, on.put(torch.ones(1, 4)))], 4)
    with pytest.raises(BagsError, match="2147483648 samples of dim 4 are too many"):
        lookup.launch(GpuBags(1 << 31, 16, 0, 16, 1 << 31), [16], [0, 1 << 31])
    bags = GpuBags(5, 0, 0, 0, 5)
    for starts in ([0, 4], [1, 5], [0, 5, 5], [0]):
        with pytest.raises(ValueError, match="starts of 1 destinations"):
            lookup.launch(bags, [16], starts)


def test_how_rows_are_cut() -> None:
    """Lanes and slices cover a row with none to spare; groups take several bags only where there are enough."""
    for dim, elements in itertools.product((1, 4, 16, 20, 64, 100, 128, 132, 1024), (1, 4)):
        if dim % elements == 0:
            lanes, slices = shape(dim, elements)
            assert lanes in (8, 16, 32)
            assert (slices - 1) * lanes * elements < dim <= slices * lanes * elements
    assert bags_per_group(20, 8192 * 26, 32, 1) == 2
    assert bags_per_group(1, 8192 * 26, 32, 1) == 26
    assert bags_per_group(1, 100, 32, 1) == 1
    assert bags_per_group(0, 1 << 30, 8, 1) == 32


def test_bytes_moved() -> None:
    """The goal's workload: 2.3 GB, nine tenths of them rows."""
    lookups, bags = 8192 * 26 * 20, 8192 * 26
    assert bytes_moved("fp32", 128, lookups, bags) == lookups * (512 + 8) + bags * (8 + 512)
    assert bytes_moved("fp32", 128, lookups, bags, distinct=1000) == 1000 * 512 + lookups * 8 + bags * 520
    assert bytes_moved("int8", 128, 10, 1, weighted=True, mapped=True) == 10 * (136 + 16) + 520
