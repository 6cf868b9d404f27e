"""Prefetching of batches in a thread."""

import sys
from collections.abc import Callable, Iterator

from xlstm_jax.data.batch import Batch

_AHEAD = 4  # prefetched batches: enough to hide a slow one, at little memory


class BatchIterator(Iterator[Batch]):
    """Iterates over `make(step)` for consecutive steps; use it in a `with` statement.

    Without `close`, the prefetch thread outlives the loop and the interpreter prints its tracebacks
    at exit.
    """

    def __init__(self, make: Callable[[int], Batch], start_step: int, num_steps: int | None):
        # Imported here because it takes half a second, and only training needs it.
        import grain

        stop = sys.maxsize if num_steps is None else start_step + num_steps
        steps = grain.MapDataset.range(start_step, stop).map(make)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        self._iterator = iter(steps.to_iter_dataset(options))

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

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
