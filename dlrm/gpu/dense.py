"""The dense half of the model on a GPU: a rank's slice of a batch, in blocks as in dlrm.dense.

With --dense-block B blocks begin at multiples of B in the batch, and a sample sits in the same row of the same matrix
products whichever rank evaluates it; B is a multiple of BLOCK_ALIGN, so that all blocks are aligned alike. Without one
a rank's slice is one block. What is not of the slice is padding, and holds what was there before: no row of a product
depends on another one. So every batch is the same work on the same memory, which a CUDA graph repeats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dlrm.gpu.accelerator import Accelerator
    from dlrm.gpu.interaction import GpuInteraction
    from dlrm.gpu.slots import Slot
    from dlrm.model import Dense

BLOCK_ALIGN = 64  # samples: 256 bytes in a column of floats
WIDTH_ALIGN = 4  # columns of the top MLP's input: others are zeros


class Span:
    """How a slice lies in the blocks of a batch."""

    def __init__(self, block: int, most: int) -> None:
        """`most`: samples of the largest slice; `block` 0: one for all of them."""
        self.block = block or max(1, most)
        self.blocks = -(-(block - 1 + most) // block) if block else 1
        self.rows = self.block * self.blocks
        self._fixed = bool(block)

    def row(self, samples: range) -> int:
        """Where a slice begins."""
        return samples.start % self.block if self._fixed else 0


def planned_bytes(model: Dense, span: Span) -> int:
    """What a GpuDense takes of GPU memory, besides what torch and cuBLAS take for themselves."""
    layers = [layer for mlp in (model.bot_l, model.top_l) for layer in mlp if isinstance(layer, nn.Linear)]
    of_a_row = model.shape.bottom[0] + padded_width(model) + 1 + sum(layer.out_features for layer in layers)
    parameters = sum(layer.weight.numel() + layer.out_features for layer in layers)
    return 4 * (span.rows * of_a_row + parameters + WIDTH_ALIGN * layers[-1].out_features)


def padded_width(model: Dense) -> int:
    """Of the top MLP's input in memory."""
    return -(-model.shape.top[0] // WIDTH_ALIGN) * WIDTH_ALIGN


class GpuDense:
    """Parameters and memory for a slice on a device; each of its two streams does one thing after another.

    Both MLPs are evaluated some times when it is made, and become graphs where `graphs` asks for it.
    """

    def __init__(
        self, accelerator: Accelerator, model: Dense, span: Span, interaction: GpuInteraction, graphs: bool
    ) -> None:
        self.device, self._span, self._interaction = accelerator.device, span, interaction
        self._inputs = accelerator.zeros(span.rows, model.shape.bottom[0])
        self._features = accelerator.zeros(span.rows, padded_width(model))
        self._outcome = accelerator.zeros(2, span.rows)  # logits, probabilities
        self.bottom_lane, self.finish_lane = accelerator.lane(), accelerator.lane()
        bottom = _Layers(accelerator, model.bot_l, span, model.shape.bottom[0], None)
        top = _Layers(accelerator, model.top_l, span, padded_width(model), self._outcome[0].view(-1, 1))
        self._bottoms, threshold = bottom.out, model.loss_threshold

        def finish() -> None:
            top(self._features)
            torch.sigmoid(self._outcome[0], out=self._outcome[1])
            if 0 < threshold < 1:
                self._outcome[1].clamp_(threshold, 1 - threshold)

        with torch.inference_mode():
            self._bottom = accelerator.prepared(lambda: bottom(self._inputs), self.bottom_lane, graphs)
            self._top = accelerator.prepared(finish, self.finish_lane, graphs)

    def bottom(self, slot: Slot, dense: int, samples: range) -> None:
        """Put the bottom MLP of the features at `dense`, [n, D], into slot.bottoms on its stream, `bottom_lane`."""
        if samples:
            lane = self.bottom_lane.address
            to, size = _rows(self._inputs, self._span.row(samples), len(samples))
            self.device.copy(to, dense, size, lane)
            self._bottom()
            source, size = _rows(self._bottoms, self._span.row(samples), len(samples))
            self.device.copy(slot.bottoms.address, source, size, lane)

    def interact(self, slot: Slot, parts: Sequence[int], lengths: int, samples: range) -> None:
        """Put the interaction of a slice's vectors on the stream `finish_lane`: the last that reads the parts."""
        if samples:
            lane = self.finish_lane.address
            to, _ = _rows(self._features, self._span.row(samples), len(samples))
            self._interaction.launch(
                len(samples), slot.bottoms.address, parts, lengths, to, lane, feature_stride=self._features.stride(0)
            )

    def top(self, slot: Slot, samples: range) -> None:
        """Put the top MLP behind it, and logits and probabilities into slot.results."""
        if samples:
            lane = self.finish_lane.address
            self._top()
            for number, outcome in enumerate(self._outcome):
                source, size = _rows(outcome, self._span.row(samples), len(samples))
                self.device.copy(slot.results.address + number * size, source, size, lane)


class _Layers:
    """An MLP's linear layers of inputs [rows, width]: ReLU between them, and behind the last if no `out` is given."""

    def __init__(
        self, accelerator: Accelerator, mlp: nn.Sequential, span: Span, width: int, out: Tensor | None
    ) -> None:
        layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        self._span = span
        weights = [layer.weight for layer in layers]
        weights[0] = nn.Parameter(functional.pad(weights[0], (0, width - weights[0].shape[1])), requires_grad=False)
        self._weights = [
            (accelerator.upload(weight), accelerator.upload(layer.bias))
            for weight, layer in zip(weights, layers, strict=True)
        ]
        self._outs = [
            accelerator.zeros(span.rows, layer.out_features) for layer in layers[: len(layers) - (out is not None)]
        ]
        self._rectified = len(self._outs)
        self._outs += [] if out is None else [out]
        self.out = self._outs[-1]

    def __call__(self, value: Tensor) -> None:
        block = self._span.block
        for start in range(0, self._span.rows, block):
            inputs = value[start : start + block]
            for number, ((weight, bias), whole) in enumerate(zip(self._weights, self._outs, strict=True)):
                out = whole[start : start + block]
                torch.addmm(bias, inputs, weight.t(), out=out)
                if number < self._rectified:
                    out.relu_()
                inputs = out


def _rows(tensor: Tensor, row: int, count: int) -> tuple[int, int]:
    """The address of row number `row`, and the bytes of `count` rows."""
    each = tensor.stride(0) * tensor.element_size()
    return tensor.data_ptr() + row * each, count * each
