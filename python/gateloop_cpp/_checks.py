"""Errors that name the function, the argument, what was expected and what came."""

from torch import Tensor


def expect(
    condition: bool,
    function: str,
    argument: str,
    expected: str,
    got: object,
    kind: type[Exception] = ValueError,
) -> None:
    if condition:
        return
    came = f"{got.dtype} of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
    raise kind(f"{function}: {argument} must be {expected}, got {came}")


def expect_positive(function: str, **sizes: int) -> None:
    for argument, size in sizes.items():
        expect(size > 0, function, argument, "positive", size)


def expect_sequence(function: str, x: Tensor, dim: int) -> None:
    """x must be (B, T, dim), floating point."""
    expect(x.ndim == 3 and x.shape[2] == dim, function, "x", f"(B, T, {dim})", x)
    expect(x.is_floating_point(), function, "x", "floating point", x, TypeError)
