"""What a model is: the description that the C++ core makes of the arguments of Transformer."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp._files import Entry


def describe(options: Mapping[str, Any]) -> dict[str, Any]:
    """The model of these options: "layers", each a mixer's name and arguments, and "weights".

    Raises:
        ValueError: naming the option that does not fit, what was expected and what came.
    """
    description = json.loads(torch.ops.gateloop._describe_model(as_json(options)))
    description["weights"] = {name: tuple(shape) for name, shape in description["weights"]}
    return dict(description)


def describe_layer(dim: int, mixer: str, **options: Any) -> dict[str, Any]:
    """One layer of a model of this width, as in "layers" of describe(), with "derived" facts.

    Raises:
        ValueError: naming the option that does not fit, what was expected and what came.
    """
    layer = as_json({"mixer": mixer, **options})
    return dict(json.loads(torch.ops.gateloop._describe_layer(layer, dim)))


def stored_problems(options: Mapping[str, Any], tensors: Mapping[str, Entry]) -> str:
    """Every missing, unexpected and misshapen tensor by name, and those of other dtypes; "": they
    are this model's weights."""
    return str(torch.ops.gateloop._stored_problems(as_json(options), json.dumps(dict(tensors))))


def stored(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as config.json holds them."""
    return dict(json.loads(torch.ops.gateloop._stored_options(as_json(options))))


def as_json(options: Mapping[str, Any]) -> str:
    """The options as the C++ core takes them."""
    return json.dumps(dict(options), default=_plain)


def _plain(value: Any) -> Any:
    """Of numbers that JSON has no notion of, as numpy's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"Transformer: options must be numbers, words and lists, got {value!r}")
