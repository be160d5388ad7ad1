"""Numbers of a page as codes of 8 bits; page.js decodes them by the same constants.

Rates are kept as half-lives and inputs as sizes, both on a logarithmic scale. A step of the scale
is 5.9 per cent of a half-life and 9.4 per cent of a size. Codes are right to half of that.
"""

import math

import torch
from torch import Tensor

#: Half-lives in bytes with codes of their own; shorter and longer ones have the nearest's.
HALF_LIVES = (0.05, 1e5)
#: Sizes with codes of their own; code 0 is below the first. normalize_input makes inputs of
#: channels with long half-lives small.
SIZES = (1e-7, 1e3)
#: The least share of the influence on a byte that is kept.
LEAST_SHARE = 1 / 64
_LAST = 255


def encode_rate(rate: Tensor) -> Tensor:
    """-ln|a| as the code of the half-life ln 2 / rate."""
    least, most = HALF_LIVES
    half_life = (math.log(2) / rate).clamp(least, most)
    return _rounded((half_life / least).log() / math.log(most / least))


def decode_half_life(code: Tensor) -> Tensor:
    least, most = HALF_LIVES
    return least * (code.double() / _LAST * math.log(most / least)).exp()


def encode_size(t: Tensor) -> Tensor:
    """|t|."""
    least, most = SIZES
    size = t.abs().clamp(least, most)
    return _rounded((size / least).log() / math.log(most / least))


def decode_size(code: Tensor) -> Tensor:
    least, most = SIZES
    size = least * (code.double() / _LAST * math.log(most / least)).exp()
    return torch.where(code == 0, 0, size)


def encode_phase(phase: Tensor) -> Tensor:
    """In 256 steps of a turn."""
    return (phase / (2 * torch.pi) * 256).round().remainder(256).byte()


def decode_phase(code: Tensor) -> Tensor:
    return code.double() * (2 * torch.pi / 256)


def encode_fraction(t: Tensor) -> Tensor:
    return _rounded(t.clamp(0, 1))


def decode_fraction(code: Tensor) -> Tensor:
    return code.double() / _LAST


def encode_share(t: Tensor) -> Tensor:
    """The root, so that small shares have more codes."""
    return _rounded(t.clamp(0, 1).sqrt())


def decode_share(code: Tensor) -> Tensor:
    return decode_fraction(code).square()


def _rounded(t: Tensor) -> Tensor:
    """[0, 1] to 0 ... 255."""
    return (t * _LAST).round_().byte()
