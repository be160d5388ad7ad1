"""The installed reference peer, and how results are compared with its own.

Both packages compute in float32 what the peer also computes in float64. Summing in another order
is allowed, losing digits is not. In float32 our distance to the float64 results may be at most
twice the peer's own. This holds in the geometric mean over all channels of the results of a case.
A channel is one draw of a rounding error, with heavy tails where a transition is close to zero (its
gradient divides by |z|). None of ours may be further off than 16 times the worst of the peer's,
each beside its own size. In float64 nothing but the order of summation differs.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import gateloop_transformer as peer
import torch
from channels import channel_errors, weight_errors
from torch import Tensor, nn

__all__ = ["assert_parity", "check", "forward_backward", "gradients", "peer", "small_phases"]

MEAN_PEER_ERRORS = 2
SINGLE_PEER_ERRORS = 16
# Where the peer happens to be almost exact, such as a loss (one number): eight roundings of 2^-24.
FLOOR_32 = 8 * 2**-24
TOLERANCE_64 = 5e-12

Results = dict[str, Tensor]
Run = Callable[[nn.Module], Results]


def assert_parity(theirs: nn.Module, ours: nn.Module, run: Run) -> None:
    """Same weights in, same numbers out: every result of `run`, in float32 and in float64."""
    with torch.no_grad():
        move_off_initial_values(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    copy.deepcopy(theirs).load_state_dict(ours.state_dict(), strict=True)

    # Copies made before the first run: the peer caches rotary angles in the precision of that run.
    theirs64, ours64 = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    reference = run(theirs64)
    check(run(ours64), reference)
    check(run(ours), reference, run(theirs))


def check(ours: Results, reference: Results, theirs: Results | None = None) -> None:
    """`theirs`: what the peer computes in float32, where `ours` is float32 too."""
    assert ours.keys() >= reference.keys()
    for name in ours.keys() - reference.keys():
        # A parameter that the peer leaves out for one step only, where its scan has nothing to do.
        assert ours[name].eq(0).all(), name
    ratios = []
    for name, exact in reference.items():
        errors = errors_of(name, ours[name], exact)
        if exact.numel() == 0:
            continue
        worst, where = float(errors.max()), f"{name}, channel {int(errors.argmax())}"
        if theirs is None:
            assert worst <= TOLERANCE_64, f"{where}: {worst:.2e}"
            continue
        peers = errors_of(name, theirs[name], exact)
        allowed = SINGLE_PEER_ERRORS * float(peers.max()) + FLOOR_32
        assert worst <= allowed, f"{where}: {worst:.2e}, the peer's worst is {peers.max():.2e}"
        ratios.append(((errors + FLOOR_32) / (peers + FLOOR_32)).log())
    if theirs is not None:
        assert torch.cat(ratios).mean().exp() <= MEAN_PEER_ERRORS


def errors_of(name: str, value: Tensor, reference: Tensor) -> Tensor:
    of_weight = name.endswith(".grad") and name != "x.grad"
    return (weight_errors if of_weight else channel_errors)(value, reference)


def forward_backward(module: nn.Module, x: Tensor, dy: Tensor, **options: Any) -> Results:
    """Output and every gradient, for float sequences x and dy (B, T, dim)."""
    module.zero_grad()
    dtype = next(module.parameters()).dtype
    x = x.to(dtype).detach().requires_grad_()
    y = module(x, **options)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "x.grad": cast(Tensor, x.grad), **gradients(module)}


def gradients(module: nn.Module) -> Results:
    """A parameter that gets no gradient in one package gets none in the other."""
    return {
        f"{name}.grad": parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def move_off_initial_values(module: nn.Module) -> None:
    """Norms start as ones and zeros, which would hide a missing factor or term."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma") or "norm" in name or "_ln." in name:
            parameter.add_(0.2 * torch.randn_like(parameter))


def small_phases(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Transitions near the positive real axis for positive inputs. Elsewhere the peer's relative
    positions divide by a floor of 1e-10, which multiplies every rounding by 1e10."""
    with torch.no_grad():
        for name, parameter in parameters:
            if name.endswith("token_emb.weight"):
                parameter.mul_(0.3).add_(1.0)
            elif name.endswith("to_a.0.weight"):
                parameter[0::2].abs_()
                parameter[1::2].mul_(0.3)
