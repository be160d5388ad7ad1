"""The gradient of a scan by the scan itself."""

from collections.abc import Callable

import torch
from torch import Tensor

Scan = Callable[[Tensor, Tensor], Tensor]


def adjoint(scan: Scan, a: Tensor, h: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Of h = scan(a, x), h_t = a_t h_{t-1} + x_t over dimension 1 from h_0 = 0, real: (da, dx).

    g_t = dh_t + a_{t+1} g_{t+1},   dx_t = g_t,   da_t = g_t h_{t-1}
    """
    after = torch.cat((a[:, 1:], torch.ones_like(a[:, :1])), 1)
    g = scan(after.flip(1), dh.flip(1)).flip(1)
    before = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), 1)
    return g * before, g
