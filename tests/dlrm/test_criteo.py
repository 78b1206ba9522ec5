from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.data import KAGGLE_ROWS, criteo_rows
from dlrm.data.criteo import CriteoFile
from dlrm.errors import DataError

ROWS = criteo_rows(1000)


def line(label: str = "1", integers: dict[int, str] | None = None, categories: dict[int, str] | None = None) -> str:
    numbers = [(integers or {}).get(i, str(i)) for i in range(1, 14)]
    hexes = [(categories or {}).get(i, f"{i * 7919:08x}") for i in range(1, 27)]
    return "\t".join([label, *numbers, *hexes])


def write(path: Path, *lines: str, end: str = "\n", compress: bool = False) -> Path:
    data = "".join(text + end for text in lines).encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_values(tmp_path: Path, compress: bool, end: str) -> None:
    rows = [
        line("1", {1: "", 2: "-3", 3: "0", 4: "99"}, {1: "", 2: "ffffffff", 3: "7"}),
        line("0"),
        line("1"),
    ]
    file = CriteoFile(write(tmp_path / "f", *rows, end=end, compress=compress), ROWS, 1000)
    first, last = file.batches(2, 0)
    assert (first.first, first.size, last.first, last.size) == (0, 2, 2, 1)
    assert first.dense.dtype == torch.float32
    wanted = np.log1p(np.array([0, 0, 0, 99, *range(5, 14)], np.float64)).astype(np.float32)
    np.testing.assert_array_equal(first.dense[0].numpy(), wanted)
    assert [int(first.indices[t][0]) for t in range(3)] == [0, 0xFFFFFFFF % 1000 % ROWS[1], 7 % ROWS[2]]
    assert all(int(indices.max()) < size for indices, size in zip(first.indices, ROWS, strict=True))
    assert first.labels is not None
    assert first.labels.tolist() == [1, 0]
    assert first.offsets[25].tolist() == [0, 1, 2]


def test_max_ind_range_is_applied_before_the_table_size(tmp_path: Path) -> None:
    path = write(tmp_path / "f", line(categories={3: "3039"}))  # 12345
    (batch,) = CriteoFile(path, (77,) * 26, 1000).batches(8, 0)
    assert int(batch.indices[2][0]) == 345 % 77
    (batch,) = CriteoFile(path, (77,) * 26, -1).batches(8, 0)
    assert int(batch.indices[2][0]) == 12345 % 77


def test_trailing_empty_fields_may_be_stripped(tmp_path: Path) -> None:
    full = [line(categories=dict.fromkeys(range(27 - n, 27), "")) for n in (0, 2, 3, 26)]
    stripped = [text.rstrip("\t") for text in full]
    assert [text.count("\t") + 1 for text in stripped] == [40, 38, 37, 14]
    (wanted,) = CriteoFile(write(tmp_path / "full", *full), ROWS).batches(8, 0)
    (got,) = CriteoFile(write(tmp_path / "stripped", *stripped), ROWS).batches(8, 0)
    assert torch.equal(got.dense, wanted.dense)
    assert all(torch.equal(a, b) for a, b in zip(got.indices, wanted.indices, strict=True))


def test_number_of_batches_is_a_limit(tmp_path: Path) -> None:
    file = CriteoFile(write(tmp_path / "f", *[line()] * 10), ROWS)
    assert [batch.size for batch in file.batches(4, 2)] == [4, 4]
    assert [batch.size for batch in file.batches(4, 0)] == [4, 4, 2]
    assert [batch.size for batch in file.batches(4, 9)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("bad", "field", "value"),
    [
        (line("2"), "1 (label)", "2"),
        (line(""), "1 (label)", ""),
        (line(integers={3: "1_0"}), "4 (I3)", "1_0"),
        (line(integers={13: "1.5"}), "14 (I13)", "1.5"),
        (line(integers={2: "9" * 19}), "3 (I2)", "9" * 19),
        (line(categories={1: "xyz"}), "15 (C1)", "xyz"),
        (line(categories={26: "123456789"}), "40 (C26)", "123456789"),
        (line(categories={5: " 12"}), "19 (C5)", " 12"),
        (line() + "\t1", None, None),
        (line() + "\t", None, None),
        ("1\t2\t3", None, None),
        ("", "1 (label)", ""),
    ],
)
def test_malformed_lines_name_file_line_and_field(
    tmp_path: Path, bad: str, field: str | None, value: str | None
) -> None:
    path = write(tmp_path / "bad.tsv", line(), line(), line(), bad, line())
    batches = CriteoFile(path, ROWS).batches(2, 0)
    next(batches)
    with pytest.raises(DataError) as caught:
        next(batches)
    error = caught.value
    assert (error.file, error.line, error.field, error.value) == (str(path), 4, field, value)
    assert f"{path}, line 4" in str(error)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened: No such file"):
        CriteoFile(tmp_path / "absent", ROWS)
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        CriteoFile(tmp_path, ROWS)
    with pytest.raises(DataError, match="has no samples"):
        list(CriteoFile(write(tmp_path / "empty"), ROWS).batches(2, 0))
    with pytest.raises(DataError, match="26 categories, the model 3 tables"):
        CriteoFile(write(tmp_path / "f", line()), (1, 2, 3))


def test_a_truncated_gzip_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "f.gz", *[line()] * 20, compress=True)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="line 2?[0-9]: cannot be read on"):
        list(CriteoFile(path, ROWS).batches(4, 0))


def test_the_genuine_file() -> None:
    path = Path(os.environ.get("BLSRDMA_TEST_DATA", "")) / "criteo_kaggle_first8000.tsv.gz"
    if not path.is_file():
        pytest.skip("BLSRDMA_TEST_DATA names no folder with criteo_kaggle_first8000.tsv.gz")
    batches = list(CriteoFile(path, criteo_rows(10_000)).batches(512, 0))
    assert sum(batch.size for batch in batches) == 8000
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    assert round(float(labels.mean()), 3) == 0.216
    integers = [1, 1, 5, 0, 1382, 4, 15, 2, 181, 1, 2, 0, 2]
    np.testing.assert_array_equal(batches[0].dense[0].numpy(), np.log1p(integers).astype(np.float32))
    assert int(batches[0].indices[0][0]) == 0x68FD1E64 % KAGGLE_ROWS[0]
    assert int(batches[0].indices[2][0]) == 0xFB936136 % 10_000


def test_the_genuine_file_with_stripped_fields() -> None:
    path = Path(os.environ.get("BLSRDMA_TEST_DATA", "")) / "criteo_trailing_stripped.txt.gz"
    if not path.is_file():
        pytest.skip("BLSRDMA_TEST_DATA names no folder with criteo_trailing_stripped.txt.gz")
    first, *others = CriteoFile(path, ROWS).batches(100, 0)
    assert sum(batch.size for batch in (first, *others)) == 1000
    integers = [1, 1, 5, 0, 1382, 4, 15, 2, 181, 1, 2, 0, 2]
    np.testing.assert_array_equal(first.dense[0].numpy(), np.log1p(integers).astype(np.float32))
    assert [int(first.indices[table][0]) for table in (0, 25)] == [0x68FD1E64 % ROWS[0], 0x9727DD16 % ROWS[25]]
    assert int(first.indices[25][2]) == 0  # stripped: the third line has 38 fields
