"""Batches by step as a `grain.MapDataset`, prefetched in a thread or in several processes."""

import errno
import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xlstm_jax.data.batch import Batch

_AHEAD = 4  # prefetched batches: enough to hide a slow one, at little memory


def by_step(make: Callable[[int], Batch]) -> Any:
    """The `grain.MapDataset` whose element `step` is `make(step)`."""
    # Imported here because it takes half a second, and only training needs it.
    import grain

    return grain.MapDataset.range(sys.maxsize).map(make)


class BatchIterator(Iterator[Batch]):
    """Iterates over consecutive elements of a `grain.MapDataset`; use it in a `with` statement.

    Worker processes hand over batches in shared memory, in the order of the steps. Without `close`,
    the prefetch thread outlives the loop and the interpreter prints its tracebacks at exit.

    Args:
        dataset: the batches by step; with workers it must be picklable.
        num_workers: processes; 0 is a thread of this one.

    Raises:
        OSError: on `next`, if a worker process was killed; its number is ECHILD.
    """

    def __init__(
        self,
        dataset: Any,
        start_step: int,
        num_steps: int | None,
        num_workers: int = 0,
    ):
        import grain

        stop = None if num_steps is None else start_step + num_steps
        steps = dataset[start_step:stop]
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        iterable = steps.to_iter_dataset(threads)
        if num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads its flags, with their defaults
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=_AHEAD
            )
            iterable = iterable.mp_prefetch(processes)
        self._iterator, self._is_shared = iter(iterable), num_workers > 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "was terminated unexpectedly" not in str(error):
                raise
            # ECHILD: an error of the machine, which often has run out of memory.
            reason = "a worker process of the data ended; it may have run out of memory"
            raise OSError(errno.ECHILD, reason) from error
        # Copied out of shared memory, which the interpreter fails to free if it still exists at
        # its exit.
        return Batch(*map(np.array, batch)) if self._is_shared else batch

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and the iteration. Closing twice is harmless."""
        if self._iterator is not None:
            self._iterator.close()
            # grain's cleanup at exit fails on an iterator that is still referenced.
            self._iterator = None
            if self._is_shared:
                # grain frees shared memory in a thread; at exit Python warns of what is left.
                gc.collect()
                time.sleep(0.2)
