"""Model directories, shared with the C++ trainer: config.json beside safetensors files.

    DIR/config.json               {"format": 1, "model": {the arguments of Transformer}, ...}
    DIR/model.safetensors         the last weights, by state_dict name
    DIR/model.best.safetensors    the best at validation, where there was one

The C++ program (``gateloop evaluate``, ``gateloop generate``) reads what is written here.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateloop_cpp import _files, _spec
from gateloop_cpp._checks import expect
from gateloop_cpp._sharded import Shards, gathered
from gateloop_cpp.transformer import Transformer


def load(
    directory: str | os.PathLike[str], weights: Literal["latest", "best"] = "latest"
) -> Transformer:
    """The model in a directory, in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: naming the file and what is wrong with it: the format, an unknown option, a
            missing, unexpected or misshapen tensor, one of another dtype, a matrix of int8 whose
            scales do not fit.
    """
    options = load_options(directory, weights)
    with _config_named(directory):
        model = Transformer(**options)
    tensors = load_weights(directory, weights)
    if model.options["tie_embeddings"]:
        tensors[model.logits_weight] = tensors["token_emb.weight"]
    model.load_state_dict(tensors)
    return model.eval()


def load_options(
    directory: str | os.PathLike[str], weights: Literal["latest", "best"] = "latest"
) -> dict[str, Any]:
    """The arguments of Transformer that config.json, or else the weights, hold."""
    expect(weights in _files.WEIGHTS, "checkpoint", "weights", '"latest" or "best"', weights)
    options = _files.read_options(Path(directory), weights)
    unknown = options.keys() - inspect.signature(Transformer.__init__).parameters.keys()
    if unknown:
        path = Path(directory) / _files.CONFIG
        raise ValueError(f"{path}: unknown options {', '.join(sorted(unknown))}")
    return options


def load_weights(
    directory: str | os.PathLike[str], weights: Literal["latest", "best"] = "latest"
) -> dict[str, Tensor]:
    """A state_dict, which the reference's class takes as well where it has the options.

    Matrices of int8 (``gateloop quantize``) come as the float32 numbers that they stand for. Raises
    what :func:`load` does.
    """
    options = load_options(directory, weights)
    path = Path(directory) / _files.WEIGHTS[weights]
    with path.open("rb") as file:
        entries = _files.read_entries(path)
        with _config_named(directory):
            problems = _spec.stored_problems(options, entries)
        if problems:
            raise ValueError(f"{path}: {problems}")
        # By its descriptor: torch maps files whose names are UTF-8 alone.
        tensors = load_file(f"/dev/fd/{file.fileno()}")
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        tensors[name] = tensors[name].float() * tensors.pop(f"{name}.scale").unsqueeze(1)
    return tensors


def save(
    model: Transformer,
    directory: str | os.PathLike[str],
    overwrite: bool = False,
    training: Mapping[str, Any] | None = None,
    same_run: bool = False,
) -> None:
    """Write a model, float32, into a directory, which is made if need be.

    With tie_embeddings the one matrix is written once. A tensor that was given two names otherwise
    is written under both: tie it again after load().
    training: what config.json shall say of how the model is trained. same_run: a later model of the
    run that the directory holds: config.json goes on saying when it began.
    A crash leaves the former model or this one, never a part of each.

    A model that is sharded over processes (FSDP2, tensor parallelism) is gathered: all of them have
    to call this, one writes, and the files are there when any returns. Of replicas
    (DistributedDataParallel) one process saves the wrapper's ``module``.

    Raises:
        FileExistsError: if a model is there already and overwrite is False. Nothing is changed.
        RuntimeError: in the other processes of a sharded model, where the one that writes failed.
    """
    expected = "a gateloop_cpp.Transformer, of a wrapper the model in it"
    expect(isinstance(model, Transformer), "save", "model", expected, type(model))
    stored = _stored_tensors(model)
    shards = Shards(stored.values())
    # Copies: safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in gathered(stored)
        if shards.writer
    }
    failure: Exception | None = None
    if shards.writer:
        try:
            _write(model.options, tensors, Path(directory), overwrite, training, same_run)
        except Exception as error:
            failure = error
    failed = shards.any(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"save: {directory} was not written: see the error of the first process")


def _stored_tensors(model: Transformer) -> dict[str, Tensor]:
    tied = model.logits_weight if model.options["tie_embeddings"] else None
    return {name: tensor for name, tensor in model.state_dict().items() if name != tied}


def _write(
    options: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
    overwrite: bool,
    training: Mapping[str, Any] | None,
    same_run: bool,
) -> None:
    names = (_files.CONFIG, *_files.WEIGHTS.values())
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(f"save: {folder} holds {', '.join(present)}: pass overwrite=True")
    _files.write_model(
        folder,
        _spec.stored(options),
        lambda path, metadata: save_file(tensors, path, metadata),
        distribution="gateloop-cpp",
        versions={
            "revision": torch.ops.gateloop._revision(),
            "torch": torch.__version__,
        },
        training=training,
        same_run=same_run,
    )


@contextlib.contextmanager
def _config_named(directory: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        path = Path(directory) / _files.CONFIG
        raise ValueError(f"{path}: not the options of a model: {error}") from error
