"""Autocast in one place."""

import torch
from torch import Tensor


def cast_once(x: Tensor) -> Tensor:
    """Up to three projections read x, and under autocast each would cast it anew."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype == torch.float64 or not enabled:
        return x
    return x.to(torch.get_autocast_dtype(device))
