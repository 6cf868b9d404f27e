"""One input shard to output shards, in constant memory."""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from jaxtyping import Bool, Integer

from xlstm_jax.data import chat
from xlstm_jax.data.config import SPLITS, Split
from xlstm_jax.data.documents import Document, read
from xlstm_jax.data.prepare.config import PrepareConfig
from xlstm_jax.data.prepare.inputs import InputShard
from xlstm_jax.data.prepare.progress import Counts
from xlstm_jax.data.shards.manifest import ShardInfo, token_dtype
from xlstm_jax.data.shards.writer import ShardWriter
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ConfigError, quote, quote_path, shorten

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 4096
"""Limits of a batch for each thread of the tokenizer, which needs about 35 bytes of memory for each
byte of a batch of short documents, and 125 for each byte of a long one."""


class Encoded(NamedTuple):
    """Tokens of a document or of a part of it."""

    split: Split
    ids: Integer[np.ndarray, "T"]  # without the end-of-document token
    mask: Bool[np.ndarray, "T"] | None  # where the loss counts; for conversations
    num_bytes: int
    ends_document: bool


Batch = list[tuple[Split, Document]]
Message = Counts | dict[str, ShardInfo]
"""Counts while a shard is tokenized, and its records, by split, at the end."""

Encoder = Callable[[Batch], list[Encoded]]


def encode_shard(
    shard: InputShard,
    cfg: PrepareConfig,
    out: Path,
    tokenizer: Tokenizer,
    encode: Encoder,
    *,
    num_threads: int,
) -> Generator[Message, None, None]:
    """Writes the tokens of a shard's documents; yields counts while it runs, then its records.

    Reading and writing overlap with tokenization, which runs in other threads.

    Args:
        num_threads: of the tokenizer library.

    Raises:
        ConfigError: a file is damaged, or a document cannot be tokenized; no shard is written.
    """
    messages_field = cfg.messages_field if cfg.chat else None
    documents = (
        item
        for file in shard.files
        for item in read(file, text_field=cfg.text_field, messages_field=messages_field)
    )
    dtype, writers = token_dtype(tokenizer.vocab_size), dict[Split, ShardWriter]()
    batches = _batches(documents, BATCH_BYTES * num_threads)
    # With two batches at a time, one is converted while the library tokenizes the other. Templates
    # of conversations are rendered in the main thread, where their time can be limited.
    encoded = _encode_ahead(batches, encode, ahead=0 if cfg.chat else min(num_threads, 2))
    with contextlib.ExitStack() as stack, contextlib.closing(encoded):
        for batch in encoded:
            for split in SPLITS:
                if not (parts := [part for part in batch if part.split == split]):
                    continue
                if split not in writers:
                    writer = ShardWriter(out, split, shard_name(shard), dtype, loss_mask=cfg.chat)
                    writers[split] = stack.enter_context(writer)
                _write(writers[split], parts, tokenizer)
            yield Counts(
                sum(part.ends_document for part in batch),
                sum(len(part.ids) for part in batch),
                sum(part.num_bytes for part in batch),
            )
        infos = {split: writers[split].close() for split in SPLITS if split in writers}
    yield {split: info for split, info in infos.items() if info is not None}


def shard_name(shard: InputShard) -> str:
    """The name of the output shards of an input shard."""
    return f"{shard.number:05d}"


def _write(writer: ShardWriter, parts: list[Encoded], tokenizer: Tokenizer) -> None:
    """Appends parts of documents; one call for all, as a call for each would take longer."""
    ids = np.concatenate([part.ids for part in parts])
    if ids.size and int(ids.max()) >= tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer={quote(tokenizer.name)} must return ids below its vocab_size="
            f"{tokenizer.vocab_size}, got {ids.max()}; correct its vocab_size."
        )
    stops = np.cumsum([len(part.ids) for part in parts])
    ends = stops[[part.ends_document for part in parts]]
    masks = [part.mask for part in parts if part.mask is not None]
    mask = np.concatenate(masks) if masks else None
    writer.write_many(ids, sum(part.num_bytes for part in parts), ends, loss_mask=mask)


def _batches(documents: Iterable[tuple[Split, Document]], max_bytes: int) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1].data) or len(repr(item[1].messages))
        if size >= max_bytes or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_ahead(
    batches: Iterator[Batch], encode: Encoder, *, ahead: int
) -> Generator[list[Encoded], None, None]:
    """Encoded batches, in order; the next ones are read and encoded at the same time."""
    if not ahead:
        yield from map(encode, batches)
        return
    pool, pending = ThreadPoolExecutor(ahead), deque[Future[list[Encoded]]]()
    try:
        for batch in batches:
            pending.append(pool.submit(encode, batch))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_encoder(cfg: PrepareConfig, tokenizer: Tokenizer) -> Encoder:
    """The function that tokenizes a batch of texts, or of conversations if `cfg.chat` is set.

    Raises:
        ConfigError: the tokenizer has no valid chat template, and `cfg.chat` is set.
    """
    if not cfg.chat:
        return functools.partial(_encode_texts, tokenizer)
    return functools.partial(_encode_chats, tokenizer, chat.load(cfg.tokenizer))


def _encode_texts(tokenizer: Tokenizer, batch: Batch) -> list[Encoded]:
    texts = [document.data for _, document in batch]
    try:
        ids = tokenizer.encode_batch(texts)
    except Exception as error:  # a tokenizer of a user may raise anything
        for _, document in batch:
            _encode_alone(tokenizer, document)  # raises with the name of the document
        raise _failure(batch[0][1].name, error) from error
    eos = np.array([tokenizer.eos_id], token_dtype(tokenizer.vocab_size))
    return [
        Encoded(
            split,
            np.concatenate([tokens, eos]) if document.is_last else tokens,
            None,
            len(document.data),
            document.is_last,
        )
        for (split, document), tokens in zip(batch, ids, strict=True)
    ]


def _encode_alone(tokenizer: Tokenizer, document: Document) -> None:
    try:
        tokenizer.encode_batch([document.data])
    except Exception as error:
        raise _failure(document.name, error) from error


def _failure(name: str, error: Exception) -> ConfigError:
    if isinstance(error, ConfigError):
        return error if name in str(error) else ConfigError(f"{quote_path(name)}: {error}")
    reason = shorten(f"{type(error).__name__}: {error}", 300)
    return ConfigError(
        f"{quote_path(name)} cannot be tokenized ({reason}); correct or remove the document, or "
        "use another tokenizer."
    )


def _encode_chats(tokenizer: Tokenizer, template: chat.ChatTemplate, batch: Batch) -> list[Encoded]:
    encoded = []
    for split, document in batch:
        assert document.messages is not None, "read with messages_field"
        try:
            ids, mask, num_bytes = template.encode(tokenizer, document.messages, document.name)
        except Exception as error:
            raise _failure(document.name, error) from error
        encoded.append(Encoded(split, ids, mask, num_bytes, True))
    return encoded


@contextlib.contextmanager
def tokenizer_threads(count: int) -> Iterator[None]:
    """Within the context, the library `tokenizers` uses this number of threads."""
    parallel = {"TOKENIZERS_PARALLELISM": "true" if count > 1 else "false"}
    with mock.patch.dict(os.environ, parallel | {"RAYON_NUM_THREADS": str(count)}):
        yield
