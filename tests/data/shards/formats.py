"""Writers of tokenized data for tests: prepared, of Megatron-LM and of datatrove."""

import struct

import numpy as np

from xlstm_jax.data.shards.manifest import Manifest, TokenizerInfo, to_json, token_dtype
from xlstm_jax.data.shards.writer import ShardWriter


def documents(rng, count, vocab_size=257, max_len=40):
    """Documents of 1 to `max_len` tokens and the end-of-document token."""
    lengths = rng.integers(1, max_len + 1, count)
    eos = [vocab_size - 1]
    return [np.append(rng.integers(0, vocab_size - 1, n), eos).astype(np.uint32) for n in lengths]


def write_prepared(folder, splits, vocab_size=257, *, loss_mask=False, name="byte"):
    """Writes the documents of each shard of each split: {"train": [[document, ...], ...]}."""
    infos = {split: [] for split in splits}
    for split, shards in splits.items():
        for number, docs in enumerate(shards):
            with ShardWriter(
                folder, split, f"{number:05d}", token_dtype(vocab_size), loss_mask=loss_mask
            ) as writer:
                for doc in docs:
                    mask = (doc % 2 == 0) if loss_mask else None
                    writer.write(doc, len(doc) - 1, ends_document=True, loss_mask=mask)
                infos[split].append(writer.close())
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            name=name, sha256="ab" * 32, vocab_size=vocab_size, eos_id=vocab_size - 1
        ),
        dtype=token_dtype(vocab_size),
        sources={},
        splits={split: tuple(shards) for split, shards in infos.items()},
    )
    (folder / "manifest.json").write_text(to_json(manifest))
    return manifest


def write_megatron(prefix, docs, dtype="<u2", sequences_per_document=1):
    """Writes PREFIX.bin and PREFIX.idx; documents may have several sequences."""
    code = {"|u1": 1, "<i4": 4, "<u2": 8}[dtype]
    sequences = [part for doc in docs for part in np.array_split(doc, sequences_per_document)]
    lengths = np.array([len(part) for part in sequences], "<i4")
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    boundaries = np.arange(len(docs) + 1, dtype="<i8") * sequences_per_document
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(boundaries))
    index = header + lengths.tobytes() + offsets.astype("<i8").tobytes() + boundaries.tobytes()
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    data = np.concatenate(docs).astype(dtype).tobytes()
    prefix.with_name(f"{prefix.name}.bin").write_bytes(data)


def write_datatrove(path, docs, item=2, *, metadata="gpt2|{item}\n{count}\n1 T", loss_mask=False):
    """Writes NAME.ds, .index, and where asked .metadata and .loss."""
    tokens = np.concatenate(docs)
    path.write_bytes(tokens.astype(f"<u{item}").tobytes())
    ends = np.cumsum([len(doc) for doc in docs])
    path.with_name(f"{path.name}.index").write_bytes(ends.astype("<u8").tobytes())
    if metadata:
        text = metadata.format(item=item, count=len(tokens))
        path.with_name(f"{path.name}.metadata").write_text(text)
    if loss_mask:
        path.with_name(f"{path.name}.loss").write_bytes((tokens % 2 == 0).astype("u1").tobytes())


def assert_holds(store, docs):
    """All of a store is the documents, however it is read."""
    tokens = np.concatenate(docs)
    ends = np.cumsum([len(doc) for doc in docs])
    assert (store.num_tokens, store.num_documents) == (len(tokens), len(docs))
    np.testing.assert_array_equal(store.read(0, len(tokens)), tokens)
    np.testing.assert_array_equal(store.ends(0, len(tokens)), ends)
    middle = len(tokens) // 2
    np.testing.assert_array_equal(store.read(middle, middle + 1), tokens[middle : middle + 1])
