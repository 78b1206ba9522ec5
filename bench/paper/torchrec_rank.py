"""The ranks' side of TorchRec: the same model, its tables sharded by TorchRec over a process group of gloo.

Every rank has its own samples of a batch, as TorchRec wants them, made before time is taken; the loop is synchronous.
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from bench.control import Message
from bench.paper.dlrm_rank import Kept
from dlrm import delays
from dlrm.arrivals import Arrivals
from dlrm.options import parse
from dlrm.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.systems.base import Runtime
    from dlrm.data.batch import Batch

TOLERANCE = 1e-5  # of pooled vectors, next to those of our kernel
_models: dict[str, Model] = {}


class Model:
    """One rank's part of a model."""

    def __init__(self, worker: Worker) -> None:
        import torchrec
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
        from torchrec.distributed.types import ShardingEnv

        self.worker = worker
        rows, dim = worker.shape.table_rows, worker.shape.dim
        self.keys = [f"f{table}" for table in range(len(rows))]
        tables = [
            torchrec.EmbeddingBagConfig(name=f"t{table}", embedding_dim=dim, num_embeddings=count,
                                        feature_names=[self.keys[table]])
            for table, count in enumerate(rows)
        ]  # fmt: skip
        whole = torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
        owners = {table: rank for rank, own in enumerate(worker.placement.tables) for table in own}
        where = {f"t{table}": table_wise(rank=owners[table]) for table in range(len(rows))}
        sharder, ranks = EmbeddingBagCollectionSharder(), worker.ranks
        plan = construct_module_sharding_plan(whole, where, sharder, ranks, ranks, "cpu")
        env = ShardingEnv.from_process_group(dist.group.WORLD)
        self.bags = sharder.shard(whole, plan, env, torch.device("cpu"))
        for name, sharded in self.bags.state_dict().items():
            table = int(name.split(".")[1].removeprefix("t"))
            for shard in sharded.local_shards():
                shard.tensor.copy_(worker.tables.get_parameter(f"emb_l.{table}.weight"))

    def inputs(self, batch: Batch) -> tuple[Any, Batch]:
        """This rank's samples of a batch."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        samples = self.worker.placement.samples(batch.size)[self.worker.rank]
        mine = batch.slice(samples.start, samples.stop)
        sizes = torch.cat([offsets.diff() for offsets in mine.offsets])
        features = KeyedJaggedTensor(keys=self.keys, values=torch.cat(list(mine.indices)), lengths=sizes)
        return features, mine

    def pooled(self, features: Any, mine: Batch) -> torch.Tensor:
        """[samples, tables, dim], in the order of the tables; TorchRec has them in that of their owners."""
        found = self.bags(features).wait()
        vectors: torch.Tensor = found.values().view(mine.size, len(self.keys), self.worker.shape.dim)
        return vectors[:, [found.keys().index(key) for key in self.keys]]

    def check(self) -> None:
        """What this rank can pool itself, its own tables for its own samples, is what TorchRec says. Raises
        ValueError."""
        features, mine = self.inputs(next(self.worker.batches()))
        found = self.pooled(features, mine)
        for table in self.worker.placement.tables[self.worker.rank]:
            weight = self.worker.tables.get_parameter(f"emb_l.{table}.weight")
            wanted = torch.nn.functional.embedding_bag(
                mine.indices[table], weight, mine.offsets[table], mode="sum", include_last_offset=True
            )
            if not torch.allclose(found[:, table], wanted, rtol=TOLERANCE, atol=TOLERANCE):
                raise ValueError(f"TorchRec pools other vectors of table {table}")


def load(runtime: Runtime, _progress: Callable[[int], None], name: str, flags: list[str], alone: bool) -> Message:
    """Build this rank's part of a model."""
    del alone
    worker = Worker(parse(flags), runtime.rank, runtime.ranks)
    worker.source = Kept(worker.source, worker.options)
    _models[name] = model = Model(worker)
    with torch.no_grad():
        model.check()
    return {}


def serve(runtime: Runtime, _progress: Callable[[int], None], name: str, job: str, changes: dict[str, Any]) -> Message:
    """One run, as `bench.paper.dlrm_rank.serve`; every rank replies with its own part of it."""
    del job
    model, began_cpu = _models[name], _cpu()
    worker = model.worker
    count = changes.get("num_batches", worker.options.num_batches)
    batches = [model.inputs(batch) for batch in worker.source.batches(worker.options.mini_batch_size, count)]
    plan = delays.parse(changes.get("delay", "none"), changes.get("delay_seed", 0))
    stalls = plan.row(runtime.rank, 0, len(batches), runtime.ranks)
    rate = changes.get("arrival_rate")
    times = Arrivals(rate, True, changes.get("delay_seed", 0)).times(runtime.rank, 0) if rate else None
    slept, latency, arrived = (np.zeros(len(batches), np.int64) for _ in range(3))
    now = time.monotonic_ns
    with torch.no_grad():
        model.pooled(*batches[0])
        dist.barrier()
        began = now()
        for i, (features, mine) in enumerate(batches):
            came = began + int(next(times) * 1e9) if times else 0
            while now() < came:
                time.sleep(20e-6)
            start = came or now()
            if stalls[i] > 0:
                before = now()
                time.sleep(stalls[i])
                slept[i] = now() - before
            pending = model.bags(features)
            dense = worker.dense.bottom(mine.dense)
            vectors = pending.wait().values().view(mine.size, len(model.keys), -1)
            worker.dense.top(torch.cat([dense[:, None], vectors], dim=1))
            arrived[i], latency[i] = start - began, now() - start
        ended = now()
    return {
        "cpu": _cpu() - began_cpu, "began": began, "ended": ended, "slept": slept.tolist(), "arrived": arrived.tolist(),
        "latency": latency.tolist(), "samples": sum(mine.size for _, mine in batches),
    }  # fmt: skip


def together(replies: list[Message]) -> list[Message]:
    """The replies of all ranks, as those of `bench.paper.dlrm_rank.serve`."""
    spent = max(one["ended"] for one in replies) - min(one["began"] for one in replies)
    first = {
        "cpu": sum(one["cpu"] for one in replies),
        "ms": spent / 1e6 / len(replies[0]["slept"]),
        "samples": sum(one["samples"] for one in replies),
        "arrived": replies[0]["arrived"],
        "bytes_by_path": {},
        **{key: [one[key] for one in replies] for key in ("slept", "latency")},
    }
    return [first]


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
