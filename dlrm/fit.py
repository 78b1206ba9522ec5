"""`python -m dlrm.fit --raw-data-file F --save-model model.pt`: fits a small model to Criteo rows, in one process.

The checkpoint has the reference's layout. Rows that are seen fewer than --min-count times in the training samples share
one vector: they are trained as row 0 of their table, and saved as copies of it, so that whoever loads the checkpoint
need not know which ones they are. Not a trainer for large models; it makes checkpoints for which AUC means something.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from dlrm import metrics
from dlrm.__main__ import guarded
from dlrm.data import criteo_rows
from dlrm.data.batch import Batch, recut
from dlrm.data.criteo import CATEGORIES, CriteoFile
from dlrm.model import Dense
from dlrm.shape import ModelShape, interaction_width
from dlrm.tables import Tables
from dlrm.values import widths

if TYPE_CHECKING:
    from collections.abc import Sequence

_EPILOG = """\
example (then predict the samples behind those the model was fitted to):
  python -m dlrm.fit --raw-data-file train.txt --samples 6400 --save-model model.pt
  python -m dlrm --ranks 2 --raw-data-file train.txt --first-sample 6400 --load-model model.pt \\
                 --arch-sparse-feature-size 8 --arch-mlp-bot 13-64-8 --arch-mlp-top 64-1
"""


@dataclass(frozen=True)
class Recipe:
    """How a model is fitted."""

    dim: int = 8
    bottom: tuple[int, ...] = (13, 64, 8)
    top: tuple[int, ...] = (64, 1)
    max_ind_range: int = 10_000
    samples: int = 0  # 0: all
    min_count: int = 20
    epochs: int = 3
    batch: int = 64
    rate: float = 0.01
    seed: int = 123


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 after an error."""
    usual = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m dlrm.fit",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--raw-data-file", required=True, metavar="FILE", help="Criteo format, plain or gzip")
    add("--save-model", required=True, metavar="FILE", help="the checkpoint to write")
    add("--samples", type=int, default=0, metavar="N", help="fit to the first N samples; 0: to all (0)")
    add("--arch-sparse-feature-size", type=int, default=usual.dim, metavar="DIM", help="width of an embedding (8)")
    add("--arch-mlp-bot", type=widths, default=usual.bottom, metavar="A-B-C", help="bottom MLP (13-64-8)")
    add("--arch-mlp-top", type=widths, default=usual.top, metavar="A-B-1", help="top MLP behind its input (64-1)")
    add("--max-ind-range", type=int, default=usual.max_ind_range, metavar="N", help="rows of a table at most (10000)")
    add("--min-count", type=int, default=usual.min_count, metavar="N", help="rows seen less often share a vector (20)")
    add("--nepochs", type=int, default=usual.epochs, metavar="N", help="times all samples are seen (3)")
    add("--mini-batch-size", type=int, default=usual.batch, metavar="B", help="samples in a step (64)")
    add("--learning-rate", type=float, default=usual.rate, metavar="R", help="of Adagrad (0.01)")
    add("--numpy-rand-seed", type=int, default=usual.seed, metavar="SEED", help="of weights and order (123)")
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)
    recipe = Recipe(
        given.arch_sparse_feature_size,
        given.arch_mlp_bot,
        given.arch_mlp_top,
        given.max_ind_range,
        given.samples,
        given.min_count,
        given.nepochs,
        given.mini_batch_size,
        given.learning_rate,
        given.numpy_rand_seed,
    )
    return guarded("fit", lambda: fit(given.raw_data_file, given.save_model, recipe), debug=False)


def fit(data: str, out: str, recipe: Recipe) -> None:
    """Fit a model to the samples of `data` and save it to `out`; prints a line for each epoch. Raises DataError."""
    rows = criteo_rows(recipe.max_ind_range)
    whole = _samples(data, recipe)
    width = interaction_width(CATEGORIES, recipe.dim, "dot", False)
    shape = ModelShape(rows, recipe.dim, recipe.bottom, (width, *recipe.top))
    tables, dense = Tables(shape, range(CATEGORIES), recipe.seed), Dense(shape, recipe.seed)
    weights = [tables.get_parameter(f"emb_l.{table}.weight") for table in range(CATEGORIES)]
    columns = torch.stack(whole.indices, dim=1)  # [N, 26]
    rare = []
    for table, size in enumerate(rows):
        seldom = torch.bincount(columns[:, table], minlength=size) < recipe.min_count
        seldom[0] = False
        columns[seldom[columns[:, table]], table] = 0
        rare.append(seldom)
    parameters = [*weights, *dense.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adagrad(parameters, lr=recipe.rate)
    assert whole.labels is not None
    random = np.random.default_rng(recipe.seed)
    loss_of_epoch = 0.0
    for epoch in range(recipe.epochs):
        order = torch.from_numpy(random.permutation(whole.size))
        scores, total = torch.empty(whole.size), 0.0
        for start in range(0, whole.size, recipe.batch):
            chosen = order[start : start + recipe.batch]
            vectors = [functional.embedding(columns[chosen, table], weight) for table, weight in enumerate(weights)]
            bottom = dense.bottom(whole.dense[chosen])
            logits, probabilities = dense.top(torch.stack([bottom, *vectors], dim=1))
            loss = functional.binary_cross_entropy_with_logits(logits, whole.labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            scores[chosen] = probabilities.detach()
            total += float(loss.detach()) * len(chosen)
        loss_of_epoch = total / whole.size
        auc = metrics.auc(whole.labels.numpy(), scores.numpy())
        print(f"epoch {epoch}: loss {loss_of_epoch:.4f}, AUC {auc or 0:.4f} while fitting", flush=True)
    with torch.no_grad():
        for weight, seldom in zip(weights, rare, strict=True):
            weight[seldom] = weight[0].clone()
    state = {name: tensor.detach() for module in (tables, dense) for name, tensor in module.state_dict().items()}
    steps = -(-whole.size // recipe.batch)
    torch.save(
        {
            "epoch": recipe.epochs - 1, "nepochs": recipe.epochs, "nbatches": steps, "nbatches_test": 0, "iter": steps,
            "state_dict": state, "train_loss": np.float64(loss_of_epoch), "total_loss": np.float64(loss_of_epoch),
            "test_acc": np.float64(0), "opt_state_dict": {},
        },
        out,
    )  # fmt: skip


def _samples(data: str, recipe: Recipe) -> Batch:
    """All samples to be fitted, as one batch."""
    source = CriteoFile(data, criteo_rows(recipe.max_ind_range), recipe.max_ind_range)
    return next(recut(source.batches(8192, 0), recipe.samples or 1 << 40, 1))


if __name__ == "__main__":
    sys.exit(main())
