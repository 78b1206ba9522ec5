"""The native front: what is posted comes back as what it was, by the fast doors and by Python's, and what is held stays
what it is. One rank is enough: its message to itself goes through a window (copy_self) or is a view of `send`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from blsrdma import Exchange, Handle, Received
from blsrdma.errors import CountsError, ExchangeClosed, SendBufferError, WindowHeld

NUMPY = ["f4", "f8", "f2", "i1", "u8", "?", "c16", "S5", "U3", "M8[s]", "m8[ms]", [("a", "i4"), ("b", "f8")]]
TORCH = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
         torch.float8_e4m3fn]  # fmt: skip
SHAPES = [(4,), (4, 3), (4, 3, 2), (4, 0), (0, 3), (4, *[1] * 9)]


@pytest.fixture(params=[False, True], ids=["view-of-send", "window"])
def exchange(request: pytest.FixtureRequest) -> Iterator[Exchange]:
    with Exchange(HashStore(), 0, 1, lag=1, window_bytes=4096, copy_self=request.param) as made:
        yield made


def raw(array: Any) -> bytes:
    flat = array.detach().reshape(-1).view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array
    return flat.tobytes()  # type: ignore[no-any-return]


def test_numpy_comes_back(exchange: Exchange) -> None:
    for dtype in NUMPY:
        for shape in SHAPES:
            send = np.zeros(shape, dtype)
            if send.nbytes:
                send.reshape(-1).view(np.uint8)[...] = np.arange(send.nbytes, dtype=np.uint8) % 2
            with exchange.post(send) as received:
                assert type(received[0]) is np.ndarray
                assert (received[0].dtype, received[0].shape) == (
                    send.dtype,
                    send.shape if send.nbytes else (shape if 0 not in shape[1:] else (0, *shape[1:])),
                )  # items without bytes are not counted
                assert raw(received[0]) == raw(send)


def test_torch_comes_back(exchange: Exchange) -> None:
    for dtype in TORCH:
        for shape in SHAPES[:4]:
            send = torch.arange(int(np.prod(shape))).to(dtype).reshape(shape)
            with exchange.post(send) as received:
                assert type(received[0]) is torch.Tensor
                assert received[0].dtype == dtype
                assert raw(received[0]) == raw(send)


@pytest.mark.parametrize(
    "send",
    [
        torch.ones(4, requires_grad=True),
        torch.nn.Parameter(torch.ones(4)),
        np.ones((2, 2)).view(np.matrix),
        np.zeros(33, np.uint8)[1:].view(np.float64),  # not aligned
        np.ones(4)[::-1][::-1],
    ],
    ids=["grad", "parameter", "matrix", "unaligned", "strides"],
)
def test_what_is_not_plain_goes_through_python(exchange: Exchange, send: Any) -> None:
    with exchange.post(send) as received:
        assert raw(received[0]) == raw(send)


@pytest.mark.parametrize("counts", [[4], (4,), np.array([4]), np.array([4], np.int32), torch.tensor([4]), None])
def test_counts_of_every_kind(exchange: Exchange, counts: Any) -> None:
    with exchange.post(np.arange(4), counts) as received:
        assert received.counts() == [4]


@pytest.mark.parametrize(
    "counts", [[3], [1 << 70], [4.0], ["4"], [4, 0], np.array([1 << 63], np.uint64), np.array([-4])]
)
def test_bad_counts_send_nothing(exchange: Exchange, counts: Any) -> None:
    before = exchange.iteration
    with pytest.raises((CountsError, OverflowError)):
        exchange.post(np.arange(4), counts)
    assert exchange.iteration == before


def test_the_messages_are_a_sequence(exchange: Exchange) -> None:
    with exchange.post(np.arange(4)) as received:
        assert isinstance(received, Received)
        assert len(received) == 1
        assert [m.tolist() for m in received] == [[0, 1, 2, 3]] == [received[-1].tolist()]
        assert [m.tolist() for m in received[0:1]] == [[0, 1, 2, 3]]
        assert received[1:] == []
        for wrong in (1, -2):
            with pytest.raises(IndexError):
                received[wrong]
    with pytest.raises(WindowHeld, match="its views are gone"):
        received[0]
    with pytest.raises(TypeError):
        Received()
    with pytest.raises(TypeError):
        Handle()


def test_a_view_that_is_held_is_not_given_out_again(exchange: Exchange) -> None:
    """The array of a window is made once and given out again, unless somebody still has it, or has changed it."""
    held, changed = [], []
    for i in range(8):
        with exchange.post(np.full(6, i)) as received:
            held.append(received[0])
            assert held[-1].tolist() == [i] * 6
    assert len({id(each) for each in held}) == 8
    for i in range(8):
        with exchange.post(torch.full((6,), i)) as received:
            changed.append(received[0].unsqueeze_(0).shape)
            assert received[0].tolist() in ([i] * 6, [[i] * 6])
    for i in range(8):
        with exchange.post(torch.full((6,), i)) as received:
            assert received[0].shape == (6,)
            assert received[0].tolist() == [i] * 6


def test_out_of_the_callers(exchange: Exchange) -> None:
    send = np.arange(6, dtype=np.float32).reshape(3, 2)
    for out in (np.zeros((3, 2), np.float32), torch.zeros(6), np.zeros(6, np.float32)):
        handle = exchange.post(send)
        received = handle.wait(out=out, counts=[len(out)])
        assert raw(received[0]) == raw(out) == raw(send)
        handle.release()
    handle = exchange.post(send)
    frozen = np.zeros((3, 2), np.float32)
    frozen.flags.writeable = False
    for out, counts, match in (
        (frozen, None, "read-only"),
        (np.zeros((3, 2), np.float64), None, "elements of type"),
        (np.zeros((2, 2), np.float32), None, "out has 16 bytes"),
        (np.zeros((3, 2), np.float32), [2], "expected 2"),
    ):
        with pytest.raises((SendBufferError, CountsError), match=match):
            handle.wait(out=out, counts=counts)
    assert raw(handle.wait()[0]) == raw(send)  # nothing was lost
    handle.release()


def test_send_is_kept_while_it_is_needed_and_no_longer(exchange: Exchange) -> None:
    send = np.arange(100)
    gone = weakref.ref(send)
    handle = exchange.post(send)
    del send
    gc.collect()
    with handle as received:
        assert received[0].tolist() == list(range(100))
        del received
    del handle
    gc.collect()
    assert gone() is None


def test_an_exchange_that_nobody_closes_can_be_collected_with_its_handles() -> None:
    exchange = Exchange(HashStore(), 0, 1)
    handle = exchange.post(np.arange(4))
    gone = weakref.ref(exchange)
    exchange.close()
    del exchange, handle
    gc.collect()
    assert gone() is None


def test_after_close() -> None:
    with Exchange(HashStore(), 0, 1) as exchange:
        handle = exchange.post(np.arange(4))
        received = handle.wait()
    for call in (exchange.begin, lambda: exchange.post(np.arange(4)), handle.wait, handle.ready, handle.sent,
                 received.counts, lambda: received[0]):  # fmt: skip
        with pytest.raises(ExchangeClosed):
            call()
    handle.release()
