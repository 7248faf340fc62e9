"""Linear layers of float32 on a CPU by oneDNN, for inference and for training.

torch passes them to MKL, whose code for AVX-512 is for Intel's processors. On those, oneDNN is up to twice as fast for many
rows; on AMD's it is 2.4 times as fast. It reads the model's own weights, so no copy can become stale.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
ROWS = 16
"""With at least so many rows oneDNN is faster, although it rearranges the weights for each product."""


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of float32 by oneDNN: float[..., I], float[O, I], float[O] -> float[..., O]."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _LearntProduct(torch.autograd.Function):
    """`product` with its gradients, which are products, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, of_bias = grad.reshape(-1, grad.shape[-1]).contiguous(), None
        of_x = None if weight is None else product(rows, weight.t(), None).view(*grad.shape[:-1], -1)
        of_weight = None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).contiguous().t(), None)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


@contextmanager
def learnt_products(model: nn.Module) -> Iterator[None]:
    """Inside of the block, oneDNN computes the linear layers of a model and their gradients, first derivatives alone.

    The layers themselves are changed: torch suspends a mode during the backward pass, in which checkpointed layers are
    computed again.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if not _suits_onednn(x, layer.weight, layer.bias):
        return F.linear(x, layer.weight, layer.bias)
    if not torch.is_grad_enabled():
        return product(x, layer.weight, layer.bias)
    result: torch.Tensor = _LearntProduct.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return result


class OneDnnProducts(TorchFunctionMode):
    """Inside of the block, oneDNN computes linear layers in float32 on the CPU if that is faster and needs no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass `F.linear` to oneDNN, and nothing else."""
        if func is F.linear and not kwargs and not torch.is_grad_enabled() and _suits_onednn(*args):
            return product(*(*args, None)[:3])
        return func(*args, **(kwargs or {}))


def _suits_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        HAS_ONEDNN
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.layout == torch.strided
        and x.numel() >= ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def keep_memory() -> None:
    """Free a block of 31 MiB. glibc then keeps freed memory up to twice that size.

    Otherwise every layer takes new pages from the system, which fills them with zeros, and returns them: about an eighth of
    the time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
