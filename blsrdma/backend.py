"""`torch.distributed.init_process_group("bls")`: what torch calls, and the group's `Options`.

Two entry points of the installed package lead here, `torch.backends` (at the end of every `import torch`) and
`torch.distributed.backends` (torch >= 2.14, when the name "bls" is first used). So `register` may only register: no
import of UCX or of the native core, and no exception, whatever state torch is in. The group itself is in
blsrdma.backend_group, its all_to_all in blsrdma.backend_lane.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blsrdma.backend_group import BlsProcessGroup

log = logging.getLogger("blsrdma")

NAME = "bls"
_FOREVER_S = 1e9  # what a timedelta, and torch's clocks, can hold


@dataclass(frozen=True)
class Options:
    """`pg_options` of a group: settings of its exchange (blsrdma.settings). None: BLSRDMA_* or the default.

    lag: all_to_all operations that may be in flight besides the newest one, with async_op=True.
    window_bytes: larger messages from one rank to another take a slower path.
    timeout: seconds, of every operation. Neither here nor in BLSRDMA_TIMEOUT: init_process_group's `timeout`.

    All ranks of a group must give the same lag and window_bytes. Each group has its own: they are not inherited.
    """

    lag: int | None = None
    window_bytes: int | None = None
    timeout: float | None = None

    @property
    def _timeout(self) -> timedelta | None:
        """init_device_mesh(backend_override=...) asks options for it."""
        return None if self.timeout is None else timedelta(seconds=min(self.timeout, _FOREVER_S))


def register() -> None:
    """Make "bls" known to torch.distributed. Idempotent; never raises, for `import torch` would fail with it."""
    try:
        import torch.distributed as dist

        if dist.is_available() and NAME not in dist.Backend.backend_list:
            dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as error:
        log.warning("the backend %r is not available to torch.distributed: %s", NAME, error)


def _create(about: Any, options: Any) -> BlsProcessGroup:
    """The creator that torch.distributed calls: `about` is its _DistributedBackendOptions."""
    from blsrdma.backend_group import BlsProcessGroup

    return BlsProcessGroup(
        about.store, about.group_rank, about.group_size, about.timeout, options,
        name=about.group_id, global_ranks=list(about.global_ranks_in_group),
    )  # fmt: skip


if "torch.distributed" in sys.modules:  # `import blsrdma.backend` is enough where the package is not installed
    register()
