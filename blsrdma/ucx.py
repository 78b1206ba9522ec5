"""Loads UCX, through ucxx, once: the one libucp of this process.

ucxx and blsrdma._native must call the same copy of libucp, for a handle of one copy is garbage to another. ucxx loads
the one it was built for (or the system's, if told to); _native then finds it by its name. Import both from here.
"""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("ucxx") is None:
    raise ImportError("blsrdma needs ucxx: pip install 'blsrdma[cu12]' (or [cu13]; both run on machines without CUDA)")

os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # ucxx sets variables that UCX then does not know

import ucxx  # noqa: F401  (loads libucp)
from ucxx._lib.libucxx import Feature, UCXContext, UCXWorker

from blsrdma import _native as native

__all__ = ["Feature", "UCXContext", "UCXWorker", "native", "version"]

version: str = native.ucp_version()

_used, _loaded = native.loaded_ucp()
if len(_loaded) != 1:
    raise ImportError(
        f"{len(_loaded)} copies of libucp are loaded ({', '.join(_loaded) or 'none'}): ucxx and blsrdma must share it. "
        "Set RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true to use the system's UCX, or remove it from LD_LIBRARY_PATH."
    )
