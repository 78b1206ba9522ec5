"""DLRM inference over bounded-lag exchanges: `python -m dlrm --help`, or as a library `Model` and `serve`.

A batch walks through the rooms like this: `data` yields a Batch -> `engine` begins an iteration -> `routes` looks
the rank's own tables up and posts the pooled vectors -> `dense` runs the bottom MLP meanwhile, then, once every
rank's vectors are here, the interaction and the top MLP -> predictions leave in order. Where each rank has its own
samples, `queries` is the loop. `worker` is what one rank does from start to end.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlrm.data.batch import Batch
    from dlrm.loop import Predictions
    from dlrm.serving import Model, serve
    from dlrm.shape import ModelShape

__all__ = ["Batch", "Model", "ModelShape", "Predictions", "serve"]

_ROOMS = {
    "Batch": "dlrm.data.batch",
    "Model": "dlrm.serving",
    "ModelShape": "dlrm.shape",
    "Predictions": "dlrm.loop",
    "serve": "dlrm.serving",
}


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'dlrm' has no attribute {name!r}")
