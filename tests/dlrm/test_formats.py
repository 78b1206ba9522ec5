"""Every format that is read: a round trip or a fixture whose values are known, and the real samples where they are."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.data import TERABYTE_ROWS, criteo_rows, guess, open_source
from dlrm.data.aliccp import AliCsv, AliMultihot, AliRaw
from dlrm.data.batch import Batch, join
from dlrm.data.criteo import CriteoFile
from dlrm.data.mlperf import MlperfBinary, NpyDays
from dlrm.data.processed import ProcessedNpz
from dlrm.data.traces import Traces
from dlrm.errors import DataError, OptionError
from dlrm.options import parse
from tests.dlrm.examples import HOTNESS, N, ali_csv, ali_raw, arrays, days, mlperf_binary


def whole(source: Any, batch_size: int = 7) -> Batch:
    """All samples of a source, read in small batches."""
    return join(list(source.batches(batch_size, 0)))


def assert_holds(got: Batch, dense: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> None:
    assert got.labels is not None
    np.testing.assert_array_equal(got.dense.numpy(), dense)
    np.testing.assert_array_equal(np.stack([indices.numpy() for indices in got.indices], axis=1), rows)
    np.testing.assert_array_equal(got.labels.numpy(), labels.reshape(-1))
    assert all(torch.equal(offsets, torch.arange(N + 1)) for offsets in got.offsets)


def logarithms(integers: np.ndarray) -> np.ndarray:
    return np.log1p(np.maximum(integers, 0).astype(np.float64)).astype(np.float32)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_the_processed_npz_of_the_reference(tmp_path: Path, save: Any, order: Any, dtype: Any) -> None:
    values = arrays()
    changed = {
        name: np.asarray(value, dtype if name == "X_cat" else None, order=order) for name, value in values.items()
    }
    save(tmp_path / "kaggle_processed.npz", **changed)
    source = open_source(parse(["--processed-data-file", str(tmp_path / "kaggle_processed.npz")]))
    assert isinstance(source, ProcessedNpz)
    assert source.table_rows == (90,) * 26
    assert_holds(whole(source), logarithms(values["X_int"]), values["X_cat"], values["y"])
    assert whole(ProcessedNpz(tmp_path / "kaggle_processed.npz", None, 50)).indices[3].max() < 50


def test_an_npz_that_is_not_processed_criteo(tmp_path: Path) -> None:
    values = arrays()
    for change, says in (
        ({"X_int": None}, "has no array X_int, but"),
        ({"y": values["y"][:-1]}, r"have \[50, 50, 49\] rows"),
        ({"X_cat": values["X_cat"][:, :25]}, "wanted 13 and 26 columns"),
        ({"y": np.array([None] * N)}, "y.npy is object"),
    ):
        chosen: dict[str, Any] = {name: value for name, value in (values | change).items() if value is not None}
        np.savez(tmp_path / "bad.npz", **chosen)
        with pytest.raises(DataError, match=says):
            ProcessedNpz(tmp_path / "bad.npz", None, -1)
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(DataError, match="cannot be opened as .npz"):
        ProcessedNpz(tmp_path / "text.npz", None, -1)


def test_the_binary_of_mlperf(tmp_path: Path) -> None:
    values = arrays()
    mlperf_binary(tmp_path / "train_data.bin", values)
    assert (tmp_path / "train_data.bin").stat().st_size == N * 160
    options = ["--raw-data-file", str(tmp_path / "train_data.bin"), "--max-ind-range", "-1"]
    assert open_source(parse(options)).table_rows == TERABYTE_ROWS
    np.savez(tmp_path / "terabyte_processed_fea_count.npz", counts=values["counts"])
    source = open_source(parse(options))
    assert isinstance(source, MlperfBinary)
    assert source.table_rows == (90,) * 26
    assert_holds(whole(source), logarithms(values["X_int"]), values["X_cat"], values["y"])
    with (tmp_path / "train_data.bin").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match="has 8001 bytes, wanted samples of 160 bytes"):
        open_source(parse(options))


def test_the_days_of_torchrec(tmp_path: Path) -> None:
    wanted = days(tmp_path, False)
    rows = (80,) * 26
    got = whole(NpyDays(tmp_path, rows, -1), 32)
    for number, values in enumerate(wanted):
        day = got.slice(number * N, (number + 1) * N)
        assert_holds(day, values["dense"], values["X_cat"] % 80, values["y"])
    assert int(got.indices[0][0]) == 75
    assert whole(NpyDays(tmp_path / "day_10_dense.npy", rows, -1)).size == N
    np.save(tmp_path / "day_9_sparse.npy", wanted[0]["X_cat"][:-1])
    with pytest.raises(DataError, match=r"day_9_sparse.npy: is \(49, 26\), wanted \(50, 26\)"):
        whole(NpyDays(tmp_path, rows, -1))


def test_the_multi_hot_days_of_mlperf(tmp_path: Path) -> None:
    wanted = days(tmp_path, True)
    source = open_source(parse(["--raw-data-file", str(tmp_path), "--arch-embedding-size", "-".join(["80"] * 26)]))
    assert isinstance(source, NpyDays)
    got = whole(source, 33)
    for table, hot in enumerate(HOTNESS):
        rows = np.concatenate([values["hot"][table] for values in wanted])
        np.testing.assert_array_equal(got.indices[table].numpy().reshape(-1, hot), rows)
        assert torch.equal(got.offsets[table], torch.arange(2 * N + 1) * hot)
    np.testing.assert_array_equal(got.dense.numpy(), np.concatenate([values["dense"] for values in wanted]))


def test_the_csv_of_ali_ccp(tmp_path: Path) -> None:
    source = open_source(parse(["--raw-data-file", str(ali_csv(tmp_path / "ali_ccp.csv")), "--max-ind-range", "64"]))
    assert isinstance(source, AliCsv)
    got = whole(source, 2)
    assert got.labels is not None
    assert got.labels.tolist() == [0, 1, 0]
    assert [int(indices[2]) for indices in got.indices] == [(200 + t) % 64 for t in range(23)]
    assert int(got.indices[2][1]) == 3
    np.testing.assert_array_equal(got.dense[2].numpy(), np.array([2 + d / 10 for d in range(8)], np.float32))
    with pytest.raises(DataError, match=r"line 3, field 122: 'x' is not a number"):
        whole(AliCsv(ali_csv(tmp_path / "bad.csv", bad="x"), (64,) * 23))
    with pytest.raises(DataError, match=r"line 4: 32 fields, wanted 33"):
        whole(AliCsv(ali_csv(tmp_path / "short.csv", short=True), (64,) * 23))
    (tmp_path / "other.csv").write_text("click,purchase\n")
    with pytest.raises(DataError, match="has no column 101, 121"):
        AliCsv(tmp_path / "other.csv", (64,) * 23)
    with pytest.raises(OptionError, match="--arch-embedding-size"):
        open_source(parse(["--raw-data-file", str(tmp_path / "ali_ccp.csv"), "--max-ind-range", "-1"]))


def test_the_multi_hot_text_of_ali_ccp(tmp_path: Path) -> None:
    path = tmp_path / "aliccp_multihot.txt.gz"
    path.write_bytes(gzip.compress(b"1,1,0,101:7,150_14:70,150_14:5\n2,0,0,150_14:3\n3,0,0\n"))
    source = open_source(parse(["--raw-data-file", str(path), "--max-ind-range", "64"]))
    assert isinstance(source, AliMultihot)
    got = whole(source, 2)
    assert got.labels is not None
    assert got.labels.tolist() == [1, 0, 0]
    assert (got.indices[0].tolist(), got.offsets[0].tolist()) == ([7], [0, 1, 1, 1])
    assert (got.indices[22].tolist(), got.offsets[22].tolist()) == ([6, 5, 3], [0, 2, 3, 3])
    np.testing.assert_allclose(got.dense[:, 0].numpy(), np.log1p([3, 1, 0]), rtol=1e-6)
    for text, says in (
        (b"1,2,0\n", "line 1, field click: '2' is not a click"),
        (b"1,1,0\n1,1,0,9:1\n", "line 2, field feature: '9' is not a field"),
        (b"1,1,0,101:x\n", "field 101: 'x, 1' is not an id and a value"),
    ):
        path.write_bytes(text)
        with pytest.raises(DataError, match=says):
            whole(source)


def test_the_raw_files_of_ali_ccp(tmp_path: Path) -> None:
    own = ali_raw(tmp_path)
    source = open_source(parse(["--raw-data-file", str(tmp_path), "--max-ind-range", "64"]))
    assert isinstance(source, AliRaw)
    got = whole(source, 2)
    assert got.labels is not None
    assert got.weights is not None
    assert got.labels.tolist() == [1, 0, 0]
    assert (got.indices[18].tolist(), got.offsets[18].tolist()) == ([1, 1], [0, 1, 2, 2])
    assert (got.indices[22].tolist(), got.offsets[22].tolist()) == ([6, 5, 6, 5], [0, 2, 2, 4])
    assert got.weights[22].tolist() == [0.25, 2.0, 0.25, 2.0]
    assert (got.indices[9].tolist(), got.weights[9].tolist()) == ([4], [3.0])
    skeleton = tmp_path / "sample_skeleton_train.csv"
    for line, says in (
        ("1,1,0,xyz,0,\n", "common feature index: 'xyz' is not in common_features_train.csv"),
        (f"1,1,0,abc,2,{own}\n", "number of features: '2' but there are 1"),
        ("1,1,0\n", "line 1: 3 fields, wanted 6"),
    ):
        skeleton.write_text(line)
        with pytest.raises(DataError, match=says):
            whole(source)


def test_traces(tmp_path: Path) -> None:
    (tmp_path / "a_trace.txt").write_text("".join(f"{i * i}\n" for i in range(25)))
    (tmp_path / "b_trace.log").write_text(", ".join(map(str, range(30))) + "\n")
    files = f"{tmp_path / 'a_trace.txt'},{tmp_path / 'b_trace.log'}"
    options = parse(["--raw-data-file", files, "--num-indices-per-lookup", "2-3", "--arch-embedding-size", "600-30"])
    source = open_source(options)
    assert isinstance(source, Traces)
    got = whole(source, 4)
    assert got.size == 10  # of b: a would have given 12
    assert got.labels is None
    assert got.indices[0].tolist() == [i * i for i in range(20)]
    assert got.indices[1].tolist() == list(range(30))
    assert got.offsets[1].tolist() == list(range(0, 31, 3))
    assert next(iter(source.batches(4, 1))).size == 4
    (tmp_path / "a_trace.txt").write_text("1\n2\nx\n")
    with pytest.raises(DataError, match="line 3: 'x' is not a row number"):
        whole(source)


def test_what_a_name_says() -> None:
    names = {
        "train.txt": "kaggle", "day_0.gz": "kaggle", "a_processed.npz": "kaggle", "train_data.bin": "terabyte",
        "day_0_dense.npy": "terabyte", "ali_ccp_train_sample.csv": "aliccp", "aliccp_multihot.txt": "aliccp-multihot",
        "sample_skeleton_train.csv": "aliccp-raw", "trace.log": "trace", "meta_reuse_low_500K.txt.gz": "trace",
    }  # fmt: skip
    assert {name: guess(name) for name in names} == names


def test_long_integers_and_odd_characters_parse_as_they_do_one_by_one(tmp_path: Path) -> None:
    """The block parser against Python's own numbers, over values of every length."""
    random = np.random.default_rng(5)
    lines, integers, categories = [], [], []
    for _ in range(400):
        own = [int(random.integers(0, 10 ** int(random.integers(1, 18)))) for _ in range(13)]
        ids = [int(random.integers(0, 16 ** int(random.integers(1, 9)))) for _ in range(26)]
        style = "{:x}" if random.random() < 0.5 else "{:08X}"
        lines.append("\t".join(["1", *map(str, own), *map(style.format, ids)]))
        integers.append(own)
        categories.append(ids)
    (tmp_path / "f").write_text("\n".join(lines))  # without a line end after the last
    got = whole(CriteoFile(tmp_path / "f", (2**32,) * 26), 64)
    np.testing.assert_array_equal(got.dense.numpy(), np.log1p(np.array(integers, np.float64)).astype(np.float32))
    np.testing.assert_array_equal(np.stack([i.numpy() for i in got.indices], 1), np.array(categories))


@pytest.mark.parametrize("bad", ["g", ":", "@", "`", "\x10", "/", "G", "o", " ", "-", "é"])
@pytest.mark.parametrize("column", [0, 5, 13, 14, 39])
def test_no_other_character_passes_for_a_digit(tmp_path: Path, bad: str, column: int) -> None:
    fields = ["1"] * 40
    fields[column] = f"1{bad}" if column else bad
    (tmp_path / "f").write_text("\t".join(["1"] * 40) + "\n" + "\t".join(fields) + "\n", encoding="utf-8")
    source = CriteoFile(tmp_path / "f", criteo_rows(100)).batches(1, 0)
    assert next(source).size == 1
    with pytest.raises(DataError, match="line 2"):
        next(source)


# Real samples: rows, and first rows.


def sample(test_data: Path, name: str) -> str:
    if not (test_data / name).is_file():
        pytest.skip(f"{name} is not in BLSRDMA_TEST_DATA")
    return str(test_data / name)


@pytest.mark.parametrize(("part", "rows"), [("train", 100), ("val", 50), ("test", 50)])
def test_the_samples_of_ali_ccp(test_data: Path, part: str, rows: int) -> None:
    got = whole(AliCsv(sample(test_data, f"ali_ccp_{part}_sample.csv"), (1000,) * 23))
    assert got.size == rows
    first = {"train": ([0, 1, 0.07556]), "val": ([0, 56, 0.4243]), "test": ([65, 84, 0.1754])}[part]
    assert [int(got.indices[9][0]), int(got.indices[11][0])] == first[:2]
    assert float(got.dense[0, 4]) == np.float32(first[2])


def test_the_multi_hot_sample_of_ali_ccp(test_data: Path) -> None:
    got = whole(AliMultihot(sample(test_data, "aliccp_multihot_10.txt.gz"), (1000,) * 23), 4)
    assert got.size == 10
    assert got.indices[12][:4].tolist() == [1, 2, 3, 879 - 2]  # field 210: three ids of the first sample
    lengths = sum(offsets.diff() for offsets in got.offsets)
    assert isinstance(lengths, torch.Tensor)
    assert (int(lengths.min()), int(lengths.max()), int(lengths.sum())) == (876, 888, 8795)
    assert int(got.offsets[19][-1]) == 1170  # 109_14


@pytest.mark.parametrize(
    ("name", "rows", "first"), [("low", 379_910, [399535, 452449]), ("medium", 429_951, [31650, 359284])]
)
def test_the_traces_of_meta(test_data: Path, name: str, rows: int, first: list[int]) -> None:
    got = whole(Traces([sample(test_data, f"meta_reuse_{name}_500K.txt.gz")], 1, (500_000,), (1,), 1), 100_000)
    assert got.size == rows
    assert got.indices[0][: len(first)].tolist() == first
    assert int(got.indices[0].max()) < 500_000


def test_the_trace_of_the_reference(test_data: Path) -> None:
    got = whole(Traces([sample(test_data, "trace.log")], 1, (7,), (1,), 1))
    assert got.indices[0].tolist() == [1, 2, 3, 4, 5, 3, 4, 1, 1, 6, 3]
