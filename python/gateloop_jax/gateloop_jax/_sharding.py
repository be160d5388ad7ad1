"""Where the arguments of our primitives may be sharded: along leading axes and channels.

The recurrence joins the steps of time. On a mesh of explicit axes a sequence sharded along time is
an error; on one of automatic axes XLA gathers its time alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.mlir import ir
from jax.sharding import NamedSharding, PartitionSpec

# The mesh axes of the leading axes, then of the channels.
Axes = tuple[Any, ...]


def axes_of(name: str, avals: Sequence[Any]) -> Axes:
    """What the avals of one call have in common; an axis that is not sharded goes with any."""
    lead = avals[0].ndim - 2
    merged: list[Any] = [None] * (lead + 1)
    for aval in avals:
        spec = tuple(aval.sharding.spec)
        own = [*spec[:lead], spec[channels_at(lead, aval.ndim)]]
        if aval.ndim > lead + 1:
            refuse_sharded_time(name, aval, lead)
        for i, axis in enumerate(own):
            if axis is not None and merged[i] not in (None, axis):
                raise ValueError(
                    f"{name}: arguments must be sharded alike, got {merged[i]!r} and {axis!r}"
                    f" along {'channels' if i == lead else 'batch'}"
                )
            merged[i] = merged[i] if axis is None else axis
    return tuple(merged)


def refuse_sharded_time(name: str, aval: Any, axis: int) -> None:
    """`axis`: the aval's time."""
    if tuple(aval.sharding.spec)[axis] is not None:
        raise ValueError(
            f"{name}: time must not be sharded, got {aval.str_short(True)}; use"
            " jax.sharding.reshard to shard batch or channels instead"
        )


def channels_at(lead: int, ndim: int) -> int:
    """A state has no time before its channels."""
    return lead if ndim == lead + 1 else lead + 1


def spec_of(axes: Axes, ndim: int) -> PartitionSpec:
    """Of a state, sequence or pairs whose leading axes and channels are sharded along `axes`."""
    *lead, channels = axes
    if ndim == len(axes):
        return PartitionSpec(*lead, channels)
    return PartitionSpec(*lead, None, channels, *[None] * (ndim - len(axes) - 1))


def sharding_of(axes: Axes, avals: Sequence[Any], ndim: int) -> NamedSharding:
    meshes = [aval.sharding.mesh for aval in avals]
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    return NamedSharding(mesh, spec_of(axes, ndim))


def align(name: str, args: Sequence[Array]) -> list[Array]:
    """On a mesh of explicit axes, the arguments sharded alike."""
    avals = [jax.typeof(x) for x in args]
    axes = axes_of(name, avals)
    if not any(axes):
        return list(args)
    return [
        x
        if tuple(aval.sharding.spec) == tuple(spec_of(axes, x.ndim))
        else jax.sharding.reshard(x, sharding_of(axes, avals, x.ndim))
        for x, aval in zip(args, avals, strict=True)
    ]


def align_batch(*args: Array) -> list[Array]:
    """On a mesh of explicit axes, the first axes of the arguments sharded alike."""
    shardings = [jax.typeof(x).sharding for x in args]
    batch = next((s for s in shardings if s.spec and s.spec[0] is not None), None)
    if batch is None:
        return list(args)
    return [
        jax.sharding.reshard(
            x, NamedSharding(batch.mesh, PartitionSpec(batch.spec[0], *s.spec[1:]))
        )
        for x, s in zip(args, shardings, strict=True)
    ]


def replicated(x: Array) -> Array:
    """On a mesh of explicit axes too."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def attributes(lead: int, shapes_in: Sequence[Any], shapes_out: Sequence[Any]) -> dict[str, Any]:
    """Of a call whose buffers all begin with `lead` axes and the channels: how XLA partitions it
    (num_batch_dims) and how Shardy propagates shardings through it. A rule needs sizes, which an
    exported program of symbolic shapes does not have."""
    batch = ir.DictAttr.get({"num_batch_dims": ir.StringAttr.get(str(lead + 1))})
    found: dict[str, Any] = {"mhlo.frontend_attributes": batch}
    sizes = {_factor(i): shapes_in[0][i] for i in range(lead + 1)}

    def mapped(shape: Sequence[Any]) -> str:
        # Factors that may be sharded are shared; each of the others is one array's own.
        own = {_factor(len(sizes) + i): size for i, size in enumerate(shape[lead + 1 :])}
        sizes.update(own)
        return "[" + ", ".join([*map(_factor, range(lead + 1)), *own]) + "]"

    operands, results = (", ".join(map(mapped, s)) for s in (shapes_in, shapes_out))
    if all(isinstance(size, int) and size > 0 for size in sizes.values()):
        whole = ", ".join(list(sizes)[lead + 1 :])
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        found["sdy.sharding_rule"] = ir.Attribute.parse(
            f"#sdy.op_sharding_rule<({operands})->({results}) {{{given}}}"
            f" need_replication={{{whole}}}, custom>"
        )
    return found


def _factor(i: int) -> str:
    """Shardy's names: i to z, then z_1 and on."""
    return chr(ord("i") + i) if i < 18 else f"z_{i - 17}"
