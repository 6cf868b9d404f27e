"""Triton's interpreter with records of kernel launches and a detector of races.

The interpreter runs the programs of a launch one after another, a GPU runs them concurrently. So
without a detector it would hide races between programs, and accesses outside of an array.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from pallas_kernels import common, gpu
from tests import quick

NO_PROGRAM, SEVERAL_PROGRAMS = -1, -2


class Launch(NamedTuple):
    """Name and grid of one kernel launch."""

    name: str
    grid: tuple[int, ...]


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Yields the list of launches, in order, of the kernel calls traced inside."""
    launch_list = []
    call = gpu.call

    def recording_call(kernel, *rest, name, **settings):
        return call(_RecordingKernel(kernel, name, launch_list), *rest, name=name, **settings)

    with mock.patch.object(gpu, "call", recording_call):
        yield launch_list


def launches(function, *arguments, lanes: int = 8) -> list[Launch]:
    """The kernel launches of one call of `function`."""
    with recorded_launches() as launch_list, common.interpreted(lanes=lanes):
        # A new function object forces a new trace.
        jax.block_until_ready(quick.jit(lambda *a: function(*a))(*arguments))
    return launch_list


class _RecordingKernel(NamedTuple):
    """A kernel that appends each of its launches to a list."""

    kernel: Any
    name: str
    launch_list: list

    def __getitem__(self, grid):
        self.launch_list.append(Launch(self.name, grid))
        return self.kernel[grid]


@contextlib.contextmanager
def shared_buffers() -> Iterator[None]:
    """Kernel calls traced inside have operands and results of one shape and dtype in one buffer.

    So does XLA where a loop updates a slice of its carry by a kernel.
    """
    call = gpu.call

    def sharing_call(kernel, arrays, *rest, **settings):
        return call(_SharingKernel(kernel, len(arrays)), arrays, *rest, **settings)

    with mock.patch.object(gpu, "call", sharing_call):
        yield


class _SharingKernel(NamedTuple):
    """A kernel that gets buffers of results as operands, from the last one on."""

    kernel: Any
    num_operands: int

    def __getitem__(self, grid):
        def launch(*buffers, **constants):
            buffers = list(buffers)
            results = [x for x in buffers[self.num_operands :] if not isinstance(x, int)]
            for index in reversed(range(self.num_operands)):
                operand = buffers[index]
                alike = [x for x in results if (x.shape, x.dtype) == (operand.shape, operand.dtype)]
                if alike:
                    alike[-1].array[...] = operand.array
                    buffers[index] = alike[-1]
                    results = [x for x in results if x is not alike[-1]]
            self.kernel[grid](*buffers, **constants)

        return launch


@contextlib.contextmanager
def race_detector() -> Iterator[list[str]]:
    """Checks the memory accesses of kernels computed inside.

    Yields a list of errors: an access outside of its array, an element that two programs write, or
    an element that one program writes and another one reads.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    memory = _Memory()
    load, store = builder.create_masked_load, builder.create_masked_store

    class CheckedArray(gpu._HostArray):
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
            (gpu, "_HostArray", CheckedArray),
            (builder, "create_masked_load", create_masked_load),
            (builder, "create_masked_store", create_masked_store),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield memory.errors


class _Memory:
    """Readers and writers of every element of every array of a launch."""

    def __init__(self):
        self.errors = []
        self.programs = {}
        self.arrays = {}

    def clear(self):
        self.arrays.clear()

    def add(self, array: np.ndarray):
        users = np.full((2, array.size), NO_PROGRAM)  # readers, writers
        self.arrays.setdefault(array.ctypes.data, (array.itemsize, users))

    def read(self, addresses, mask, program):
        self._access(addresses, mask, program, "reads", writes=False)

    def write(self, addresses, mask, program):
        self._access(addresses, mask, program, "writes", writes=True)

    def _access(self, addresses, mask, program, verb: str, *, writes: bool):
        addresses = np.asarray(addresses)[np.broadcast_to(mask, addresses.shape)].ravel()
        if not addresses.size:
            return
        number = self.programs.setdefault(program, len(self.programs))
        array = self._array_of(int(addresses.min()))
        if array is None:
            self._error(f"program {program} {verb} outside of every array")
            return
        start, (itemsize, users) = array
        index = (addresses.astype(np.int64) - start) // itemsize
        if index.max() >= users.shape[1]:
            self._error(f"program {program} {verb} beyond the end of an array")
            return
        readers, writers = users[:, index]
        if ((writers != NO_PROGRAM) & (writers != number)).any():
            self._error(f"program {program} {verb} an element that another program writes")
        if writes and ((readers != NO_PROGRAM) & (readers != number)).any():
            self._error(f"program {program} writes an element that another program reads")
        previous = writers if writes else readers
        users[int(writes), index] = np.where(
            np.isin(previous, (NO_PROGRAM, number)), number, SEVERAL_PROGRAMS
        )

    def _array_of(self, address: int):
        for start, (itemsize, users) in self.arrays.items():
            if start <= address < start + itemsize * users.shape[1]:
                return start, (itemsize, users)
        return None

    def _error(self, message: str):
        if message not in self.errors:
            self.errors.append(message)
