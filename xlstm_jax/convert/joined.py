"""Tensors in which another implementation stores several of our parameters.

Rules map our parameters to names that no file has; the functions here split the stored tensors
into these parts and join them again.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xlstm_jax.convert.layouts import Shape
from xlstm_jax.convert.tensors import Source


class Joined(NamedTuple):
    """A module that concatenates weights and biases of several others; `{}` is the block index."""

    name: str
    parts: tuple[str, ...]  # a part that the model lacks is skipped
    groups: int = 1  # each has a slice of every part, one part after another


def joined(name: str, *parts: str, groups: int = 1) -> Joined:
    """A module whose parts have names below its own: `in_proj.x`, say."""
    return Joined(name, tuple(f"{name}.{part}" for part in parts), groups)


class Stored(NamedTuple):
    """A tensor as the other implementation stores it; a single part is the tensor itself."""

    parts: Mapping[str, Shape]
    groups: int = 1

    @property
    def shape(self) -> Shape:
        """Shape of the stored tensor."""
        first, *others = self.parts.values()
        return (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The stored tensor, from its parts."""
        if len(arrays) == 1:
            return arrays[0]
        grouped = [array.reshape(self.groups, -1, *array.shape[1:]) for array in arrays]
        return np.concatenate(grouped, axis=1).reshape(self.shape)

    def part(self, name: str, array: np.ndarray) -> np.ndarray:
        """One part of the stored tensor."""
        sizes = [shape[0] // self.groups for shape in self.parts.values()]
        index = list(self.parts).index(name)
        start, size = sum(sizes[:index]), sizes[index]
        grouped = array.reshape(self.groups, -1, *array.shape[1:])
        return grouped[:, start : start + size].reshape(self.groups * size, *array.shape[1:])


def stored_tensors(
    shapes: Mapping[str, Shape], modules: Iterable[Joined], num_blocks: int
) -> dict[str, Stored]:
    """Name -> tensor that the other implementation stores, for parts with these `shapes`."""
    owners = {}
    for index, module, kind in itertools.product(range(num_blocks), modules, (".weight", ".bias")):
        names = [part.format(index) + kind for part in module.parts]
        parts = {name: shapes[name] for name in names if name in shapes}
        owner = module.name.format(index) + kind, Stored(parts, module.groups)
        owners |= dict.fromkeys(parts, owner)
    return dict(owners.get(name, (name, Stored({name: shape}))) for name, shape in shapes.items())


def separate(source: Source, stored: Mapping[str, Stored]) -> Source:
    """Presents the parts of stored tensors under their own names.

    A tensor is left as it is if its leading dimension is wrong, or if a part of it exists too.
    """
    shapes, owners = dict(source.shapes), {}
    for name, tensor in stored.items():
        shape = shapes.get(name, ())
        fits = shape[:1] == tensor.shape[:1]
        if name in tensor.parts or not fits or not shapes.keys().isdisjoint(tensor.parts):
            continue
        del shapes[name]
        shapes |= {part: (own[0], *shape[1:]) for part, own in tensor.parts.items()}
        owners |= dict.fromkeys(tensor.parts, name)

    def read(name: str) -> np.ndarray:
        if name not in owners:
            return source.read(name)
        return stored[owners[name]].part(name, source.read(owners[name]))

    return Source(shapes, read)
