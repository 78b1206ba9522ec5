"""The front doors: what may be posted, what is refused, and that bytes come back as what they were."""

import numpy as np
import pytest
import torch

from blsrdma.buffers import as_counts, describe, equal_counts
from blsrdma.errors import CountsError, SendBufferError

TORCH_DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_bytes_come_back(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).to(dtype).reshape(4, 3, 2)
    buffer = describe(tensor)
    assert (buffer.items, buffer.item_bytes) == (4, 6 * tensor.element_size())
    data = tensor.flatten().view(torch.uint8).numpy()
    back = buffer.view(data[: 2 * buffer.item_bytes])
    assert back.dtype == dtype
    assert back.shape == (2, 3, 2)
    assert torch.equal(back.flatten().view(torch.uint8), tensor[:2].flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "u8", "?", "c16", "S5", [("a", "i4"), ("b", "f8")], "M8[s]"])
def test_numpy_bytes_come_back(dtype: object) -> None:
    array = np.zeros((4, 3), dtype=dtype)
    array.view(np.uint8)[...] = np.arange(array.nbytes, dtype=np.uint8).reshape(4, -1) % 2
    buffer = describe(array)
    back = buffer.view(array.reshape(-1).view(np.uint8)[: 2 * buffer.item_bytes])
    assert back.dtype == array.dtype
    assert back.tobytes() == array[:2].tobytes()


def test_same_type_same_tag_across_libraries() -> None:
    for name in ("float32", "float64", "int8", "int64", "uint8", "bool", "complex64"):
        assert describe(np.zeros(1, name)).tag == describe(torch.zeros(1, dtype=getattr(torch, name))).tag
    tags = {describe(torch.zeros(1, dtype=dtype)).tag for dtype in TORCH_DTYPES}
    assert len(tags) == len(TORCH_DTYPES)


@pytest.mark.parametrize(
    ("send", "named"),
    [
        ([1, 2, 3], "not list"),
        (np.array(3.0), "no dimension"),
        (np.zeros((4, 4))[:, ::2], "not C-contiguous"),
        (np.zeros(4, dtype=object), "dtype object"),
        (np.zeros(4, dtype=">f8"), "byte order"),
        (torch.zeros(4, 4).t(), "not contiguous"),
        (torch.tensor(1.0), "no dimension"),
        (torch.zeros(4, device="meta"), "meta"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(4, dtype=torch.complex64).conj(), "conjugate"),
    ],
)
def test_unusable_buffers(send: object, named: str) -> None:
    with pytest.raises(SendBufferError, match=named):
        describe(send)  # type: ignore[arg-type]


def test_counts() -> None:
    for counts in ([1, 2], (1, 2), np.array([1, 2], np.int32), torch.tensor([1, 2])):
        array = as_counts(counts, 2)
        assert array.dtype == np.int64
        assert array.tolist() == [1, 2]
    assert equal_counts(6, 3).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ([1, 2, 3], "one entry per rank, 2"),
        ([[1, 2]], "one entry per rank, 2"),
        ([1.0, 2.0], "integers"),
        (np.array([2**63, 0], np.uint64), "below 2"),
    ],
)
def test_bad_counts(counts: object, named: str) -> None:
    with pytest.raises(CountsError, match=named):
        as_counts(counts, 2)  # type: ignore[arg-type]


def test_counts_that_do_not_divide() -> None:
    with pytest.raises(CountsError, match="7 items, which do not divide by 2 ranks"):
        equal_counts(7, 2)
