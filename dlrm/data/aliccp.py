r"""Ali-CCP, in the three forms it is found in; a table for each of its 23 fields, the click as the label.

* `AliCsv`: click, purchase, 23 fields and 8 dense columns D..., with a line of names;
* `AliMultihot`: id,click,conversion,field:id,field:id...: bags of any length;
* `AliRaw`: a folder with sample_skeleton*.csv and common_features*.csv. A line of the first is sample id, click,
  conversion, common feature index, number, features; of the second index, number, features. Features are apart by
  \x01, each is field \x02 id \x03 value. The common features of a sample come after its own. Values are the weights of
  the rows.

Ids are taken modulo the table. The two text forms have no dense features: theirs is one, log(1 + ids of the sample).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data.batch import Batch, recut
from dlrm.data.columns import one_hot
from dlrm.data.streams import open_text, whole_lines
from dlrm.data.uniform import bounds
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

FIELDS = (
    "101", "121", "122", "124", "125", "126", "127", "128", "129", "205", "206", "207", "210", "216", "508", "509",
    "702", "853", "301", "109_14", "110_14", "127_14", "150_14",
)  # fmt: skip
DENSE = ("D109_14", "D110_14", "D127_14", "D150_14", "D508", "D509", "D702", "D853")
_TABLE = {field: table for table, field in enumerate(FIELDS)}
_SAMPLES = 512  # of ragged bags in a chunk


class AliCsv:
    """The CSV form as a data set with one-row bags; columns are found by their names."""

    dense_features = len(DENSE)

    def __init__(self, path: str | Path, rows: tuple[int, ...]) -> None:
        self.path, self.table_rows = Path(path), _checked(path, rows)
        with open_text(path) as stream:
            names = next(csv.reader([stream.readline().decode("utf-8", "replace")]), [])
        if missing := [name for name in ("click", *FIELDS, *DENSE) if name not in names]:
            raise DataError(path, f"has no column {', '.join(missing)}", line=1)
        self._names = names
        self._columns = [names.index(name) for name in ("click", *FIELDS, *DENSE)]

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`. Raises DataError at the first malformed line, naming line and field."""
        return recut(self._chunks(), batch_size, num_batches)

    def _chunks(self) -> Iterator[Batch]:
        sizes = np.array(self.table_rows)[:, None]
        for number, data in whole_lines(self.path):
            lines = data.split(b"\n")[number == 1 : -1]
            first = number + (number == 1)
            if not lines:
                continue
            try:
                table = np.loadtxt(lines, delimiter=",", ndmin=2, usecols=self._columns, comments=None)
            except ValueError as error:
                raise self._malformed(lines, first) from error
            if len(table) != len(lines):
                raise self._malformed(lines, first)
            rows = table[:, 1 : 1 + len(FIELDS)].T.astype(np.int64) % sizes
            yield one_hot(table[:, 1 + len(FIELDS) :].astype(np.float32), rows, table[:, 0])

    def _malformed(self, lines: list[bytes], first: int) -> DataError:
        for position, line in enumerate(lines):
            words = line.decode("utf-8", "replace").rstrip("\r").split(",")
            if len(words) != len(self._names):
                problem = f"{len(words)} fields, wanted {len(self._names)}"
                return DataError(self.path, problem, line=first + position)
            for name, word in zip(self._names, words, strict=True):
                try:
                    float(word)
                except ValueError:
                    return DataError(self.path, "is not a number", line=first + position, field=name, value=word)
        return DataError(self.path, "cannot be parsed", line=first)


class _Ragged:
    """Samples with bags of any length, one after another."""

    def __init__(self, rows: tuple[int, ...], weighted: bool) -> None:
        self._rows, self._weighted = rows, weighted
        self._ids: list[list[int]] = [[] for _ in rows]
        self._values: list[list[float]] = [[] for _ in rows]
        self._lengths: list[list[int]] = [[] for _ in rows]
        self._labels: list[int] = []

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, label: int, features: list[tuple[int, int, float]]) -> None:
        """A sample of (table, id, value)."""
        before = [len(ids) for ids in self._ids]
        for table, identity, value in features:
            self._ids[table].append(identity % self._rows[table])
            self._values[table].append(value)
        for lengths, ids, start in zip(self._lengths, self._ids, before, strict=True):
            lengths.append(len(ids) - start)
        self._labels.append(label)

    def batch(self) -> Batch:
        """All of them."""
        lengths = np.array(self._lengths, np.int64)
        dense = np.log1p(lengths.sum(axis=0, dtype=np.float64)).astype(np.float32)[:, None]
        return Batch(
            0,
            torch.from_numpy(dense),
            tuple(torch.tensor(ids, dtype=torch.int64) for ids in self._ids),
            tuple(bounds(row) for row in lengths),
            torch.tensor(self._labels, dtype=torch.float32),
            tuple(torch.tensor(values, dtype=torch.float32) for values in self._values) if self._weighted else None,
        )


class AliMultihot:
    """The multi-hot text form."""

    dense_features = 1

    def __init__(self, path: str | Path, rows: tuple[int, ...]) -> None:
        self.path, self.table_rows = Path(path), _checked(path, rows)
        with open_text(path):
            pass

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`. Raises DataError at the first malformed line, naming line and field."""
        return recut(self._chunks(), batch_size, num_batches)

    def _chunks(self) -> Iterator[Batch]:
        held = _Ragged(self.table_rows, weighted=False)
        for first, data in whole_lines(self.path):
            for position, line in enumerate(data.splitlines()):
                number = first + position
                words = line.decode("utf-8", "replace").split(",")
                if len(words) < 3:
                    raise DataError(self.path, f"{len(words)} fields, wanted id, click, conversion", line=number)
                features = [self._feature(word, number) for word in words[3:]]
                held.add(_click(self.path, words[1], number), features)
                if len(held) == _SAMPLES:
                    yield held.batch()
                    held = _Ragged(self.table_rows, weighted=False)
        if len(held):
            yield held.batch()

    def _feature(self, word: str, line: int) -> tuple[int, int, float]:
        field, _, identity = word.partition(":")
        return _feature(self.path, line, field, identity, "1")


class AliRaw:
    """The raw form: skeletons stream, common features are found by an index of where their lines are."""

    dense_features = 1

    def __init__(self, path: str | Path, rows: tuple[int, ...]) -> None:
        self.path, self.table_rows = Path(path), _checked(path, rows)
        folder = self.path if self.path.is_dir() else self.path.parent
        skeletons = sorted(folder.glob("sample_skeleton*")) if self.path.is_dir() else [self.path]
        commons = sorted(folder.glob("common_features*"))
        if len(skeletons) != 1 or not commons:
            raise DataError(path, f"has {len(skeletons)} sample_skeleton* and {len(commons)} common_features* files")
        self._skeleton = skeletons[0]
        same = [name for name in commons if name.name.removeprefix("common_features") == skeletons[0].name[15:]]
        self._common = (same or commons)[0]
        self._places: dict[bytes, int] = {}
        with self._common.open("rb") as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise DataError(self._common, "is compressed: its lines are looked up, so unpack it first")
            stream.seek(0)
            at = 0
            for line in stream:
                self._places[line.split(b",", 1)[0]] = at
                at += len(line)

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`. Raises DataError at the first malformed line, naming line and field."""
        return recut(self._chunks(), batch_size, num_batches)

    def _chunks(self) -> Iterator[Batch]:
        held = _Ragged(self.table_rows, weighted=True)
        latest: tuple[str, list[tuple[int, int, float]]] = ("", [])  # neighbours mostly share their common features
        with self._common.open("rb") as common:
            for first, data in whole_lines(self._skeleton):
                for position, line in enumerate(data.rstrip(b"\n").split(b"\n")):
                    number = first + position
                    words = line.decode("utf-8", "replace").rstrip("\r").split(",")
                    if len(words) != 6:
                        raise DataError(self._skeleton, f"{len(words)} fields, wanted 6", line=number)
                    if latest[0] != words[3]:
                        latest = words[3], self._shared(common, words[3], number)
                    own = self._features(self._skeleton, words[4], words[5], number)
                    held.add(_click(self._skeleton, words[1], number), own + latest[1])
                    if len(held) == _SAMPLES:
                        yield held.batch()
                        held = _Ragged(self.table_rows, weighted=True)
        if len(held):
            yield held.batch()

    def _shared(self, common: object, key: str, line: int) -> list[tuple[int, int, float]]:
        place = self._places.get(key.encode())
        if place is None:
            problem = f"is not in {self._common.name}"
            raise DataError(self._skeleton, problem, line=line, field="common feature index", value=key)
        common.seek(place)  # type: ignore[attr-defined]
        words = common.readline().decode("utf-8", "replace").rstrip("\r\n").split(",")  # type: ignore[attr-defined]
        if len(words) != 3:
            raise DataError(self._common, f"{len(words)} fields of {key}, wanted 3")
        return self._features(self._common, words[1], words[2], None)

    def _features(self, file: Path, count: str, text: str, line: int | None) -> list[tuple[int, int, float]]:
        found = []
        for word in text.split("\x01") if text else []:
            field, _, rest = word.partition("\x02")
            identity, _, value = rest.partition("\x03")
            found.append(_feature(file, line, field, identity, value))
        if str(len(found)) != count:
            raise DataError(file, f"but there are {len(found)}", line=line, field="number of features", value=count)
        return found


def _checked(path: str | Path, rows: tuple[int, ...]) -> tuple[int, ...]:
    if len(rows) != len(FIELDS):
        raise DataError(path, f"Ali-CCP has {len(FIELDS)} fields, the model {len(rows)} tables")
    return rows


def _click(file: Path, word: str, line: int) -> int:
    if word not in ("0", "1"):
        raise DataError(file, "is not a click (0 or 1)", line=line, field="click", value=word)
    return int(word)


def _feature(file: Path, line: int | None, field: str, identity: str, value: str) -> tuple[int, int, float]:
    if field not in _TABLE:
        raise DataError(file, "is not a field of Ali-CCP", line=line, field="feature", value=field)
    try:
        return _TABLE[field], int(identity), float(value)
    except ValueError:
        raise DataError(
            file, "is not an id and a value", line=line, field=field, value=f"{identity}, {value}"
        ) from None
