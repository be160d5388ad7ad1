"""Autocast in one place."""

import torch
from torch import Tensor


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device."""
    available = torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def cast_once(x: Tensor) -> Tensor:
    """Up to three projections read x, and under autocast each would cast it anew."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
