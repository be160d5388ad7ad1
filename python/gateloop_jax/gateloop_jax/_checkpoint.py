"""Weights across to PyTorch and C++ and back: config.json beside safetensors.

The format is that of `gateloop train`; the tensors have the names and layouts of the PyTorch
Transformer's state_dict.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from gateloop_jax import _files, _library, _spec
from gateloop_jax._model import GateLoopTransformer
from gateloop_jax._weights import Numbers, to_tensors, with_tensors


def load_checkpoint(
    directory: str | os.PathLike[str], weights: str = "latest"
) -> GateLoopTransformer:
    """The model in a directory of `gateloop train`, gateloop_cpp.checkpoint or `save_checkpoint`.

    weights: "latest" (model.safetensors) or "best" (model.best.safetensors).
    Matrices of int8 (`gateloop quantize`) come as the float32 numbers that they stand for.
    Raises ValueError naming the option that does not fit, or every tensor that is missing,
    unexpected, misshapen or of another dtype, and of int8 without fitting scales.
    """
    if weights not in _files.WEIGHTS:
        raise ValueError(f"load_checkpoint: weights must be 'latest' or 'best', got {weights!r}")
    directory = Path(directory)
    config_file, file = directory / _files.CONFIG, directory / _files.WEIGHTS[weights]
    options = _files.read_options(directory, weights)
    try:
        # Shapes only: every number comes from the file.
        model = jax.eval_shape(lambda: GateLoopTransformer.from_options(options, jax.random.key(0)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{config_file}: not the options of a model: {error}") from error
    if problems := _spec.stored_problems(model.stored_options, _files.read_entries(file)):
        raise ValueError(f"{file}: {problems}")
    tensors = load_file(file)
    for name in [name for name, tensor in tensors.items() if tensor.dtype == np.int8]:
        tensors[name] = tensors[name] * tensors.pop(f"{name}.scale")[:, None]
    loaded: GateLoopTransformer = with_tensors(model, model.weights(), tensors)
    return loaded


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: GateLoopTransformer,
    training: Mapping[str, Any] | None = None,
    same_run: bool = False,
) -> None:
    """Writes config.json and model.safetensors, in float32, for PyTorch, C++ and load_checkpoint.

    training: what config.json shall say of how the model is trained. same_run: a later model of the
    run that the directory holds: config.json goes on saying when it began.
    A crash leaves the former model or this one, never a part of each. Raises ValueError for a model
    that those do not have. Also for one whose arrays are no longer those of its options.
    """
    tensors = to_state_dict(model)
    _files.write_model(
        Path(directory),
        model.options,
        lambda path, metadata: save_file(tensors, path, metadata),
        distribution="gateloop-jax",
        versions={"revision": _library.call_text("revision"), "jax": jax.__version__},
        training=training,
        same_run=same_run,
    )


def to_state_dict(model: GateLoopTransformer) -> dict[str, Numbers]:
    """The PyTorch Transformer's state_dict, float32; of tied embeddings the one matrix."""
    if model.architecture != "pytorch":
        raise ValueError(
            "the model's architecture is 'jax', which PyTorch and C++ do not have: tied embedding,"
            " eps in the norms, approximate GELU, no bias of the transition;"
            " GateLoopTransformer(architecture='pytorch') is theirs"
        )
    tensors = to_tensors(model, model.weights())
    entries = {name: _files.Entry("F32", tuple(x.shape)) for name, x in tensors.items()}
    if problems := _spec.stored_problems(model.stored_options, entries):
        raise ValueError(problems)
    return {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
