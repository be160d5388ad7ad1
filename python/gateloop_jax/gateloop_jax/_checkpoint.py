"""Weights across to PyTorch and C++ and back: config.json beside safetensors.

The format is that of `gateloop train`; the tensors have the names and layouts of the PyTorch
Transformer's state_dict: a matrix is (out, in), the transition's rows alternate real and imaginary.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gateloop_jax import _files
from gateloop_jax._model import GateLoopTransformer, interleave

Tensors = dict[str, np.ndarray[Any, Any]]

# Options of the PyTorch and C++ models that the Equinox model has too, with their defaults there,
TAKEN: dict[str, Any] = {
    "num_tokens": 256,
    "dim": 512,
    "depth": 6,
    "ff_mult": 4,
    "frac_gradient_state_transition": 0.9,
}
# that it has not, with the one value it agrees with (None: also the model's dim for the widths),
FIXED: dict[str, Any] = {
    "use_gate_looped_attn": True,
    "gate_loop_heads": None,
    "dim_gate_looped_attn": None,
    "attn_add_swish_gating": True,
    "ablate_complex": False,
    "ablate_state_transition": False,
    "post_ln_norm": False,
    "sub_ln": False,
    "gate": "polar",
    "normalize_input": False,
    "transition_bias": None,
}
# and that change nothing where every layer is a GateLoop with max heads.
IDLE = (
    "dim_head",
    "heads",
    "checkpoint_gate_looped_attn",
    "attn_softmax_normalize",
    "data_dependent_rel_pos",
    "rotary_emb",
)


def load_checkpoint(
    directory: str | os.PathLike[str], weights: str = "latest"
) -> GateLoopTransformer:
    """The model in a directory of `gateloop train` or `save_checkpoint`.

    weights: "latest" (model.safetensors) or "best" (model.best.safetensors).
    Raises ValueError naming every option of that model that this one has not, and every tensor that
    is missing, unexpected or misshapen.
    """
    if weights not in _files.WEIGHTS:
        raise ValueError(f"load_checkpoint: weights must be 'latest' or 'best', got {weights!r}")
    directory = Path(directory)
    config_file, file = directory / _files.CONFIG, directory / _files.WEIGHTS[weights]
    options = _files.read_options(directory, weights)
    if problems := disagreements(options):
        raise ValueError(f"{config_file}: the Equinox model does not have {', '.join(problems)}")
    taken = {name: options.get(name, default) for name, default in TAKEN.items()}
    try:
        # Shapes only: every number comes from the file.
        model = jax.eval_shape(
            lambda: GateLoopTransformer(**taken, key=jax.random.key(0), architecture="pytorch")
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{config_file}: not the options of a model: {error}") from error
    try:
        return from_state_dict(model, load_file(file))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{file}: {error}") from error


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: GateLoopTransformer,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and model.safetensors, in float32, for PyTorch, C++ and load_checkpoint.

    training: what config.json shall say of how the model was trained.
    A crash leaves the former model or this one, never a part of each. A head tied to the embedding
    is written as a matrix of its own. Raises ValueError for a model that those do not have.
    """
    tensors = to_state_dict(model)
    _files.write_model(
        Path(directory),
        options_of(model),
        lambda path, metadata: save_file(tensors, path, metadata),
        distribution="gateloop-jax",
        versions={"jax": jax.__version__},
        training=training,
    )


def disagreements(options: Mapping[str, Any]) -> list[str]:
    """`name=value` of every option that the Equinox model cannot have."""
    dim = options.get("dim", TAKEN["dim"])
    free = {*TAKEN, *IDLE}
    allowed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in FIXED.items()}
    for width in ("gate_loop_heads", "dim_gate_looped_attn"):
        allowed[width] = (None, dim)
    return [
        f"{name}={json.dumps(value)}"
        for name, value in options.items()
        if name not in free and value not in allowed.get(name, ())
    ]


def options_of(model: GateLoopTransformer) -> dict[str, Any]:
    num_tokens, dim = model.embedding.shape
    options = dict(TAKEN, num_tokens=num_tokens, dim=dim, depth=len(model.layers))
    for mix, feed_forward in model.layers[:1]:
        options["ff_mult"] = feed_forward.proj_in.bias.shape[0] // dim
        options["frac_gradient_state_transition"] = mix.frac_gradient_state_transition
    return options | FIXED


def to_state_dict(model: GateLoopTransformer) -> Tensors:
    """The PyTorch Transformer's state_dict, float32."""
    if model.architecture != "pytorch":
        raise ValueError(
            "the model's architecture is 'jax', which PyTorch and C++ do not have: tied embedding,"
            " eps in the norms, approximate GELU, no bias of the transition;"
            " GateLoopTransformer(architecture='pytorch') is theirs"
        )
    return {name: np.ascontiguousarray(x, np.float32) for name, x in _tensors(model).items()}


def from_state_dict(
    model: GateLoopTransformer, tensors: Mapping[str, np.ndarray[Any, Any]]
) -> GateLoopTransformer:
    """`model`, of arrays or of their shapes, with the numbers of a state_dict."""
    _check(jax.eval_shape(_tensors, model), tensors)

    def array(name: str) -> Array:
        return jnp.asarray(tensors[name])

    def linear(name: str) -> tuple[Array, Array]:
        return array(f"{name}.weight").T, array(f"{name}.bias")

    numbers: list[Array] = []
    for i in range(len(model.layers)):
        mix, feed_forward = f"layers.{i}.0", f"layers.{i}.1"
        numbers += [
            array(f"{mix}.norm.gamma"),
            *jnp.split(array(f"{mix}.fn.to_qkv.weight").T, 3, axis=1),
            _halve(array(f"{mix}.fn.to_a.0.weight").T),
            array(f"{mix}.fn.to_gates.0.weight").T,
            array(f"{mix}.fn.to_out.weight").T,
            _halve(array(f"{mix}.fn.to_a.0.bias")),
            array(f"{feed_forward}.norm.gamma"),
            *linear(f"{feed_forward}.fn.0"),
            *linear(f"{feed_forward}.fn.2"),
        ]
    numbers += [
        array("token_emb.weight"),
        array("to_logits.0.gamma"),
        array("to_logits.1.weight").T,
    ]
    loaded: GateLoopTransformer = eqx.tree_at(_leaves, model, numbers)
    return loaded


def _leaves(model: GateLoopTransformer) -> list[Any]:
    """In the order of from_state_dict."""
    leaves: list[Any] = []
    for mix, feed_forward in model.layers:
        leaves += [mix.norm.gamma, mix.wq, mix.wk, mix.wv, mix.wa, mix.wg, mix.wo, mix.ba]
        leaves.append(feed_forward.norm.gamma)
        for linear in (feed_forward.proj_in, feed_forward.proj_out):
            leaves += [linear.weight, linear.bias]
    return [*leaves, model.embedding, model.norm.gamma, model.head]


def _tensors(model: GateLoopTransformer) -> dict[str, Array]:
    assert model.head is not None
    tensors = {
        "token_emb.weight": model.embedding,
        "to_logits.0.gamma": model.norm.gamma,
        "to_logits.1.weight": model.head.T,
    }
    for i, (mix, feed_forward) in enumerate(model.layers):
        assert mix.ba is not None
        tensors |= {
            f"layers.{i}.0.norm.gamma": mix.norm.gamma,
            f"layers.{i}.0.fn.to_qkv.weight": jnp.concatenate([mix.wq, mix.wk, mix.wv], 1).T,
            f"layers.{i}.0.fn.to_a.0.weight": interleave(mix.wa).T,
            f"layers.{i}.0.fn.to_a.0.bias": interleave(mix.ba),
            f"layers.{i}.0.fn.to_gates.0.weight": mix.wg.T,
            f"layers.{i}.0.fn.to_out.weight": mix.wo.T,
            f"layers.{i}.1.norm.gamma": feed_forward.norm.gamma,
            f"layers.{i}.1.fn.0.weight": feed_forward.proj_in.weight.T,
            f"layers.{i}.1.fn.0.bias": feed_forward.proj_in.bias,
            f"layers.{i}.1.fn.2.weight": feed_forward.proj_out.weight.T,
            f"layers.{i}.1.fn.2.bias": feed_forward.proj_out.bias,
        }
    return tensors


def _halve(pairs: Array) -> Array:
    """The inverse of interleave."""
    return jnp.concatenate([pairs[..., 0::2], pairs[..., 1::2]], axis=-1)


def _check(expected: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    problems = [f"missing {name}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tensor.shape}")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {tensor.shape}, the model's is {expected[name].shape}")
    if problems:
        raise ValueError(f"these weights are not this model's: {'; '.join(problems)}")
