"""What a rank of tests.ranks finds loaded already: imported once, in the fork server, for all ranks of all tests.

Only what leaves no trace may be here: no thread (it would be lost in the fork), no UCX context, no change of the
environment. So UCX's libraries are loaded, which is what takes its time, but ucxx, which sets variables of its own when
it is imported, is left to each rank. UCX reads a few variables when it is loaded (UCX_LOG_LEVEL, UCX_HANDLE_ERRORS and
some more): these hold for all ranks, as set where pytest was started.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os


def _preload() -> None:
    for name in ("torch", "torch.distributed", "numpy", "pytest", "hypothesis", "asyncio", "tests.ranks"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    quiet = "UCX_WARN_UNUSED_ENV_VARS"  # read at load; ucxx sets variables that UCX does not know
    given = quiet in os.environ
    os.environ.setdefault(quiet, "n")
    try:
        import libucxx

        libucxx.load_library()
        for name in ("rmm", "pynvml"):
            importlib.import_module(name)
    except Exception:
        pass
    if not given:
        del os.environ[quiet]
    gc.collect()
    gc.freeze()  # what is here stays: no rank's collector need touch (and copy) it


_preload()
