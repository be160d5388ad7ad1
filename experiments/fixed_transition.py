"""Models of ``gateloop_cpp`` for the tasks, also with transitions that are learned but fixed."""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gateloop_cpp import GateLoopedAttention, Transformer


class FixedTransition(nn.Module):
    """In place of ``to_a``: the same raw transition at every step, its bias: not data-controlled.

    (B, T, dim) to (B, T, C), C numbers that are learned: half the linear recurrences before
    GateLoop, such as S4's, S5's and LRU's (arXiv 2311.01927, section 2).
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.to(x.dtype).expand(*x.shape[:-1], -1).contiguous()


def fix_transitions(model: nn.Module) -> None:
    """Gives every GateLoop layer a transition that does not depend on the data."""
    for layer in model.modules():
        if isinstance(layer, GateLoopedAttention):
            bias = layer.to_a[0].bias
            assert isinstance(bias, Tensor)
            layer.to_a = nn.Sequential(FixedTransition(bias))


def make_model(num_tokens: int, flags: Sequence[str]) -> Transformer:
    """NAME=VALUE are arguments of the Transformer, and transition=data|fixed.

    Raises ValueError for a flag of another form, TypeError for an argument that there is not.
    """
    options: dict[str, Any] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals:
            raise ValueError(f"make_model: flags: expected NAME=VALUE, got {flag!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    transition = options.pop("transition", "data")
    if transition not in ("data", "fixed"):
        raise ValueError(f"make_model: transition: expected data or fixed, got {transition!r}")
    model = Transformer(num_tokens=num_tokens, **options)
    if transition == "fixed":
        fix_transitions(model)
    return model
