"""What a model is: the description that the C++ core makes of the options of a model.

Options have the names and defaults of the PyTorch Transformer's arguments.
"""

import json
from collections.abc import Mapping
from typing import Any

from gateloop_jax import _library
from gateloop_jax._files import Entry


def stored(options: Mapping[str, Any]) -> str:
    """The options as config.json holds them, defaults filled in, as JSON.

    Raises ValueError for an unknown option and one of another type.
    """
    plain = dict(options)
    simple = plain.get("simple_gate_loop")
    if isinstance(simple, bool):
        plain["simple_gate_loop"] = {} if simple else None
    return _library.call_text("stored_options", json.dumps(plain, default=_plain))


def describe(options: str) -> dict[str, Any]:
    """The model of what stored() gave: its numbers, and "layers", each a mixer's name and fields.

    Raises ValueError naming the option that does not fit, what was expected and what came.
    """
    return dict(json.loads(_library.call_text("describe", options)))


def stored_problems(options: str, tensors: Mapping[str, Entry]) -> str:
    """Every missing, unexpected and misshapen tensor by name, and those of other dtypes; "": they
    are this model's weights."""
    return _library.call_text("stored_problems", options, json.dumps(dict(tensors)))


def _plain(value: Any) -> Any:
    """Of numbers that JSON has no notion of, as numpy's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"GateLoopTransformer: options must be numbers, words and lists, got {value!r}")
