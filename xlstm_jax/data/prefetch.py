"""Batches made ahead of their use, in a thread."""

import sys
from collections.abc import Callable, Iterator

from xlstm_jax.data.batch import Batch

_AHEAD = 4  # batches ready at any time: enough to hide a slow one, little memory


class BatchIterator(Iterator[Batch]):
    """`make(step)` of consecutive steps, in order; use it in a `with` statement.

    Closing it matters: the thread behind it would otherwise outlive the loop, and the interpreter
    would print tracebacks of it at exit.
    """

    def __init__(self, make: Callable[[int], Batch], start_step: int, num_steps: int | None):
        # Half a second of import that only training needs.
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
        """Ends the thread; there are no batches after it. Closing twice is harmless."""
        if self._iterator is not None:
            self._iterator.close()
            # grain's own clean-up at exit fails on an iterator that is still referenced.
            self._iterator = None
