"""Named data sets and their batches.

The batch of a step is a pure function of the step: its sequence b is element step * batch_size + b
of an endless stream of epochs, each of which is a permutation of the windows. The progress of a run
in its data is therefore one integer, valid for any number of hosts.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int64

from xlstm_jax.config import ConfigError
from xlstm_jax.data import corpora, documents, hashing, tokenizers
from xlstm_jax.data.batch import Batch, Examples, pad_batch
from xlstm_jax.data.config import SPLITS, DataConfig, Split
from xlstm_jax.data.prefetch import BatchIterator
from xlstm_jax.data.synthetic import parity
from xlstm_jax.data.synthetic.samples import Samples
from xlstm_jax.data.windows import Windows, concatenate
from xlstm_jax.errors import quote


def _windows(corpus: documents.Corpus, cfg: DataConfig, split: str) -> Windows:
    """The windows of one split, with a description of all of its corpus."""
    if not corpus.documents[split]:
        counts = ", ".join(f"{len(docs)} in {name}" for name, docs in corpus.documents.items())
        raise ConfigError(
            f"data.source={quote(cfg.source)} must have at least one document for split={split!r}, "
            f"got none ({counts}); add text, or sort it into train/, valid/ and test/."
        )
    tokenizer = tokenizers.get(cfg.tokenizer)
    tokens = concatenate(corpus.documents[split], tokenizer)
    description = corpus.describe() | {
        "split": split,
        "tokenizer": tokenizer.name,
        "num_tokens": len(tokens),
    }
    # The name of a built-in corpus identifies it; the path of a text does not.
    description |= {"source": corpus.name} if corpus.name in corpora.CORPORA else {}
    return Windows(tokens, cfg.seq_len, tokenizer, description)


def _corpus(cfg: DataConfig, split: Split) -> Windows:
    return _windows(corpora.read_corpus(cfg.source), cfg, split)


# Named sources; any other source is a path.
DATASETS: dict[str, Callable[[DataConfig, Split], Examples]] = {
    **dict.fromkeys(corpora.CORPORA, _corpus),
    "parity": functools.partial(Samples, parity.task, parity.VOCAB_SIZE),
}


def load(cfg: DataConfig, split: Split) -> Examples:
    """Loads one split: `Windows` of a text, or `Samples` of a synthetic task.

    Raises:
        ConfigError: the source is unknown, ambiguous or does not exist, or it has no data for this
            split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={quote(split)} is not known; use one of: {', '.join(SPLITS)}.")
    if _is_named(cfg):
        return DATASETS[cfg.source](cfg, split)
    return _windows(documents.read_path(cfg.source, cfg.pattern), cfg, split)


def load_all(cfg: DataConfig) -> Examples:
    """Loads the documents of all splits of a text; of other data sets, the split "valid".

    Raises:
        ConfigError: as `load`.
    """
    if not _is_named(cfg):
        corpus = documents.read_all(cfg.source, cfg.pattern)
    elif DATASETS[cfg.source] is _corpus:
        name, splits = corpora.read_corpus(cfg.source)
        corpus = documents.Corpus(name, {"all": [d for docs in splits.values() for d in docs]})
    else:
        return load(cfg, "valid")
    return _windows(corpus, cfg, "all")


def _is_named(cfg: DataConfig) -> bool:
    """Whether the source is a name in `DATASETS` and not a path; raises ConfigError if unclear."""
    is_path = documents.find(cfg.source) is not None
    if cfg.source in DATASETS and is_path:
        raise ConfigError(
            f"data.source={quote(cfg.source)} must be unambiguous, but it is the name of a data "
            f"set and of a file or folder here; write {quote('./' + cfg.source)} for the path, or "
            "rename it to use the data set."
        )
    if cfg.source not in DATASETS and not is_path:
        raise ConfigError(
            f"data.source={quote(cfg.source)} is neither the name of a data set nor an existing "
            f"path; use a name ({', '.join(DATASETS)}) or the path of a text file or a folder of "
            "text. If the data moved, give their new path (--data.source; evaluate: --source)."
        )
    return cfg.source in DATASETS


def batch_at(
    examples: Examples, cfg: DataConfig, step: int, *, host_index: int = 0, host_count: int = 1
) -> Batch:
    """The training batch of a step; with several hosts, this host's block of it.

    Every epoch contains every window once, in an order that depends on (seed, epoch). A batch may
    continue into the next epoch, so no window is dropped.

    Raises:
        ConfigError: the batch is larger than the data, or hosts cannot share it evenly.
    """
    if step < 0:
        raise ConfigError(f"step must be at least 0, got {step}; 0 is the first batch of a run.")
    # A batch may continue into one more epoch, not into several.
    if cfg.batch_size > len(examples):
        raise ConfigError(
            f"data.batch_size={cfg.batch_size} must be at most the {len(examples)} windows of "
            f"data.source={quote(cfg.source)}; make the batch or data.seq_len smaller, or add text."
        )
    block = _host_block(cfg, host_index, host_count)
    # int64: the stream outgrows 32 bits.
    stream_index = step * cfg.batch_size + np.arange(block.start, block.stop, dtype=np.int64)
    epoch, index = np.divmod(stream_index, len(examples))
    if not examples.shuffle:
        return examples.batch(index)
    # One key per sequence, because their epochs may differ.
    keys = hashing.fold(hashing.key(cfg.seed), epoch.astype(np.uint64))
    return examples.batch(hashing.permute(index, len(examples), keys))


def _host_block(cfg: DataConfig, host_index: int, host_count: int) -> range:
    """The block of a global batch that one host loads; all blocks in order are the batch."""
    if host_count < 1 or cfg.batch_size % host_count:
        raise ConfigError(
            f"data.batch_size={cfg.batch_size} must be a multiple of host_count={host_count}, as "
            "every host loads the same number of sequences; change one of them."
        )
    if not 0 <= host_index < host_count:
        raise ConfigError(
            f"host_index must be in 0..{host_count - 1} for host_count={host_count}, got "
            f"{host_index}; pass the id of this process."
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
    """Batches of start_step, start_step + 1, ..., prefetched in a thread; see `batch_at`.

    The result is a context manager; without `num_steps` it is endless. To resume, start at the next
    step, because the iterator has no other state.
    """
    make = functools.partial(batch_at, examples, cfg, host_index=host_index, host_count=host_count)
    # Invalid arguments raise here, in the caller's thread, and not at the first batch.
    make(start_step)
    return BatchIterator(make, start_step, num_steps)


def eval_batches(
    examples: Examples, cfg: DataConfig, max_batches: int | None = None
) -> Iterator[Batch]:
    """Batches of every window once, in order; the last one is padded with sequences of weight 0.

    With `max_batches`, only as many windows as fit, spread evenly over the data: the same unbiased
    sample every time.
    """
    count = len(examples) if max_batches is None else max_batches * cfg.batch_size
    index = eval_index(len(examples), count)
    for first in range(0, len(index), cfg.batch_size):
        batch = examples.batch(index[first : first + cfg.batch_size])
        # Every batch has one shape, so evaluation compiles once.
        yield pad_batch(batch, cfg.batch_size)


def eval_index(num_windows: int, count: int) -> Int64[np.ndarray, "N"]:
    """Indices of `count` windows, the middles of equal parts of the data; at most all windows."""
    count = min(count, num_windows)
    return (2 * np.arange(count, dtype=np.int64) + 1) * num_windows // (2 * max(count, 1))
