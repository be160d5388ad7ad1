"""Model directories, shared with the C++ trainer: config.json beside safetensors files.

    DIR/config.json               {"format": 1, "model": {the arguments of Transformer}, ...}
    DIR/model.safetensors         the last weights, by state_dict name
    DIR/model.best.safetensors    the best at validation, where there was one

The C++ program (``gateloop evaluate``, ``gateloop generate``) reads what is written here.
"""

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateloop_cpp._checks import expect
from gateloop_cpp.transformer import Transformer

FORMAT = 1
_CONFIG = "config.json"
_WEIGHTS = {"latest": "model.safetensors", "best": "model.best.safetensors"}


def load(
    directory: str | os.PathLike[str], weights: Literal["latest", "best"] = "latest"
) -> Transformer:
    """The model in a directory, in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: naming the file that is not there.
        ValueError: naming the file and what is wrong with it: the format, an unknown option, a
            missing, unexpected or misshapen tensor.
    """
    model = Transformer(**load_options(directory))
    try:
        model.load_state_dict(load_weights(directory, weights))
    except RuntimeError as error:
        path = Path(directory) / _WEIGHTS[weights]
        raise ValueError(f"{path}: these weights are not this model's: {error}") from error
    return model.eval()


def load_options(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of Transformer that config.json holds."""
    path = Path(directory) / _CONFIG
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f'{path}: not a model configuration: no "model" in it')
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format {config.get('format')}; this package reads {FORMAT}")
    options: dict[str, Any] = config["model"]
    unknown = options.keys() - inspect.signature(Transformer.__init__).parameters.keys()
    if unknown:
        raise ValueError(f"{path}: unknown options {', '.join(sorted(unknown))}")
    return options


def load_weights(
    directory: str | os.PathLike[str], weights: Literal["latest", "best"] = "latest"
) -> dict[str, Tensor]:
    """A state_dict, which the reference's class takes as well where it has the options."""
    expect(weights in _WEIGHTS, "load_weights", "weights", '"latest" or "best"', weights)
    path = Path(directory) / _WEIGHTS[weights]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from error


def save(model: Transformer, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a model, float32, into a directory, which is made if need be.

    Each file is written beside its place, flushed to the disk and then renamed: a crash leaves the
    former file whole.

    Raises:
        FileExistsError: if a model is there already and overwrite is False. Nothing is changed.
    """
    ours = isinstance(model, Transformer)
    expect(ours, "save", "model", "a gateloop_cpp.Transformer", type(model))
    folder = Path(directory)
    present = [name for name in (_CONFIG, *_WEIGHTS.values()) if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(f"save: {folder} holds {', '.join(present)}: pass overwrite=True")
    folder.mkdir(parents=True, exist_ok=True)

    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    config = json.dumps({"format": FORMAT, "model": model.options}, indent=2)
    _replace(folder / _WEIGHTS["latest"], lambda path: save_file(tensors, path))
    _replace(folder / _CONFIG, lambda path: path.write_text(config + "\n"))
    # What was the best of another model is none of this one's.
    (folder / _WEIGHTS["best"]).unlink(missing_ok=True)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
