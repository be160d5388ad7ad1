"""What our primitives share: kernels where there are, the definition elsewhere, vmap, sharding.

Arguments and results are sequences (..., T, D), pairs (..., T, D, 2), states (..., D) and saved
states (..., N, D). The first argument is a sequence. Leading axes and channels are independent. So
vmap adds a leading axis, and arrays sharded along those axes are computed where they lie.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir

from gateloop_jax import _library, _sharding

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

    `kernel` names the handler that computes it, without the arguments at `unread`, where the
    library has one. Where there is no kernel, and on other platforms, `definition` computes it.
    Derivatives are those of the definition until the caller gives better ones.
    """
    p = Primitive(name)
    p.multiple_results = True

    @functools.partial(jax.jit, static_argnames="reverse")
    def run(*args: Array, reverse: bool) -> Any:
        return p.bind(*args, reverse=reverse)

    def abstract(*avals: Any, reverse: bool) -> list[Any]:
        axes = _sharding.axes_of(name, avals)
        return [
            avals[0].update(
                shape=shape,
                dtype=jnp.dtype(dtype),
                weak_type=False,
                sharding=_sharding.sharding_of(axes, avals, len(shape)),
            )
            for shape, dtype in outputs(*avals)
        ]

    def batch(args: Sequence[Array], dims: Sequence[int | None], *, reverse: bool) -> Any:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)

        def lead(x: Array, d: int | None) -> Array:
            return jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)

        results = bind(p, *map(lead, args, dims), reverse=reverse)
        return results, [0] * len(results)

    def jvp(primals: Any, tangents: Any, *, reverse: bool) -> Any:
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        f = functools.partial(definition, reverse=reverse)
        return jax.jvp(f, tuple(primals), tangents)

    p.def_impl(run)
    p.def_abstract_eval(abstract)
    batching.primitive_batchers[p] = batch
    ad.primitive_jvps[p] = jvp
    mlir.register_lowering(p, mlir.lower_fun(definition, multiple_results=True))
    if kernel is None:
        return p

    def lower(ctx: Any, *operands: Any, reverse: bool, platform: str) -> Any:
        read = [i for i in range(len(operands)) if i not in unread]
        inputs = [ctx.avals_in[i] for i in read]
        target = _library.target(kernel, platform, inputs[0].shape[-2])
        return _call(target, ctx, inputs, [operands[i] for i in read], reverse)

    for platform in _library.platforms():
        rule = functools.partial(lower, platform=platform)
        mlir.register_lowering(p, rule, platform=platform)
    return p


def _call(target: str, ctx: Any, inputs: Any, operands: Any, reverse: bool) -> Any:
    """The kernel's handler. XLA partitions custom calls along leading axes. A program that it
    partitions therefore names the axes with time last. Its layout leaves memory as it is. XLA's CPU
    compiler then copies the results, so other programs name the axes as they are."""
    lead = inputs[0].ndim - 2
    turned = _is_partitioned(ctx)

    def turn(ndim: int) -> list[int]:
        order = list(range(ndim))
        if turned and ndim > lead + 1:
            order[lead : lead + 2] = [lead + 1, lead]
        return order

    def named(avals: Any) -> list[Any]:
        return [ShapedArray(tuple(a.shape[i] for i in turn(a.ndim)), a.dtype) for a in avals]

    def moved(values: Any, avals: Any) -> list[Any]:
        if not turned:
            return list(values)
        return [stablehlo.transpose(x, turn(a.ndim)) for x, a in zip(values, avals, strict=True)]

    avals_in, avals_out = named(inputs), named(ctx.avals_out)
    shapes = [a.shape for a in avals_in], [a.shape for a in avals_out]
    rule = jax.ffi.ffi_lowering(
        target,
        operand_layouts=[turn(a.ndim)[::-1] for a in avals_in],
        result_layouts=[turn(a.ndim)[::-1] for a in avals_out],
        extra_attributes=_sharding.attributes(lead, *shapes) if turned else None,
    )
    ctx_of_call = ctx.replace(avals_in=avals_in, avals_out=avals_out)
    values = rule(ctx_of_call, *moved(operands, inputs), reverse=reverse, time_last=turned)
    return moved(values, avals_out)


def _is_partitioned(ctx: Any) -> bool:
    """Several devices, and an axis of theirs that no shard_map has made manual."""
    axes = ctx.module_context.axis_context
    manual: frozenset[Any] = getattr(axes, "manual_axes", frozenset())
    mesh = getattr(axes, "mesh", None)
    if mesh is not None:
        return bool(mesh.size > 1 and set(manual) != set(mesh.axis_names))
    return bool(getattr(axes, "num_devices", 1) > 1)


def bind(p: Primitive, *args: Array, reverse: bool) -> list[Array]:
    """p.bind for arguments that differ: some vary over a shard_map's axes, or are sharded along
    explicit axes, and some do not (yet)."""
    args = tuple(_sharding.align(p.name, args))
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
    """A sequence along time."""
    return jnp.flip(x, -2) if reverse else x


def accumulation(dtype: Any) -> Any:
    """The dtype of states: bfloat16 and float16 are storage only."""
    return jnp.promote_types(dtype, jnp.float32)


def to_complex(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.complex64)
