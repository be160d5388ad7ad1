"""Products that keep their rounding error, real and complex.

A product of many equal numbers, rounded at each factor, is off in one direction. Here the error of
a float32 product is carried beside it. float64 is rounded: its errors are 5e8 times smaller.

A number is cut into two of half as many bits (Dekker 1971, doi 10.1007/BF01397083). Products of the
parts are then exact. The cut is a mask of bits. XLA may compute a b + c with one rounding, which
changes nothing where a b is exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Exact(NamedTuple):
    """value + low, of which `value` is the rounded sum; float64 has no low part.

    Zeros are exact. Where numbers overflow, low is not a number. Derivatives are of `value`: `low`
    counts in them as a constant.
    """

    value: Array
    low: Array

    @staticmethod
    def of(x: Array) -> "Exact":
        return Exact(x, jnp.zeros_like(x))

    def times(self, other: "Exact") -> "Exact":
        """Of shapes that broadcast, in one dtype."""
        if self.value.dtype.name in ("float64", "complex128"):
            return Exact.of(self.value * other.value)
        return _times(self, other)


@jax.custom_jvp
def _times(a: Exact, b: Exact) -> Exact:
    low = a.value * b.low + a.low * b.value
    if not jnp.iscomplexobj(low):
        value, error = _product(_cut(a.value), _cut(b.value))
        return Exact(*_sum(value, low + error))
    # Both parts at once: XLA compiles a fourth of the operators.
    re, im = b.value.real, b.value.imag
    left = jnp.stack([a.value.real, a.value.imag])
    right = jnp.stack([jnp.stack([re, -im]), jnp.stack([im, re])])
    (value_1, value_2), (error_1, error_2) = (
        (x[:, 0], x[:, 1]) for x in _product(_cut(left), _cut(right))
    )
    value, error = _sum(value_1, value_2)
    low = jnp.stack([low.real, low.imag])
    value, low = _sum(value, error + (error_1 + error_2 + low))
    return Exact(lax.complex(*value), lax.complex(*low))


@_times.defjvp
def _times_jvp(primals: tuple[Exact, Exact], tangents: tuple[Exact, Exact]) -> tuple[Exact, Exact]:
    (a, b), (da, db) = primals, tangents
    # Cotangents of b are summed from the last line to the first, so that low is not rounded away.
    moved = a.value * db.value
    moved = moved + a.low * db.value
    moved = moved + da.value * b.value
    product = _times(a, b)
    return product, Exact(moved, jnp.zeros_like(product.low))


def _cut(x: Array) -> tuple[Array, Array]:
    """float32 x as a sum of two numbers of 12 bits each."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, x.dtype)
    return high, x - high


def _product(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Of cut numbers: a product rounded a few times, and its error."""
    value = a[0] * b[0]
    error = a[1] * b[1]
    for part in (a[0] * b[1], a[1] * b[0]):  # smaller than value
        total = value + part
        error = error + (part - (total - value))
        value = total
    return value, error


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Rounded, and its error (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
