"""Errors of each channel beside that channel's own size: a large channel hides no small one.

A channel is what has one index in the last dimension of activations, and a row of the gradient of
a weight. ``of`` names these dimensions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def by_channel(t: Any, of: int | tuple[int, ...] = -1) -> Tensor:
    """(channels, numbers of one) in float64 or complex128, of a tensor or an array."""
    if not isinstance(t, Tensor):
        array = np.asarray(t)
        t = torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))
    kept = (of,) if isinstance(of, int) else of
    wide = t.detach().to(torch.promote_types(t.dtype, torch.float64))
    wide = wide.reshape(1) if wide.ndim == 0 else wide.movedim(kept, tuple(range(len(kept))))
    channels = wide.shape[: len(kept)].numel()
    return wide.reshape(channels, wide.numel() // max(channels, 1))


def sizes(t: Any, of: int | tuple[int, ...] = -1) -> Tensor:
    """(channels,): the largest magnitude of each."""
    numbers = by_channel(t, of)
    return numbers.abs().amax(1) if numbers.numel() > 0 else numbers.real.new_zeros(len(numbers))


def channel_errors(
    ours: Any, theirs: Any, of: int | tuple[int, ...] = -1, least: float = 0.0
) -> Tensor:
    """(channels,): the largest error of each over its size in `theirs`, which is at least `least`.

    `least` is for channels that are zero but for roundings, where the terms of sums cancel.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    errors = sizes(by_channel(ours, of) - by_channel(theirs, of), 0)
    return errors / sizes(theirs, of).clamp_min(max(least, 1e-300))


def weight_errors(ours: Any, theirs: Any, least: float = 0.0) -> Tensor:
    """Of the gradient of a weight, whose channels are its rows. One of a bias or a gain sums
    numbers of both signs over all steps: where they cancel it counts as a sixteenth of the largest.
    """
    if theirs.ndim == 1 and theirs.shape[0] > 0:
        least = max(least, float(abs(theirs).max()) / 16)
    return channel_errors(ours, theirs, 0, least)


def assert_near(
    ours: Any,
    theirs: Any,
    scaled: float,
    relative: float = 0.0,
    of: int | tuple[int, ...] = -1,
    least: float = 0.0,
    what: str = "",
) -> None:
    """Errors within `scaled` of the size of their channel, and `relative` of each number."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    found, expected = by_channel(ours, of), by_channel(theirs, of)
    allowed = scaled * sizes(theirs, of).clamp_min(least)[:, None] + relative * expected.abs()
    if isinstance(ours, Tensor):  # what is too small for a normal number
        info = torch.finfo(ours.dtype)
        allowed = allowed + info.smallest_normal * info.eps
    excess = (found - expected).abs() - allowed
    if excess.numel() > 0:
        worst, channel = excess.amax(1).max(0)
        assert excess.le(0).all(), f"{what}: by {worst}, channel {channel}"
