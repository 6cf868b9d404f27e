"""Named data sets and their batches; see `stream` for the order of a run."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data import corpora, documents, packing, tokenizers
from xlstm_jax.data.batch import Batch, Examples, pad_batch
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.data.config import SPLITS, DataConfig, Split
from xlstm_jax.data.mixture import Mixture
from xlstm_jax.data.prefetch import BatchIterator
from xlstm_jax.data.shards.open import kind_of, open_tokens
from xlstm_jax.data.shards.store import TokenStore
from xlstm_jax.data.stream import Stream
from xlstm_jax.data.synthetic import registry
from xlstm_jax.data.synthetic.nearest_neighbor import NearestNeighbor
from xlstm_jax.data.synthetic.samples import Samples
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.data.windows import Windows, concatenate
from xlstm_jax.errors import ConfigError, quote


def _windows(corpus: documents.Corpus, cfg: DataConfig, split: str) -> Windows:
    """The windows of one split, with a description of all of its corpus."""
    if not corpus.documents[split]:
        counts = ", ".join(f"{len(docs)} in {name}" for name, docs in corpus.documents.items())
        raise ConfigError(
            f"data.source={quote(cfg.source)} must have at least one document for split={split!r}, "
            f"got none ({counts}); add text, or sort it into train/, valid/ and test/."
        )
    tokenizer = tokenizers.get(cfg.tokenizer)
    store = concatenate(corpus.documents[split], tokenizer)
    description = corpus.describe() | {
        "split": split,
        "tokenizer": tokenizer.name,
        "num_tokens": store.num_tokens,
    }
    # The name of a built-in corpus identifies it; the path of a text does not.
    description |= {"source": corpus.name} if corpus.name in corpora.CORPORA else {}
    return _packed(store, cfg, tokenizer, description)


def _packed(
    store: TokenStore, cfg: DataConfig, tokenizer: Tokenizer, description: dict[str, Any]
) -> Windows:
    layout = None
    if cfg.packing not in ("windows", "stream"):
        layout = packing.make_layout(cfg.packing, store, cfg.seq_len, cfg.cache_dir)
        description = description | {"packing": cfg.packing, "seq_len": cfg.seq_len}
    continued = cfg.packing == "stream"
    return Windows(store, cfg.seq_len, tokenizer, description, layout, continued)


def _prepared(cfg: DataConfig, split: str) -> Windows:
    """The windows of data that are tokenized on disk, with their stored tokenizer."""
    is_aligned = cfg.packing in ("windows", "stream")
    opened = open_tokens(
        cfg.source,
        split,
        verify=cfg.verify,
        cache_dir=cfg.cache_dir,
        block_len=cfg.shuffle_block * cfg.seq_len,
        # Packed windows are not aligned with blocks: one block of them reads two or three.
        max_blocks=cfg.shuffle_set if is_aligned else 2 * cfg.shuffle_set + 2,
    )
    tokenizer = tokenizers.get(cfg.tokenizer)
    if opened.tokenizer is not None:
        # The default tokenizer, "byte", stands for that of the data.
        if cfg.tokenizer == "byte":
            tokenizer = tokenizers.get(opened.tokenizer_path or opened.tokenizer.name)
        if tokenizer.sha256 != opened.tokenizer.sha256:
            raise ConfigError(
                f"data.tokenizer={quote(cfg.tokenizer)} must be the tokenizer of the data, SHA-256 "
                f"{opened.tokenizer.sha256[:16]}..., got {tokenizer.sha256[:16]}...; leave it out, "
                "as prepared data have their tokenizer, or prepare them again."
            )
    return _packed(opened.store, cfg, tokenizer, opened.description)


def _corpus(cfg: DataConfig, split: Split) -> Windows:
    return _windows(corpora.read_corpus(cfg.source), cfg, split)


# Named sources; any other source is a path.
DATASETS: dict[str, Callable[[DataConfig, Split], Examples]] = {
    **dict.fromkeys(corpora.CORPORA, _corpus),
    **{name: functools.partial(Samples, task) for name, task in registry.TASKS.items()},
    "nearest_neighbor": NearestNeighbor,
}


def load(cfg: DataConfig, split: Split) -> Examples:
    """Loads one split: `Windows` of a text, `Samples` of a synthetic task, or a `Mixture`.

    Raises:
        ConfigError: a source is unknown, ambiguous or does not exist, or it has no data for this
            split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={quote(split)} is not known; use one of: {', '.join(SPLITS)}.")
    if cfg.sources:
        return Mixture({name: load(one, split) for name, one in _each_source(cfg).items()})
    is_named = _is_named(cfg)
    if cfg.task and cfg.source not in registry.TASKS:
        raise ConfigError(
            f"data.task={quote(cfg.task)} has no effect with data.source={quote(cfg.source)}; "
            f"leave it out, or use a task: {', '.join(registry.TASKS)}."
        )
    if is_named:
        return DATASETS[cfg.source](cfg, split)
    if kind_of(cfg.source):
        return _prepared(cfg, split)
    return _windows(documents.read_path(cfg.source, cfg.pattern, cfg.text_field), cfg, split)


def load_all(cfg: DataConfig) -> Examples:
    """Loads the documents of all splits of a text; of other data sets, the split "valid".

    Raises:
        ConfigError: as `load`.
    """
    if cfg.sources:
        return Mixture({name: load_all(one) for name, one in _each_source(cfg).items()})
    if not _is_named(cfg):
        if kind_of(cfg.source):
            return _prepared(cfg, "all")
        corpus = documents.read_all(cfg.source, cfg.pattern, cfg.text_field)
    elif DATASETS[cfg.source] is _corpus:
        name, splits = corpora.read_corpus(cfg.source)
        corpus = documents.Corpus(name, {"all": [d for docs in splits.values() for d in docs]})
    else:
        return load(cfg, "valid")
    return _windows(corpus, cfg, "all")


def load_eval_sets(cfg: DataConfig) -> dict[str, Examples]:
    """The data sets of `cfg.eval_sets`, each with all of its documents."""
    return {name: load_all(_only(cfg, path)) for name, path in cfg.eval_sets.items()}


def _each_source(cfg: DataConfig) -> dict[str, DataConfig]:
    return {name: _only(cfg, path) for name, path in cfg.sources.items()}


def _only(cfg: DataConfig, source: str) -> DataConfig:
    """The config with one source."""
    changes: dict[str, Any] = dict(sources={}, weights={}, weight_schedule=(), eval_sets={})
    return dataclasses.replace(cfg, source=source, **changes)


def _is_named(cfg: DataConfig) -> bool:
    """Whether the source is a name in `DATASETS` and not a path; raises ConfigError if unclear."""
    is_path = documents.find(cfg.source) is not None or kind_of(cfg.source) is not None
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


def make_stream(
    examples: Examples, cfg: DataConfig, ramp: tuple[tuple[int, float], ...] = ()
) -> Stream:
    """The batches of training by step; raises ConfigError if the data are smaller than a batch."""
    return Stream(examples, cfg, BatchSizes(cfg.batch_size, ramp))


def batch_at(
    examples: Examples, cfg: DataConfig, step: int, *, host_index: int = 0, host_count: int = 1
) -> Batch:
    """The training batch of a step; with several hosts, this host's block of it.

    Every epoch contains every window once, in an order that depends on (seed, epoch). A batch may
    continue into the next epoch, so no window is dropped.

    Raises:
        ConfigError: the batch is larger than the data, or hosts cannot share it evenly.
    """
    stream = make_stream(examples, cfg)
    return stream.batch(step, host_index=host_index, host_count=host_count)


def dataset(
    examples: Examples, cfg: DataConfig, *, host_index: int = 0, host_count: int = 1
) -> Any:
    """The training batches as a `grain.MapDataset`, to be mapped and given to `train.fit`.

    Element `step` is `batch_at(examples, cfg, step)`, for any step.
    """
    return make_stream(examples, cfg).dataset(host_index=host_index, host_count=host_count)


def batches(
    examples: Examples,
    cfg: DataConfig,
    start_step: int = 0,
    num_steps: int | None = None,
    *,
    host_index: int = 0,
    host_count: int = 1,
) -> BatchIterator:
    """Batches of start_step, start_step + 1, ..., prefetched; see `batch_at`.

    A thread prefetches, or `cfg.workers` processes do, with equal batches. The result is a context
    manager; without `num_steps` it is endless. To resume, start at the next step, because the
    iterator has no other state.
    """
    return make_stream(examples, cfg).batches(
        start_step, num_steps, host_index=host_index, host_count=host_count
    )


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
