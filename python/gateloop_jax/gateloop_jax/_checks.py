"""Arguments are judged at trace time; a message names the function and the argument."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gateloop_jax._primitive import accumulation, to_complex

REAL = ("float32", "float64", "bfloat16", "float16")
COMPLEX = ("complex64", "complex128")


def sequence(function: str, name: str, x: ArrayLike, dtypes: tuple[str, ...]) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 3:
        raise ValueError(f"{function}: {name} must be (B, T, D), got shape {x.shape}")
    if x.dtype.name not in dtypes:
        raise TypeError(f"{function}: {name} must be one of {', '.join(dtypes)}, got {x.dtype}")
    return x


def like(
    function: str, name: str, x: ArrayLike, other_name: str, other: Array, parts: int = 1
) -> Array:
    """`parts` numbers a channel."""
    x = same_shape(function, name, x, other_name, (*other.shape[:-1], parts * other.shape[-1]))
    if x.dtype != other.dtype:
        raise TypeError(
            f"{function}: {name} must be {other.dtype} as {other_name} is, got {x.dtype}"
        )
    return x


def same_shape(
    function: str, name: str, x: ArrayLike, other_name: str, shape: tuple[int, ...]
) -> Array:
    x = jnp.asarray(x)
    if x.shape != shape:
        raise ValueError(
            f"{function}: {name} must be {shape} to go with {other_name}, got shape {x.shape}"
        )
    return x


def state(
    function: str,
    x: ArrayLike | None,
    sequence: Array,
    dtype: Any = None,
    segments: int | None = None,
) -> Array:
    """The initial state (B, D), or (B, N, D) of N segments; zeros if there is none."""
    named, count = ("(B, D)", ()) if segments is None else ("(B, N, D)", (segments,))
    shape = (sequence.shape[0], *count, sequence.shape[2])
    dtype = jnp.dtype(accumulation(sequence.dtype) if dtype is None else dtype)
    if x is None:
        return jnp.zeros(shape, dtype)
    x = jnp.asarray(x)
    if x.shape != shape:
        raise ValueError(
            f"{function}: initial_state must be {named} = {shape}, got shape {x.shape}"
        )
    if x.dtype != dtype:
        raise TypeError(
            f"{function}: initial_state must be {dtype} for {sequence.dtype} sequences,"
            f" got {x.dtype}"
        )
    return x


def transition(function: str, a: Array, q: Array) -> None:
    """a in a dtype of states to go with q."""
    real = jnp.dtype(accumulation(q.dtype))
    if a.dtype not in (real, to_complex(real)):
        raise TypeError(
            f"{function}: a must be {real} or {to_complex(real)} for {q.dtype} sequences,"
            f" got {a.dtype}"
        )
