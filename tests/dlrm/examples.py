"""Small files of every format that is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.aliccp import DENSE, FIELDS

N = 50
HOTNESS = tuple(1 + t % 3 for t in range(26))


def arrays(seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "X_int": random.integers(-2, 1000, (N, 13), dtype=np.int32),
        "X_cat": random.integers(0, 90, (N, 26), dtype=np.int32),
        "y": random.integers(0, 2, N, dtype=np.int32),
        "counts": np.full(26, 90),
    }


def days(folder: Path, multi_hot: bool) -> list[dict[str, Any]]:
    """Two days; day_10 comes after day_9."""
    found = []
    for day in (9, 10):
        values: dict[str, Any] = arrays(day)
        values["dense"] = np.random.default_rng(day).random((N, 13), dtype=np.float32)
        np.save(folder / f"day_{day}_dense.npy", values["dense"])
        np.save(folder / f"day_{day}_labels.npy", values["y"][:, None])
        if multi_hot:
            random = np.random.default_rng(day)
            values["hot"] = [random.integers(0, 80, (N, hot), dtype=np.int32) for hot in HOTNESS]
            np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **{str(t): a for t, a in enumerate(values["hot"])})
        else:
            values["X_cat"][0, 0] = -5  # a hash that int32 cannot hold
            np.save(folder / f"day_{day}_sparse.npy", values["X_cat"])
        found.append(values)
    return found


def ali_csv(path: Path, bad: str = "3", short: bool = False) -> Path:
    names = ["click", "purchase", *FIELDS, *DENSE]
    lines = [",".join(names)]
    for sample in range(3):
        values = [
            str(sample % 2),
            "0",
            *[str(100 * sample + t) for t in range(23)],
            *[f"{sample}.{d}" for d in range(8)],
        ]
        values[4] = bad if sample == 1 else values[4]
        lines.append(",".join(values[: -1 if short and sample == 2 else None]))
    path.write_text("\n".join(lines) + "\n")
    return path


def mlperf_binary(path: Path, values: dict[str, np.ndarray]) -> None:
    np.concatenate([values["y"][:, None], values["X_int"], values["X_cat"]], axis=1).astype("<i4").tofile(path)


def ali_raw(folder: Path) -> str:
    """Three samples that share common features; the one feature of their own, as it stands in the skeleton."""
    own, shared = "301\x021\x031.0", "101\x022\x031.5\x01150_14\x0270\x030.25\x01150_14\x025\x032.0"
    (folder / "sample_skeleton_train.csv").write_text(f"1,1,0,abc,1,{own}\n2,0,0,def,1,{own}\n3,0,0,abc,0,\n")
    (folder / "common_features_train.csv").write_text(f"def,1,205\x024\x033.0\nabc,3,{shared}\n")
    return own


def all_formats(folder: Path) -> None:
    """A file of each, under the names that the README uses."""
    values = arrays()
    row = "1\t" + "\t".join(["3"] * 13) + "\t" + "\t".join(["68fd1e64"] * 26) + "\n"
    (folder / "train.txt").write_text(row * 9)
    np.savez(folder / "kaggle_processed.npz", **values)
    mlperf_binary(folder / "train_data.bin", values)
    (folder / "days").mkdir()
    days(folder / "days", multi_hot=False)
    ali_csv(folder / "ali_ccp.csv")
    (folder / "aliccp_multihot.txt").write_text("1,1,0,101:7,150_14:70,150_14:5\n2,0,0,150_14:3\n")
    (folder / "aliccp").mkdir()
    ali_raw(folder / "aliccp")
    for name in ("a_trace.txt", "b_trace.txt"):
        (folder / name).write_text("".join(f"{row}\n" for row in range(60)))
    (folder / "dist_emb_0.log").write_text("1, 2, 3\n0, 1\n0.5, 1.0\n")
