"""What all tests share: data, devices, leftovers, and the bound on the whole session (one test's: pyproject.toml)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.ranks import no_leftovers

SESSION_SECONDS = int(os.environ.get("BLSRDMA_TEST_SECONDS", "1800"))

# torch's stores ask the resolver for the name of every address they connect to. Where no name server answers, each of
# these questions would take five seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

# Deadlines of single examples fail on a busy machine; a failing example is printed so that it can be repeated.
hypothesis.settings.register_profile("blsrdma", deadline=None, print_blob=True)
hypothesis.settings.load_profile("blsrdma")


def pytest_sessionstart() -> None:
    def end(*_: object) -> None:
        pytest.exit(f"the session took longer than {SESSION_SECONDS} s (BLSRDMA_TEST_SECONDS)", returncode=3)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(SESSION_SECONDS)


def pytest_sessionfinish() -> None:
    signal.alarm(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    infiniband = Path("/sys/class/infiniband")
    missing = {
        "gpu": not torch.cuda.is_available() and "no CUDA device",
        "rdma": not (infiniband.is_dir() and any(infiniband.iterdir())) and "no RDMA device",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(name="no_leftovers")
def _no_leftovers() -> Iterator[None]:
    """The test leaves no shared memory behind."""
    with no_leftovers():
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of public samples: BLSRDMA_TEST_DATA, which ci/test sets where it lies beside the checkout."""
    folder = os.environ.get("BLSRDMA_TEST_DATA")
    if not folder:
        pytest.skip("BLSRDMA_TEST_DATA is not set")
    return Path(folder)
