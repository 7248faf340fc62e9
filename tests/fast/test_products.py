"""Linear layers by oneDNN: values and gradients in float64 say what is right."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from omni.fast import products
from omni.fast.products import OneDnnProducts, learnt_products

pytestmark = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this build of torch has no oneDNN")


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of the first argument of each product that oneDNN gets."""
    shapes, product = list[torch.Size](), products.product

    def handed(x: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(x.shape)
        return product(x, *args)

    monkeypatch.setattr(products, "product", handed)
    return shapes


def test_products_of_many_rows_are_onednns(handed_over: list[torch.Size]) -> None:
    linear, bare = nn.Linear(40, 24), nn.Linear(40, 24, bias=False)
    many, few = torch.randn(5, 7, 40), torch.randn(3, 40)
    with OneDnnProducts():
        with torch.no_grad():
            for layer in (linear, bare):
                bias = 0 if layer.bias is None else layer.bias.double()
                expected = (many.double() @ layer.weight.double().T + bias).float()
                torch.testing.assert_close(layer(many), expected, atol=1e-5, rtol=1e-5)
            assert handed_over == [many.shape] * 2
            linear(few), F.linear(many.bfloat16(), linear.weight.bfloat16()), many @ linear.weight.T
            with torch.autocast("cpu"):
                linear(many)
        linear(many).sum().backward()
    with torch.no_grad():
        linear(many)
    assert len(handed_over) == 2
    assert linear.weight.grad is not None


LAYOUTS: dict[str, Any] = {
    "rows": lambda x: x,
    "turned": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learnt", ["x, weight and bias", "x", "weight", "bias", "x and weight, no bias"])
def test_gradients_are_those_of_the_definition(learnt: str, layout: str, handed_over: list[torch.Size]) -> None:
    torch.manual_seed(0)
    x, weight, bias = LAYOUTS[layout](torch.randn(5, 7, 40)), torch.randn(24, 40), torch.randn(24)
    given = [x, weight] if "no bias" in learnt else [x, weight, bias]
    for name, tensor in zip(("x", "weight", "bias"), given, strict=False):
        tensor.requires_grad_(name in learnt.removesuffix(", no bias"))
    layer = nn.Linear(40, 24, bias=len(given) == 3)
    for name, tensor in zip(("weight", "bias"), given[1:], strict=False):
        setattr(layer, name, nn.Parameter(tensor, requires_grad=tensor.requires_grad))
    given[1:] = layer.parameters()
    with learnt_products(layer):
        found = layer(x)
        # of a sum, all gradients are one number in memory
        (found.sum() if layout == "one row for all" else (found * found).sum()).backward()
    assert handed_over
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]
    expected = F.linear(*exact)
    (expected.sum() if layout == "one row for all" else (expected * expected).sum()).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(given, exact, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-3)


def test_what_does_not_learn_is_not_kept() -> None:
    """The input of a frozen layer would be kept until the backward pass for nothing."""
    kept: list[torch.Size] = []
    x, frozen = torch.randn(20, 40, requires_grad=True), nn.Linear(40, 24).requires_grad_(False)
    note = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t)
    with learnt_products(frozen), note:
        frozen(x)
    assert kept == [frozen.weight.shape]


def test_checkpointed_layers_are_computed_again_in_the_same_way(handed_over: list[torch.Size]) -> None:
    torch.manual_seed(0)
    x, layers = torch.randn(20, 40, requires_grad=True), nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 8))
    with learnt_products(layers):
        checkpoint(layers, x, use_reentrant=False).square().sum().backward()
    assert len(handed_over) == 8  # forward twice, and two gradients of each
    found, x.grad = x.grad, None
    layers(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-4)
    assert not any("forward" in vars(layer) for layer in layers)


def test_second_derivatives_are_refused() -> None:
    x, linear = torch.randn(20, 40, requires_grad=True), nn.Linear(40, 24)
    with learnt_products(linear):
        (slope,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
