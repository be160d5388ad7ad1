"""What all torch contenders share: a function bound to its inputs, without and with gradients."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contenders import AbsentError, Array, Pass, import_or_absent

Layout = Callable[[Array], Array]
Run = Callable[[], None]


def as_is(array: Array) -> Array:
    return array


def our_package() -> Any:
    """gateloop_cpp, which finds its library by the variable GATELOOP_OPS_LIBRARY."""
    return import_or_absent("gateloop_cpp")


def fused_module(module: nn.Module) -> nn.Module:
    package = our_package()
    if not hasattr(package, "fuse"):
        raise AbsentError("this revision fuses no Python modules")
    model: nn.Module = package.fuse(module)
    return model


def expect_options(function: Callable[..., object], *names: str) -> None:
    """Raises AbsentError for what another revision of the function does not take."""
    taken = inspect.signature(function).parameters
    missing = [name for name in names if name not in taken]
    if missing:
        raise AbsentError(f"this revision has no {', '.join(missing)}")


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function under torch.compile, static shapes: the fastest that it offers."""
    try:
        return torch.compile(function, dynamic=False)
    except RuntimeError as problem:  # no compiler, or a Python that dynamo lacks
        raise AbsentError(str(problem)) from problem


def numpy_of(tensors: Sequence[Tensor]) -> list[Array]:
    return [tensor.detach().numpy() for tensor in tensors]


def torch_passes(
    function: Callable[..., Tensor],
    arrays: Sequence[Array],
    gradient: Array,
    names: tuple[str, str] = ("forward", "forward + backward"),
    there: Layout = as_is,
    back: Layout = as_is,
) -> dict[str, Pass]:
    """`there` and `back`, untimed, are to and from the layout in which the function is fastest."""
    leaves = [torch.from_numpy(np.ascontiguousarray(there(x))).requires_grad_() for x in arrays]
    output_gradient = torch.from_numpy(np.ascontiguousarray(there(gradient)))

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*leaves)]

    def both() -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, output_gradient)]

    return {
        names[0]: Pass(forward, lambda: [back(x) for x in numpy_of(forward())]),
        names[1]: Pass(both, lambda: [back(x) for x in numpy_of(both())]),
    }


def operator_runs(
    operator: Callable[..., tuple[Tensor, Tensor]], given: Sequence[Tensor]
) -> dict[str, Run]:
    """Of an operator that returns y, of the shape of its first argument, and a state."""
    leaves = [t.clone().requires_grad_() for t in given]
    dy = torch.randn(given[0].shape)

    def forward() -> None:
        with torch.no_grad():
            operator(*given)

    def both() -> None:
        y, _ = operator(*leaves)
        torch.autograd.grad(y, leaves, dy)

    return {"forward": forward, "forward + backward": both}


def oracle_passes(
    function: Callable[..., Tensor], arrays: Sequence[Array], gradient: Array
) -> list[Array]:
    """The function in float64: its value and the gradients of its inputs."""
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in arrays]
    y = function(*leaves)
    return numpy_of([y, *torch.autograd.grad(y, leaves, torch.from_numpy(gradient).double())])
