"""Gradients of what torch.func.vmap maps equal those of one call after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gateloop_cpp import GateLoopedAttention, SimpleGateLoopLayer, Transformer

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("implementation")


def modules() -> dict[str, Callable[[], nn.Module]]:
    return {
        "max heads": lambda: GateLoopedAttention(8),
        "wide heads": lambda: GateLoopedAttention(8, heads=2),
        "wide heads, states kept": lambda: GateLoopedAttention(
            8, heads=2, checkpoint_gate_looped_attn=False
        ),
        "simple": lambda: SimpleGateLoopLayer(8),
        "transformer": lambda: Transformer(8, num_tokens=11, depth=1),
        "transformer, wide heads": lambda: Transformer(
            8, num_tokens=11, depth=1, gate_loop_heads=2
        ),
    }


def batches(module: nn.Module) -> Tensor:
    """Three inputs."""
    if isinstance(module, Transformer):
        return torch.randint(0, 11, (3, 2, 6))
    return torch.randn(3, 2, 6, 8, dtype=F64)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # sums in another order


@pytest.mark.parametrize("name", modules())
def test_over_inputs(name: str) -> None:
    torch.manual_seed(0)
    module = modules()[name]().to(F64)
    x = batches(module)
    parameters = list(module.parameters())
    mapped = torch.func.vmap(module)(x).square().sum()
    plain = torch.stack([module(each) for each in x]).square().sum()
    for ours, theirs in zip(
        torch.autograd.grad(mapped, parameters), torch.autograd.grad(plain, parameters), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("name", modules())
def test_over_models(name: str) -> None:
    torch.manual_seed(0)
    module = modules()[name]().to(F64)
    x = batches(module)[0]
    stacked = {
        n: torch.stack([p.detach() * s for s in (1.0, 0.9)]).requires_grad_()
        for n, p in module.named_parameters()
    }

    def call(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(module, parameters, (x,))
        return result

    mapped = torch.func.vmap(call)(stacked)
    plain = torch.stack([call({n: p[i] for n, p in stacked.items()}) for i in range(2)])
    close(mapped, plain)
    leaves = list(stacked.values())
    for ours, theirs in zip(
        torch.autograd.grad(mapped.square().sum(), leaves),
        torch.autograd.grad(plain.square().sum(), leaves),
        strict=True,
    ):
        close(ours, theirs)
