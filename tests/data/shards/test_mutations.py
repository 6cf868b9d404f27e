"""Damaged files of tokens: a ConfigError or an OSError, and no memory beyond the data."""

import json
import tracemalloc

import numpy as np
import pytest

from tests.data.mutations import mutations
from tests.data.shards.formats import documents, write_datatrove, write_megatron, write_prepared
from xlstm_jax.config import ConfigError
from xlstm_jax.data.packing import make_layout
from xlstm_jax.data.shards.open import open_tokens

MAX_MEMORY = 2 << 20
"""Bytes; the files have some kilobytes."""

FILES = {
    "manifest.json": ("prepared", "size"),
    "train/00000.bin": ("prepared", "full"),
    "train/00000.ends": ("prepared", "size"),
    "train/00000.loss": ("prepared", "auto"),
    "megatron.idx": ("megatron", "auto"),
    "megatron.bin": ("megatron", "auto"),
    "a.ds": ("a.ds", "auto"),
    "a.ds.index": ("a.ds", "auto"),
    "a.ds.loss": ("a.ds", "auto"),
    "a.ds.metadata": ("a.ds", "auto"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    docs = documents(np.random.default_rng(0), 30)
    write_prepared(folder / "prepared", {"train": [docs[:20], docs[20:]]}, loss_mask=True)
    write_megatron(folder / "megatron", docs, sequences_per_document=2)
    write_datatrove(folder / "a.ds", docs, loss_mask=True)
    return folder


def use(path, mode):
    """Everything that training does with a store; False if it was refused."""
    try:
        opened = open_tokens(path, "train", verify=mode, block_len=64, max_blocks=2)
        store = opened.store
        json.dumps(opened.description)
        assert len(store.read(0, store.num_tokens)) == store.num_tokens
        ends = store.ends(0, store.num_tokens)
        assert ends[0] > 0 and ends[-1] == store.num_tokens and (np.diff(ends) > 0).all()
        store.loss_mask(0, store.num_tokens)
        make_layout("best_fit", store, 8, None).pieces(0)
    except (ConfigError, OSError) as error:
        assert "\n" not in str(error)
        return False
    return True


def use_damaged(folder, name, count):
    """How many damaged copies of a file are refused."""
    source, mode = FILES[name]
    file = folder / source / name if source == "prepared" else folder / name
    original = file.read_bytes()
    refused = 0
    tracemalloc.start()
    try:
        for data in mutations(original, count, seed=1):
            file.write_bytes(data)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            refused += not use(str(folder / source), mode)
            assert tracemalloc.get_traced_memory()[1] < before + MAX_MEMORY
    finally:
        tracemalloc.stop()
        file.write_bytes(original)
    assert use(str(folder / source), mode)
    return refused


# Files without a checksum, or not verified by it, may change where every value is valid.
SHARE = {"megatron.bin": 0.1, "a.ds": 0.1, "a.ds.loss": 0.1, "a.ds.metadata": 0.02}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_used_or_refused_in_one_line(folder, name):
    assert use_damaged(folder, name, 60) > 60 * SHARE.get(name, 0.5)


SLOW = ("manifest.json", "train/00000.bin", "train/00000.ends", "megatron.idx", "a.ds.index")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.exhaustive)
        for name in FILES
    ],
)
def test_many_damaged_files_are_used_or_refused_in_one_line(folder, name):
    assert use_damaged(folder, name, 1000) > 1000 * SHARE.get(name, 0.5)


CLAIMS = [1 << 20, 1 << 40, 1 << 60, (1 << 62) - 1, 1 << 63, 1 << 64, -1, 0, 2.5, True, None, "9"]


@pytest.mark.parametrize("field", ["tokens", "documents", "num_bytes"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_manifest_that_claims_other_counts_is_refused(folder, field, claim):
    path = folder / "prepared" / "manifest.json"
    original = path.read_text()
    values = json.loads(original)
    values["splits"]["train"][1][field] = claim
    path.write_text(json.dumps(values))
    try:
        # Any number of bytes of text is possible.
        is_valid = field == "num_bytes" and type(claim) is int and claim >= 0
        assert use(str(folder / "prepared"), "size") is is_valid
    finally:
        path.write_text(original)


@pytest.mark.parametrize("offset, size", [(9, 8), (17, 1), (18, 8), (26, 8), (34, 4)])
@pytest.mark.parametrize("claim", [0, 3, 200, 1 << 31, 1 << 40, 1 << 61, (1 << 64) - 1])
def test_an_index_that_claims_other_counts_is_refused(folder, offset, size, claim):
    path = folder / "megatron.idx"
    original = path.read_bytes()
    number = (claim % (1 << 8 * size)).to_bytes(size, "little")
    path.write_bytes(original[:offset] + number + original[offset + size :])
    try:
        assert not use(str(folder / "megatron"), "auto")
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("part", ["lengths", "offsets", "boundaries"])
@pytest.mark.parametrize("value", [-1, -(1 << 31), (1 << 31) - 1, 1 << 40, -(1 << 60)])
def test_an_index_of_other_sequences_is_refused(folder, part, value):
    path = folder / "megatron.idx"
    original = path.read_bytes()
    first = {"lengths": 34, "offsets": 34 + 4 * 60, "boundaries": 34 + 12 * 60}[part]
    data, dtype = bytearray(original), "<i4" if part == "lengths" else "<i8"
    if part == "lengths" and abs(value) > 1 << 31:
        return
    view = np.frombuffer(data, dtype, 20, first)
    for position in (0, 7, 19):
        before, view[position] = view[position], value
        path.write_bytes(data)
        try:
            assert not use(str(folder / "megatron"), "auto")
        finally:
            path.write_bytes(original)
            view[position] = before
