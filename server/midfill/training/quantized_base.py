"""A frozen base model for training: int8 weights, and selective activation checkpointing.

A frozen weight is read twice in a step, in the forward and the backward pass, and has no gradient. So it is
held as the server holds it, in int8 with a scale for each output (`engine.torch.quantize`), and a block of
rows is converted to float32 just before its product. The result is that of a float32 layer with the same
rounded weights.

Of a layer's forward pass only the results of large products and of attention are saved. Everything else
(norms, activations, dropout, products with the few rows of a LoRA) is most of the memory and little of the
time, so the backward pass recomputes it. Knows modules of torch; nothing of adapters or examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from midfill.engine.torch.quantize import Int8Embedding, Int8Weight

_BLOCK_ELEMENTS = 1 << 20
"""Weights that are converted at a time: 4 MB, which stay in a processor's cache until they are used."""

_FEW = 64
"""A product over no more columns, as with a LoRA's upper matrix, is cheaper to recompute than to save."""


class FrozenInt8Linear(nn.Linear):
    """A linear layer with frozen int8 weights; gradients pass through it in float32.

    It is an `nn.Linear`, so that PEFT adds a LoRA to it.

    Attributes:
        weight: int8, outputs x inputs.
        scales: float32, one for each output.
    """

    scales: torch.Tensor

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        num_out, num_in = weight.values.shape
        super().__init__(num_in, num_out, bias=False, device="meta")
        self.weight = nn.Parameter(weight.values, requires_grad=False)
        self.register_buffer("scales", weight.scales.float(), persistent=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product in float32."""
        output: torch.Tensor = _product(input, self.weight, self.scales)
        return output if self.bias is None else output + self.bias


# A custom operator, so that the checkpointing policy sees one operator instead of its steps.
@torch.library.custom_op("midfill::int8_linear", mutates_args=())
def _product(inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return `inputs @ (values * scales).T` for inputs of any number of dimensions."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    result = rows.new_empty(len(rows), len(values))
    for start, block in _in_float32(values):
        torch.mm(rows, block.T, out=result[:, start : start + len(block)])
    return result.mul_(scales).view(*inputs.shape[:-1], len(values))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _back(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    values, scales = context.saved_tensors
    rows = (gradient * scales).reshape(-1, len(values))
    result = rows.new_zeros(len(rows), values.shape[1])
    for start, block in _in_float32(values):
        result.addmm_(rows[:, start : start + len(block)], block)
    return result.view(*gradient.shape[:-1], values.shape[1]), None, None


_product.register_autograd(_back, setup_context=_keep)


def _in_float32(values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Iterate over (first row, block of rows in float32); all blocks share one buffer."""
    size = max(1, _BLOCK_ELEMENTS // values.shape[1])
    memory = torch.empty(min(size, len(values)), values.shape[1], device=values.device)
    for start in range(0, len(values), size):
        rows = values[start : start + size]
        yield start, memory[: len(rows)].copy_(rows)


def share_embedding(model: Any) -> None:
    """Let head and embedding share one matrix if the configuration ties them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and isinstance(head, FrozenInt8Linear) and isinstance(embedding, Int8Embedding):
        head.weight = embedding.weight


def layers_of(model: Any) -> nn.ModuleList:
    """Return the layers of a transformers model, in order."""
    count = model.config.num_hidden_layers
    return next(one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == count)


def checkpoint_activations(model: Any) -> None:
    """Make a model's layers save for the backward pass only what takes long to compute; see the module."""
    for layer in layers_of(model):
        layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)

    return run


_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default}
_KEPT = {
    torch.ops.midfill.int8_linear.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 - attention on a CPU
}


def _policy(_context: Any, operator: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    long = operator in _KEPT or (operator in _PRODUCTS and args[-1].shape[0] > _FEW)
    return CheckpointPolicy.MUST_SAVE if long else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
