"""TorchRec, unmodified, on the backend: a sharded EmbeddingBagCollection gives what it gives on gloo.

`bash ci/torch-suites` installs TorchRec and runs this. (It cannot be an extra: TorchRec asks for FBGEMM's CUDA build.)
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.backend.groups import both
from tests.ranks import run_ranks

if not importlib.util.find_spec("torchrec"):
    pytest.skip("torchrec is not installed: bash ci/torch-suites", allow_module_level=True)

pytestmark = pytest.mark.slow


def _forward(rank, world, kind):
    import torchrec
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import ShardingEnv
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    torch.manual_seed(0)
    names = [f"table{t}" for t in range(5)]
    tables = [
        torchrec.EmbeddingBagConfig(name=name, embedding_dim=16, num_embeddings=100 + 10 * t, feature_names=[f"f{t}"])
        for t, name in enumerate(names)
    ]
    whole = torchrec.EmbeddingBagCollection(device=torch.device("cpu"), tables=tables)
    weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    sharder = EmbeddingBagCollectionSharder()
    group = torch.distributed.group.WORLD
    # A plan by hand: TorchRec's planner offers row-wise sharding on CUDA only.
    where = {n: row_wise() if kind == "row_wise" else table_wise(rank=t % world) for t, n in enumerate(names)}
    plan = construct_module_sharding_plan(whole, where, sharder, world, world, "cpu")
    sharded = sharder.shard(whole, plan, ShardingEnv.from_process_group(group), torch.device("cpu"))
    for name, sharded_tensor in sharded.state_dict().items():
        for shard in sharded_tensor.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(weights[name][row : row + rows, column : column + columns])

    results = []
    batch = 8
    for step in range(3):
        generator = torch.Generator().manual_seed(100 * step + rank)
        lengths = torch.randint(0, 5, (5 * batch,), generator=generator)
        values = torch.randint(0, 100, (int(lengths.sum()),), generator=generator)
        features = KeyedJaggedTensor(keys=[f"f{t}" for t in range(5)], values=values, lengths=lengths)
        with torch.set_grad_enabled(step != 2):  # FBGEMM's CPU kernels do not know the inference mode
            output = sharded(features).wait()
        by_name = output.to_dict()
        results.append(torch.cat([by_name[f"f{t}"] for t in range(5)], 1).detach().clone())
        reference = torch.cat(
            [
                torch.nn.functional.embedding_bag(
                    features[f"f{t}"].values(), weights[f"embedding_bags.table{t}.weight"],
                    features[f"f{t}"].offsets()[:-1].long(), mode="sum",
                )
                for t in range(5)
            ],
            1,
        )  # fmt: skip
        torch.testing.assert_close(results[-1], reference)
    if group.name() == "bls":
        assert group.exchange.stats()["iterations"] >= 3
    return results


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
def test_same_as_on_gloo(world, kind):
    run_ranks(both, world, _forward, kind, timeout=150)
