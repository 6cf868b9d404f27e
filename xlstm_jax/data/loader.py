"""Data sets by name, and their batches by step.

The batch of a step is a pure function of the step: sequence b of it is element
step * batch_size + b of an endless stream of epochs, each a permutation of the windows. So the
position of a run in its data is one integer, valid on any number of hosts.
"""

import functools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from xlstm_jax.config import ConfigError
from xlstm_jax.data import corpora, hashing, readers, tokenizers
from xlstm_jax.data.batch import Batch, Examples, fill_up
from xlstm_jax.data.config import SPLITS, DataConfig, Split
from xlstm_jax.data.prefetch import BatchIterator
from xlstm_jax.data.synthetic import parity
from xlstm_jax.data.synthetic.samples import Samples
from xlstm_jax.data.windows import Windows, concatenate


def _windows(corpus: readers.Corpus, cfg: DataConfig, split: Split) -> Windows:
    """One split of a corpus as tokens, with a record of all of it."""
    if not corpus.documents[split]:
        raise ConfigError(
            f"data.source={cfg.source!r} must hold at least one document for split={split!r}, and "
            "none of its files falls there; add files, or sort them into train/, valid/ and test/."
        )
    tokenizer = tokenizers.get(cfg.tokenizer)
    tokens = concatenate(corpus.documents[split], tokenizer)
    description = corpus.describe() | {
        "split": split,
        "tokenizer": tokenizer.name,
        "num_tokens": len(tokens),
        "python": platform.python_version(),  # built-in text differs between versions
    }
    return Windows(tokens, cfg.seq_len, tokenizer, description)


def _corpus(cfg: DataConfig, split: Split) -> Windows:
    return _windows(corpora.read_corpus(cfg.source), cfg, split)


# Every source that goes by a name; anything else is a path.
DATASETS: dict[str, Callable[[DataConfig, Split], Examples]] = {
    **dict.fromkeys(corpora.CORPORA, _corpus),
    "parity": functools.partial(Samples, parity.task, parity.VOCAB_SIZE),
}


def load(cfg: DataConfig, split: Split) -> Examples:
    """One split: `Windows` for text, `Samples` for a synthetic task.

    Raises:
        ConfigError: the source is not known or not there, or it has nothing for this split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not known; use one of: {', '.join(SPLITS)}.")
    if cfg.source in DATASETS:
        return DATASETS[cfg.source](cfg, split)
    if not Path(cfg.source).expanduser().exists():
        raise ConfigError(
            f"data.source={cfg.source!r} is neither the name of a data set nor a path that exists; "
            f"use a name ({', '.join(DATASETS)}) or give the path of "
            f"{readers.LAYOUT.format(pattern=cfg.pattern)}."
        )
    return _windows(readers.read_path(cfg.source, cfg.pattern), cfg, split)


def batch_at(
    examples: Examples, cfg: DataConfig, step: int, *, host_index: int = 0, host_count: int = 1
) -> Batch:
    """The sequences that step `step` trains on; with several hosts, this host's block of them.

    Every epoch has every window once, in an order of its own from (seed, epoch). A batch that
    reaches the end of one continues with the next, so no window is dropped.

    Raises:
        ConfigError: the batch is larger than the data, or hosts cannot share it evenly.
    """
    if step < 0:
        raise ConfigError(f"step must be at least 0, got {step}; 0 is the first batch of a run.")
    if cfg.batch_size > len(examples):
        raise ConfigError(
            f"data.batch_size={cfg.batch_size} must be at most the {len(examples)} rows of "
            f"data.source={cfg.source!r}; make the batch or data.seq_len smaller, or add text."
        )
    rows = _host_rows(cfg, host_index, host_count)
    position = step * cfg.batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)
    epoch, place = np.divmod(position, len(examples))
    if not examples.shuffle:
        return examples.batch(place)
    keys = hashing.fold(hashing.key(cfg.seed), epoch.astype(np.uint64))
    return examples.batch(hashing.permute(place, len(examples), keys))


def _host_rows(cfg: DataConfig, host_index: int, host_count: int) -> range:
    """The block of a global batch that one host feeds; the blocks in order are the batch."""
    if host_count < 1 or cfg.batch_size % host_count:
        raise ConfigError(
            f"data.batch_size={cfg.batch_size} must be a multiple of host_count={host_count}, as "
            "every host feeds the same number of rows; change the one or the other."
        )
    if not 0 <= host_index < host_count:
        raise ConfigError(
            f"host_index must lie in 0..{host_count - 1} for host_count={host_count}, got "
            f"{host_index}; pass the number of this process."
        )
    share = cfg.batch_size // host_count
    return range(host_index * share, (host_index + 1) * share)


def batches(
    examples: Examples,
    cfg: DataConfig,
    start_step: int = 0,
    num_steps: int | None = None,
    *,
    host_index: int = 0,
    host_count: int = 1,
) -> BatchIterator:
    """`batch_at` of start_step, start_step + 1, ..., prepared ahead by a thread.

    A context manager; without `num_steps` it does not end. To resume, start at the step that
    comes next: there is no other state.
    """
    make = functools.partial(batch_at, examples, cfg, host_index=host_index, host_count=host_count)
    # Bad arguments raise here, in the caller's thread, and not at the first batch.
    make(start_step)
    return BatchIterator(make, start_step, num_steps)


def eval_batches(
    examples: Examples,
    cfg: DataConfig,
    max_batches: int | None = None,
    *,
    host_index: int = 0,
    host_count: int = 1,
) -> Iterator[Batch]:
    """Every window once, in order; the last batch is padded with sequences of weight 0.

    With `max_batches`, as many windows as they hold, spread evenly over all of them: an unbiased
    sample, the same one every time.
    """
    rows = _host_rows(cfg, host_index, host_count)
    count = len(examples) if max_batches is None else max_batches * cfg.batch_size
    index = eval_index(len(examples), count)
    for first in range(0, len(index), cfg.batch_size):
        own = index[first + rows.start : first + rows.stop]
        yield fill_up(examples.batch(own), len(rows))


def eval_index(num_windows: int, count: int) -> Int64[np.ndarray, "N"]:
    """`count` window numbers in order, the middles of equal parts; all where there are fewer."""
    count = min(count, num_windows)
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_windows // (2 * max(count, 1))
