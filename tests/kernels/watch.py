"""Triton's interpreter with its eyes open: what is launched, and who touches which element.

Programs of a launch run one after the other here and at once on a GPU, so an order that happens to
be right would not show; nor would an address that lies beyond an array.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from pallas_kernels import common, gpu
from tests import quick

NOBODY, SEVERAL = -1, -2


class Launch(NamedTuple):
    """One kernel as it was started."""

    name: str
    grid: tuple[int, ...]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Gives a list of the kernels that are started by what is traced inside, in order."""
    found = []
    call = gpu.call

    def recording(kernel, *rest, name, **settings):
        return call(_Recorded(kernel, name, found), *rest, name=name, **settings)

    with mock.patch.object(gpu, "call", recording):
        yield found


def launches(function, *arguments, lanes: int = 8) -> list[Launch]:
    """Every kernel that computing `function` starts."""
    with recorded() as found, common.interpreted(lanes=lanes):
        # A new function, as what has been traced before is not traced again.
        jax.block_until_ready(quick.jit(lambda *a: function(*a))(*arguments))
    return found


class _Recorded(NamedTuple):
    """A kernel that writes down each launch."""

    kernel: Any
    name: str
    found: list

    def __getitem__(self, grid):
        self.found.append(Launch(self.name, grid))
        return self.kernel[grid]


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Kernels computed inside have their addresses checked.

    Gives a list of sentences, one for each fault: an address outside of the array that the others
    lie in, an element that two programs write, or that one writes and another one reads.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    memory = _Memory()
    load, store = builder.create_masked_load, builder.create_masked_store

    class Watched(gpu._HostArray):
        def __init__(self, array):
            super().__init__(array)
            memory.add(array)

        def copy_(self, other):
            memory.clear()  # the launch is over

    def create_masked_load(ptrs, mask, *rest):
        memory.read(ptrs.data, mask.data, builder.grid_idx)
        return load(ptrs, mask, *rest)

    def create_masked_store(ptrs, value, mask, *rest):
        memory.write(ptrs.data, mask.data, builder.grid_idx)
        return store(ptrs, value, mask, *rest)

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (gpu, "_HostArray", Watched),
            (builder, "create_masked_load", create_masked_load),
            (builder, "create_masked_store", create_masked_store),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield memory.faults


class _Memory:
    """For every element of every array of a launch, which program has read and written it."""

    def __init__(self):
        self.faults = []
        self.programs = {}
        self.arrays = {}

    def clear(self):
        self.arrays.clear()

    def add(self, array: np.ndarray):
        nobody = np.full((2, array.size), NOBODY)  # readers, writers
        self.arrays.setdefault(array.ctypes.data, (array.itemsize, nobody))

    def read(self, addresses, mask, program):
        self._touch(addresses, mask, program, "reads", writes=False)

    def write(self, addresses, mask, program):
        self._touch(addresses, mask, program, "writes", writes=True)

    def _touch(self, addresses, mask, program, verb: str, *, writes: bool):
        addresses = np.asarray(addresses)[np.broadcast_to(mask, addresses.shape)].ravel()
        if not addresses.size:
            return
        number = self.programs.setdefault(program, len(self.programs))
        found = self._array_of(int(addresses.min()))
        if found is None:
            self._fault(f"program {program} {verb} outside of every array")
            return
        start, (itemsize, users) = found
        index = (addresses.astype(np.int64) - start) // itemsize
        if index.max() >= users.shape[1]:
            self._fault(f"program {program} {verb} beyond an array")
            return
        readers, writers = users[:, index]
        if ((writers != NOBODY) & (writers != number)).any():
            self._fault(f"program {program} {verb} what another one writes")
        if writes and ((readers != NOBODY) & (readers != number)).any():
            self._fault(f"program {program} writes what another one reads")
        used = writers if writes else readers
        users[int(writes), index] = np.where(np.isin(used, (NOBODY, number)), number, SEVERAL)

    def _array_of(self, address: int):
        for start, (itemsize, users) in self.arrays.items():
            if start <= address < start + itemsize * users.shape[1]:
                return start, (itemsize, users)
        return None

    def _fault(self, sentence: str):
        if sentence not in self.faults:
            self.faults.append(sentence)
