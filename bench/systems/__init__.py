"""Who exchanges: the names on the command line, and the runtime (one set of rank processes) that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One system as it is named on the command line."""

    runtime: str
    about: str
    ours: bool = False
    blocking: bool = False  # always as at lag 0, whatever lag the loop would allow
    diagnostic: bool = False  # no honest competitor: it does less than the others


SYSTEMS = {
    "bls": Kind("bls", "blsrdma, one view per message", ours=True),
    "bls-copy": Kind("bls", "blsrdma, messages copied out into one preallocated array", ours=True),
    "bls-wait": Kind(
        "bls", "blsrdma, waits but looks at no message: to see where time goes", ours=True, diagnostic=True
    ),
    "bls-torch": Kind("bls-torch", "torch.distributed, bls: all_to_all_single", ours=True, blocking=True),
    "bls-torch-nb": Kind("bls-torch", "the same with async_op=True, lag + 1 in flight", ours=True),
    "gloo": Kind("gloo", "torch.distributed, gloo: all_to_all_single", blocking=True),
    "gloo-nb": Kind("gloo", "the same with async_op=True, lag + 1 in flight"),
    "mpich": Kind("mpich", "MPICH: MPI_Alltoallv through mpi4py", blocking=True),
    "mpich-nb": Kind("mpich", "MPICH: MPI_Ialltoallv, lag + 1 in flight"),
    "openmpi": Kind("openmpi", "Open MPI (ob1, shared memory): MPI_Alltoallv through mpi4py", blocking=True),
    "openmpi-nb": Kind("openmpi", "Open MPI: MPI_Ialltoallv, lag + 1 in flight"),
    "openmpi-ucx": Kind("openmpi-ucx", "Open MPI over UCX: MPI_Alltoallv through mpi4py", blocking=True),
    "openmpi-ucx-nb": Kind("openmpi-ucx", "Open MPI over UCX: MPI_Ialltoallv, lag + 1 in flight"),
    "nccl": Kind("nccl", "torch.distributed, NCCL, one GPU for each rank", blocking=True),
}

# The module of bench.systems that serves a runtime.
MODULES = {"bls": "ours", "bls-torch": "torch_group", "gloo": "torch_group", "nccl": "torch_group"}
MODULES |= {"mpich": "mpi", "openmpi": "mpi", "openmpi-ucx": "mpi", "openmpi-dlrm": "mpi"}

DEFAULT = ["bls", "bls-copy", "gloo", "mpich", "mpich-nb", "openmpi", "openmpi-nb"]
