"""Heinsen's form where its logarithms have poles."""

import pytest
import torch
from channels import channel_errors, sizes

from gateloop_cpp import SimpleGateLoopLayer
from gateloop_cpp.heinsen import heinsen_scan
from gateloop_cpp.ops import linear_recurrence


def exact_scan(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear_recurrence(a.double(), x.double())[0]


@pytest.mark.parametrize(
    "fill", ["ordinary", "zero inputs", "zero gates", "tiny gates", "gates of one"]
)
@pytest.mark.parametrize("time", [300, 65_536])
def test_heinsen_is_finite_and_exact(fill: str, time: int) -> None:
    torch.manual_seed(0)
    a, x = torch.randn(1, time, 2).sigmoid(), torch.randn(1, time, 2) * torch.tensor([1, 1e-3])
    if fill == "zero inputs":
        x[:, ::3] = 0
    elif fill == "zero gates":
        a[:, ::5] = 0
    elif fill == "tiny gates":
        a = a * 1e-38
    elif fill == "gates of one":
        a = 1 - a * 1e-4
    a.requires_grad_()
    x.requires_grad_()
    h, expected = heinsen_scan(a, x), exact_scan(a, x)
    gradients = [torch.autograd.grad(y.square().mean(), (a, x)) for y in (h, expected)]
    # One float32 rounding of h, and 1e-8 of the largest sum of magnitudes where zeros add up.
    assert (sizes(h - expected) <= 1.2e-7 * sizes(exact_scan(a, x.abs()))).all()
    for ours, exact in zip(*gradients, strict=True):
        assert ours.isfinite().all()
        assert (channel_errors(ours, exact) <= 1e-6).all()


def test_heinsen_layer_in_float16_stays_finite() -> None:
    torch.manual_seed(0)
    layer = SimpleGateLoopLayer(8, use_heinsen=True).half()
    x = (30 * torch.randn(1, 65_536, 8)).half()
    x[:, 100:200] = 0
    x.requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
