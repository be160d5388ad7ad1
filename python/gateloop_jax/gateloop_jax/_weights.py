"""From a module's leaves to the tensors of a PyTorch state_dict, and back.

Our matrices are (in, out), PyTorch's (out, in). A transition's columns are all real parts, then all
imaginary ones; PyTorch's rows alternate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

Numbers = np.ndarray[Any, Any]
# Names of attributes and indices of tuples, from a module down to a leaf.
Path = tuple[str | int, ...]


class Layout(NamedTuple):
    to_torch: Callable[[Numbers], Numbers]
    from_torch: Callable[[Numbers], Numbers]


def _alternate(halves: Numbers) -> Numbers:
    return np.stack(np.split(halves, 2, axis=-1), axis=-1).reshape(halves.shape)


def _halve(pairs: Numbers) -> Numbers:
    return np.concatenate([pairs[..., 0::2], pairs[..., 1::2]], axis=-1)


ROWS = Layout(lambda x: x, lambda x: x)
COLUMNS = Layout(np.transpose, np.transpose)  # which leaves vectors as they are
PAIRS = Layout(lambda x: _alternate(x).T, lambda x: _halve(x.T))


class Weight(NamedTuple):
    name: str  # in the state_dict
    leaves: tuple[Path, ...]  # side by side
    layout: Layout


def own(module: Any, name: str, *leaves: str, layout: Layout = COLUMNS) -> Iterator[Weight]:
    """The weight of those leaves that the module has, if any."""
    paths = tuple((leaf,) for leaf in leaves if getattr(module, leaf) is not None)
    if paths:
        yield Weight(name, paths, layout)


def within(name: str, path: Path, module: Any) -> Iterator[Weight]:
    """The weights of a module inside another, which may be None, as the other's."""
    if module is not None:
        for weight in module.weights():
            leaves = tuple((*path, *leaf) for leaf in weight.leaves)
            yield Weight(name + weight.name, leaves, weight.layout)


def to_tensors(model: Any, weights: Iterable[Weight]) -> dict[str, Numbers]:
    return {
        name: layout.to_torch(np.concatenate([np.asarray(_at(model, p)) for p in leaves], axis=-1))
        for name, leaves, layout in weights
    }


def with_tensors(model: Any, weights: Iterable[Weight], tensors: Mapping[str, Numbers]) -> Any:
    """`model`, of arrays or of their shapes, with the numbers of the tensors."""
    paths: list[Path] = []
    numbers = []
    for name, leaves, layout in weights:
        paths += leaves
        ends = np.cumsum([_at(model, path).shape[-1] for path in leaves])
        parts = np.split(layout.from_torch(tensors[name]), ends[:-1], axis=-1)
        numbers += [jnp.asarray(part) for part in parts]
    return eqx.tree_at(lambda m: [_at(m, path) for path in paths], model, numbers)


def _at(tree: Any, path: Path) -> Any:
    for step in path:
        tree = getattr(tree, step) if isinstance(step, str) else tree[step]
    return tree
