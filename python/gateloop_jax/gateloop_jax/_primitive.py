"""What our primitives share: a kernel on CPU, the definition elsewhere, vmap by folding.

Every argument and every result of ours begins with the batch axis. That makes one batching rule
serve all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gateloop_jax import _library

Definition = Callable[..., Sequence[Array]]
# Avals of the arguments -> (shape, dtype) of each result.
Outputs = Callable[..., Sequence[tuple[tuple[int, ...], Any]]]


def primitive(
    name: str,
    definition: Definition,
    outputs: Outputs,
    kernel: str | None = None,
    unread: tuple[int, ...] = (),
) -> Primitive:
    """A primitive with the one parameter `reverse`.

    `kernel` names the handler that computes it on CPU, without the arguments at `unread`; where
    there is none, and on other platforms, `definition` does. Derivatives are those of the
    definition until the caller gives better ones.
    """
    p = Primitive(name)
    p.multiple_results = True

    @functools.partial(jax.jit, static_argnames="reverse")
    def run(*args: Array, reverse: bool) -> Any:
        return p.bind(*args, reverse=reverse)

    def abstract(*avals: Any, reverse: bool) -> list[Any]:
        return [
            avals[0].update(shape=s, dtype=jnp.dtype(d), weak_type=False)
            for s, d in outputs(*avals)
        ]

    def batch(args: Sequence[Array], dims: Sequence[int | None], *, reverse: bool) -> Any:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)

        def fold(x: Array, d: int | None) -> Array:
            x = jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
            return x.reshape(size * x.shape[1], *x.shape[2:])

        results = p.bind(*map(fold, args, dims), reverse=reverse)
        count = args[0].shape[0 if dims[0] is None else int(dims[0] == 0)]
        return [y.reshape(size, count, *y.shape[1:]) for y in results], [0] * len(results)

    def jvp(primals: Any, tangents: Any, *, reverse: bool) -> Any:
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        f = functools.partial(definition, reverse=reverse)
        return jax.jvp(f, tuple(primals), tangents)

    p.def_impl(run)
    p.def_abstract_eval(abstract)
    batching.primitive_batchers[p] = batch
    ad.primitive_jvps[p] = jvp
    mlir.register_lowering(p, mlir.lower_fun(definition, multiple_results=True))
    if kernel is not None:
        call = jax.ffi.ffi_lowering(_library.target(kernel))

        def lower(ctx: Any, *operands: Any, reverse: bool) -> Any:
            read = [i for i in range(len(operands)) if i not in unread]
            ctx = ctx.replace(avals_in=[ctx.avals_in[i] for i in read])
            return call(ctx, *(operands[i] for i in read), reverse=reverse)

        mlir.register_lowering(p, lower, platform="cpu")
    return p


def bind(p: Primitive, *args: Array, reverse: bool) -> list[Array]:
    """p.bind for arguments of which some vary over a shard_map's axes and some do not (yet)."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in args]
    everywhere = frozenset[Any]().union(*axes)

    def vary(x: Array, own: frozenset[Any]) -> Array:
        missing = tuple(everywhere - own)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    results: list[Array] = p.bind(*map(vary, args, axes), reverse=reverse)
    return results


def set_transpose(
    p: Primitive, first_linear: int, transpose: Callable[..., Sequence[Array]]
) -> None:
    """`transpose(*args, *cotangents, reverse)` of a primitive linear in its arguments from
    `first_linear` on; it is given the arguments before."""

    def rule(cotangents: Any, *args: Any, reverse: bool) -> list[Any]:
        cotangents = map(ad.instantiate_zeros, cotangents)
        results = transpose(*args[:first_linear], *cotangents, reverse=reverse)
        wanted = map(ad.is_undefined_primal, args[first_linear:])
        given: list[Any] = [None] * first_linear
        return given + [ct if w else None for w, ct in zip(wanted, results, strict=True)]

    ad.primitive_transposes[p] = rule


def flip(x: Array, reverse: bool) -> Array:
    """Along time."""
    return jnp.flip(x, 1) if reverse else x


def accumulation(dtype: Any) -> Any:
    """The dtype of states: bfloat16 and float16 are storage only."""
    return jnp.promote_types(dtype, jnp.float32)


def to_complex(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.complex64)
