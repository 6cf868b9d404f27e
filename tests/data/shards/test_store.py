"""One index space over shards, for any division of the documents into shards."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_jax.config import ConfigError
from xlstm_jax.data.shards.columns import Column
from xlstm_jax.data.shards.store import ArrayTokens, Shard, ShardedTokens, StoreRange

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def one_array(lengths):
    ends = np.cumsum(lengths)
    return ArrayTokens(np.arange(100, 100 + ends[-1]).astype(np.uint16), ends)


def sharded(folder, array, lengths, first_documents, *, with_mask):
    """The documents of an array in shards, which begin with `first_documents`."""
    shards = []
    for number, part in enumerate(np.split(np.arange(len(lengths)), sorted(first_documents))):
        if not len(part):
            continue
        ends = np.cumsum(np.array(lengths)[part])
        start = array.document_ends[part[0]] - lengths[part[0]]
        tokens = array.tokens[start : start + ends[-1]]
        columns = []
        mask = (tokens % 3 == 0).astype(np.uint8)
        for name, data in {"bin": tokens, "ends": ends.astype("<u8"), "loss": mask}.items():
            path = folder / f"{number}.{name}"
            path.unlink(missing_ok=True)  # it may be mapped
            path.write_bytes(data.tobytes())
            columns.append(Column(str(path), data.dtype.str, len(data)))
        shards.append(Shard(columns[0], columns[1], columns[2] if with_mask else None))
    return ShardedTokens(shards)


@given(st.data(), LENGTHS, st.booleans())
def test_shards_equal_one_array(folder, data, lengths, with_mask):
    array = one_array(lengths)
    first_documents = data.draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    store = sharded(folder, array, lengths, first_documents, with_mask=with_mask)
    store = pickle.loads(pickle.dumps(store))
    assert (store.num_tokens, store.num_documents) == (array.num_tokens, array.num_documents)
    ends = [store.document_end(number) for number in range(len(lengths))]
    np.testing.assert_array_equal(ends, array.document_ends)
    start = data.draw(st.integers(0, array.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, array.num_tokens))
    np.testing.assert_array_equal(store.read(start, stop), array.tokens[start:stop])
    np.testing.assert_array_equal(store.ends(start, stop), array.ends(start, stop))
    mask = store.loss_mask(start, stop)
    if with_mask:
        np.testing.assert_array_equal(mask, array.tokens[start:stop] % 3 == 0)
    else:
        assert mask is None


class Masked(ArrayTokens):
    """Every third token is a target of the loss."""

    def loss_mask(self, start, stop):
        return self.tokens[start:stop] % 3 == 0


@given(st.data(), LENGTHS)
def test_a_range_of_documents_equals_a_store_of_them(data, lengths):
    array, bounds = one_array(lengths), [0, *np.cumsum(lengths).tolist()]
    first = data.draw(st.integers(0, len(lengths) - 1))
    last = data.draw(st.integers(first + 1, len(lengths)))
    part = StoreRange(array, bounds[first], bounds[last])
    assert part.num_documents == last - first
    tokens = array.tokens[bounds[first] : bounds[last]]
    np.testing.assert_array_equal(part.read(0, part.num_tokens), tokens)
    np.testing.assert_array_equal(part.ends(0, part.num_tokens), np.cumsum(lengths[first:last]))
    start = data.draw(st.integers(0, part.num_tokens - 1))
    part = StoreRange(Masked(array.tokens, array.document_ends), part.start, part.stop)
    np.testing.assert_array_equal(
        part.loss_mask(start, part.num_tokens), part.read(start, part.num_tokens) % 3 == 0
    )
    for start, stop in [(0, part.num_tokens + 1), (-1, 1), (1, 1)]:
        with pytest.raises(ConfigError, match="positions must be in"):
            part.read(start, stop)


@given(LENGTHS)
def test_ranges_partition_the_ends(lengths):
    """Each end is in exactly one of consecutive ranges, however they divide the store."""
    array = one_array(lengths)
    for size in (1, 3, 7):
        starts = range(0, array.num_tokens, size)
        parts = [array.ends(s, min(s + size, array.num_tokens)) for s in starts]
        np.testing.assert_array_equal(np.concatenate(parts), array.document_ends)
