"""Prefetching of batches, in a thread or in several processes."""

import gc
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from xlstm_jax.data.batch import Batch

_AHEAD = 4  # prefetched batches: enough to hide a slow one, at little memory


class BatchIterator(Iterator[Batch]):
    """Iterates over `make(step)` for consecutive steps; use it in a `with` statement.

    Worker processes hand over batches in shared memory, in the order of the steps. Without `close`,
    the prefetch thread outlives the loop and the interpreter prints its tracebacks at exit.

    Args:
        make: a function that can be pickled if there are workers.
        num_workers: processes; 0 is a thread of this one.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        start_step: int,
        num_steps: int | None,
        num_workers: int = 0,
    ):
        # Imported here because it takes half a second, and only training needs it.
        import grain

        stop = sys.maxsize if num_steps is None else start_step + num_steps
        steps = grain.MapDataset.range(start_step, stop).map(make)
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        dataset = steps.to_iter_dataset(threads)
        if num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads its flags, with their defaults
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=_AHEAD
            )
            dataset = dataset.mp_prefetch(processes)
        self._iterator, self._is_shared = iter(dataset), num_workers > 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
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
