"""This process's UCX context, worker and progress thread: one for all its exchanges, made when the first one needs
it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import uuid
from types import MappingProxyType

from blsrdma.errors import BlsrdmaError, SettingsError
from blsrdma.settings import timeout_ns
from blsrdma.ucx import Feature, UCXContext, UCXWorker, native

log = logging.getLogger("blsrdma")

# UCX's settings, without the prefix; a variable UCX_* that the user set wins.
UCX_SETTINGS = MappingProxyType(
    {
        "RNDV_THRESH": "inf",  # else peer error handling turns every put on one host into emulation over TCP
        "POSIX_ERROR_HANDLING": "y",  # else shared memory alone has no transport that can report a dead peer,
        "SYSV_ERROR_HANDLING": "y",  # and UCX refuses to connect
    }
)

STOP_SECONDS = 5.0  # for the progress thread to end, when the interpreter does


def ucx_settings() -> dict[str, str]:
    """The settings to give to UCX. Raises SettingsError for one of the user's that would break the order of writes."""
    # A counter must not overtake its data on the bus. Through the environment: UCX refuses the key where it has no
    # verbs.
    os.environ.setdefault("UCX_IB_PCI_RELAXED_ORDERING", "n")
    relaxed = os.environ["UCX_IB_PCI_RELAXED_ORDERING"].lower()
    if relaxed not in ("n", "no", "0", "off"):
        raise SettingsError(
            f"UCX_IB_PCI_RELAXED_ORDERING = {relaxed!r}: a counter could become visible before its message; "
            "leave it unset, or set it to n"
        )
    # Importing ucxx puts UCX_RNDV_THRESH=8192 into the environment: that one is not the user's.
    theirs = {name for name, value in os.environ.items() if (name, value) != ("UCX_RNDV_THRESH", "8192")}
    return {key: value for key, value in UCX_SETTINGS.items() if "UCX_" + key not in theirs}


class Fabric:
    """A UCX context and worker, and the thread that drives the worker. Use `Fabric.of_process()`."""

    _current: Fabric | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        features = (Feature.RMA, Feature.AMO64, Feature.WAKEUP)
        self.context = UCXContext(ucx_settings(), feature_flags=features)
        self.worker = UCXWorker(self.context)
        self.native = native.Fabric(self.worker.handle, self.worker)
        self.address = bytes(self.worker.address)
        self.incarnation = uuid.uuid4().hex
        self.pid = os.getpid()

    @classmethod
    def of_process(cls) -> Fabric:
        """The fabric of this process, made at the first call."""
        with cls._lock:
            if cls._current is not None and cls._current.pid != os.getpid():
                raise BlsrdmaError("this process was forked after blsrdma was used; UCX does not survive it: use spawn")
            if cls._current is None:
                cls._current = cls()
            return cls._current

    def allocate(self, count: int) -> native.Arena:
        """`count` bytes of zeroed, registered memory that peers can be allowed to write."""
        return native.Arena(self.context.handle, self.context, count)


# Registered when this module is imported: after UCX's own exit handlers, which must not find the thread at work, and
# before those of whoever uses a fabric, which close what is still open. The last to be registered runs first.
@atexit.register
def _stop() -> None:
    fabric = Fabric._current
    if fabric is not None and not fabric.native.stop(timeout_ns(STOP_SECONDS)):
        log.warning("the progress thread has not ended within %g s: something holds it up in UCX", STOP_SECONDS)
