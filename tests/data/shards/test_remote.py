"""Remote tokens: the values of local ones, in few requests, with retries and a cache on disk."""

import functools
import http.server
import importlib.util
import logging
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st

from tests.data.shards.formats import (
    assert_holds,
    documents,
    write_datatrove,
    write_megatron,
    write_prepared,
)
from xlstm_jax.config import ConfigError
from xlstm_jax.data.shards import remote
from xlstm_jax.data.shards.blocks import Block, BlockCache, BlockedTokens
from xlstm_jax.data.shards.open import kind_of, open_tokens
from xlstm_jax.data.shards.store import ArrayTokens


class CountedFileSystem(AbstractFileSystem):
    """A local folder as counted://, with the requests for content, and errors on demand."""

    protocol = "counted"
    root = ""
    requests: list[tuple[str, int]] = []
    """Path and bytes of each request."""
    errors: list[Exception] = []
    """Raised by the next requests."""

    def _local(self, path):
        return os.path.join(self.root, self._strip_protocol(path))

    def info(self, path, **kwargs):
        local = self._local(path)
        kind = "directory" if os.path.isdir(local) else "file"
        return {"name": path, "size": os.path.getsize(local), "type": kind}

    def ls(self, path, detail=True, **kwargs):
        names = sorted(os.listdir(self._local(path)))
        return [self.info(f"{self._strip_protocol(path)}/{name}") for name in names]

    def cat_file(self, path, start=None, end=None, **kwargs):
        if self.errors:
            raise self.errors.pop(0)
        with open(self._local(path), "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        self.requests.append((path, len(data)))
        return data

    @classmethod
    def of_tokens(cls):
        """Requests for .bin and .loss, and their bytes."""
        sizes = [size for path, size in cls.requests if path.endswith((".bin", ".loss", ".ds"))]
        return len(sizes), sum(sizes)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0, 0.0))
    for name, value in {"root": str(tmp_path), "requests": [], "errors": []}.items():
        monkeypatch.setattr(CountedFileSystem, name, value)
    return CountedFileSystem


def open_blocks(path, split="train", *, block_len=64, max_blocks=4, **options):
    return open_tokens(path, split, block_len=block_len, max_blocks=max_blocks, **options)


def test_remote_data_equal_local_data(counted, tmp_path, rng):
    docs = documents(rng, 40)
    write_prepared(tmp_path / "prepared", {"train": [docs[:15], docs[15:]]}, loss_mask=True)
    write_megatron(tmp_path / "megatron", docs)
    write_datatrove(tmp_path / "a.ds", docs, loss_mask=True)
    for name in ("prepared", "megatron", "a.ds"):
        for url in (f"counted://{name}", f"file://{tmp_path}/{name}"):
            local = open_blocks(str(tmp_path / name), "all")
            opened = open_blocks(url, "all")
            assert kind_of(url) == kind_of(str(tmp_path / name))
            assert opened[1:] == local[1:]
            assert isinstance(opened.store, BlockedTokens)
            assert_holds(opened.store, docs)
            assert_holds(pickle.loads(pickle.dumps(opened.store)), docs)
            for start in range(0, opened.store.num_tokens - 40, 17):
                mask = local.store.loss_mask(start, start + 40)
                np.testing.assert_array_equal(opened.store.loss_mask(start, start + 40), mask)


def test_data_in_memory_and_folders_of_splits_are_opened(rng, tmp_path):
    docs = documents(rng, 30)
    write_datatrove(tmp_path / "a.ds", docs)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/datatrove/train/", recursive=True)
    assert_holds(open_blocks("memory://datatrove").store, docs)
    assert kind_of("memory://absent") is None
    memory.rm("/datatrove", recursive=True)


def two_level_order(rng, num_windows, block, blocks_per_set):
    """Windows in the order of a shuffle of blocks, and of windows within sets of blocks."""
    blocks = rng.permutation(-(-num_windows // block))
    for first in range(0, len(blocks), blocks_per_set):
        chosen = blocks[first : first + blocks_per_set, None] * block + np.arange(block)
        yield from rng.permutation(chosen[chosen < num_windows]).tolist()


def test_an_epoch_of_blocks_needs_few_requests_and_reads_the_corpus_once(counted, tmp_path, rng):
    T, block, num_windows, blocks_per_set = 2048, 256, 1280, 2
    tokens = rng.integers(0, 60_000, num_windows * T + 1).astype(np.uint16)
    docs = np.split(tokens, np.arange(999, len(tokens), 1000))
    half = len(docs) // 2
    write_prepared(tmp_path / "data", {"train": [docs[:half], docs[half:]]}, 60_000)
    options = {"block_len": block * T, "max_blocks": blocks_per_set}
    windows = two_level_order(rng, num_windows, block, blocks_per_set)
    store = open_blocks("counted://data", **options).store
    counted.requests.clear()
    for index in windows:
        window = store.read(index * T, (index + 1) * T + 1)
        assert window[0] == tokens[index * T] and window[-1] == tokens[(index + 1) * T]
    requests, num_bytes = counted.of_tokens()
    assert num_bytes <= 1.05 * tokens.nbytes
    # A full shuffle needs a request for every window.
    assert requests <= num_windows / 200


def test_opening_reads_no_tokens(counted, tmp_path, rng):
    docs = documents(rng, 40)
    write_prepared(tmp_path / "data", {"train": [docs[:15], docs[15:]]})
    open_blocks("counted://data")
    assert counted.of_tokens() == (0, 0)
    open_blocks("counted://data", verify="full")
    assert counted.of_tokens()[1] == 2 * sum(map(len, docs))


def test_requests_are_repeated_after_errors_that_may_pass(counted, tmp_path, rng):
    docs = documents(rng, 10)
    write_prepared(tmp_path / "data", {"train": [docs]})
    store = open_blocks("counted://data").store
    counted.errors += [ConnectionResetError("reset"), TimeoutError(), RuntimeError("503")]
    assert_holds(store, docs)
    counted.errors += [RuntimeError("503")] * 4
    fresh = pickle.loads(pickle.dumps(store))
    with pytest.raises(ConfigError, match="counted://data/train/00000.bin cannot be read.*503"):
        fresh.read(0, 3)
    assert_holds(fresh, docs)  # the next read tries again
    counted.errors += [PermissionError("no")]
    with pytest.raises(ConfigError, match="cannot be read.*credentials"):
        pickle.loads(pickle.dumps(store)).read(0, 3)


def test_an_error_of_the_network_is_not_an_absent_file(counted, tmp_path, rng, monkeypatch):
    """The HTTP file system of fsspec reports any error as FileNotFoundError."""
    write_prepared(tmp_path / "data", {"train": [documents(rng, 10)]})
    info, causes = counted.info, [ConnectionResetError("reset")]

    def fail_first(self, path, **kwargs):
        if causes:
            raise FileNotFoundError(path) from causes.pop()
        return info(self, path, **kwargs)

    monkeypatch.setattr(counted, "info", fail_first)
    assert kind_of("counted://data") == "prepared"
    causes += [FileNotFoundError("data")]
    assert kind_of("counted://data") is None


def test_messages_hide_passwords_and_signatures():
    assert remote.shown("https://me:password@host/a/b?signature=1") == "https://host/a/b"


def test_unknown_protocols_and_absent_files_are_errors():
    with pytest.raises(ConfigError, match="nothing://a.* cannot be opened.*local folder"):
        kind_of("nothing://a")
    with pytest.raises(ConfigError, match="memory://absent.bin does not exist; copy"):
        remote.read_range("memory://absent.bin", 0, 3)


def test_a_server_without_ranges_is_an_error(counted, tmp_path, rng, monkeypatch):
    write_prepared(tmp_path / "data", {"train": [documents(rng, 10)]})
    store = open_blocks("counted://data").store
    monkeypatch.setattr(counted, "cat_file", lambda *args, **kwargs: bytes(10_000))
    with pytest.raises(ConfigError, match="got 10,000 bytes.*use a server with range requests"):
        store.read(0, 3)


def test_the_tokenizer_of_remote_data_is_copied(counted, tmp_path, rng, monkeypatch):
    write_prepared(tmp_path / "data", {"train": [documents(rng, 10)]}, name="tokenizer.json")
    (tmp_path / "data" / "tokenizer").mkdir()
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("XLSTM_CACHE_DIR", str(tmp_path / "default"))
    for cache_dir in (str(tmp_path / "cache"), None):
        path = open_blocks("counted://data", cache_dir=cache_dir).tokenizer_path
        assert path.startswith(str(tmp_path / ("cache" if cache_dir else "default")))
        assert os.listdir(path) == ["tokenizer.json"]


# Blocks in memory and on disk.


def make_store(rng, num_documents=30):
    docs = documents(rng, num_documents)
    tokens = np.concatenate(docs).astype(np.uint16)
    return ArrayTokens(tokens, np.cumsum([len(doc) for doc in docs]))


class CountedReads(ArrayTokens):
    """The ranges that are read, with a loss mask."""

    def __init__(self, store):
        super().__init__(store.tokens, store.document_ends)
        object.__setattr__(self, "ranges", [])

    def read(self, start, stop):
        self.ranges.append((start, stop))
        return super().read(start, stop)

    def loss_mask(self, start, stop):
        return self.tokens[start:stop] % 2 == 0


@given(st.data(), st.integers(1, 50), st.integers(1, 5))
def test_blocks_equal_their_store(data, block_len, max_blocks):
    store = CountedReads(make_store(np.random.default_rng(0), 8))
    blocks = BlockedTokens(store, block_len, max_blocks)
    for _ in range(5):
        start = data.draw(st.integers(0, store.num_tokens - 1))
        stop = data.draw(st.integers(start + 1, store.num_tokens))
        np.testing.assert_array_equal(blocks.read(start, stop), store.tokens[start:stop])
        mask = store.loss_mask(start, stop)
        np.testing.assert_array_equal(blocks.loss_mask(start, stop), mask)
        np.testing.assert_array_equal(blocks.ends(start, stop), store.ends(start, stop))


@pytest.mark.parametrize("start, stop", [(-1, 3), (0, 10**6), (3, 3), (5, 2)])
def test_positions_outside_of_the_store_are_an_error(rng, start, stop):
    with pytest.raises(ConfigError, match="positions must be in"):
        BlockedTokens(make_store(rng), 10, 2).read(start, stop)


def test_all_windows_of_a_block_need_one_read_and_the_oldest_block_is_dropped(rng):
    store = CountedReads(make_store(rng))
    blocks = BlockedTokens(store, 40, 2)
    for start in (40, 50, 60, 70):
        blocks.read(start, start + 11)  # the last one has the first token of the next block
    assert store.ranges == [(40, 81)]
    for number in (0, 1, 2, 1, 0):
        blocks.read(40 * number, 40 * number + 5)
    assert [start // 40 for start, _ in store.ranges] == [1, 0, 2, 0]


def test_threads_that_need_a_block_read_it_once(rng):
    store = CountedReads(make_store(rng))
    gate = threading.Event()
    read = store.read
    object.__setattr__(store, "read", lambda *args: gate.wait(10) and read(*args))
    blocks = BlockedTokens(store, 100, 2)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(blocks.read, i, i + 10) for i in range(8)]
        gate.set()
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(), store.tokens[i : i + 10])
    assert store.ranges == [(0, 101)]


def test_blocks_on_disk_are_read_instead_of_the_source(counted, tmp_path, rng):
    docs = documents(rng, 40)
    write_prepared(tmp_path / "data", {"train": [docs]}, loss_mask=True)
    local = open_blocks(str(tmp_path / "data")).store
    for count in (1, 0):
        counted.requests.clear()
        store = open_blocks("counted://data", cache_dir=str(tmp_path / "cache")).store
        assert_holds(store, docs)
        full = 0, store.num_tokens
        np.testing.assert_array_equal(store.loss_mask(*full), local.loss_mask(*full))
        assert counted.of_tokens()[0] <= 2 if count == 0 else counted.of_tokens()[0] > 10
    files = list((tmp_path / "cache" / "blocks").glob("*/*"))
    assert files and not [path for path in files if path.suffix == ".tmp"]


def test_damaged_blocks_and_those_of_other_data_are_not_used(counted, tmp_path, rng):
    options = {"cache_dir": str(tmp_path / "cache")}
    for part in (documents(rng, 40), documents(rng, 40)):
        write_prepared(tmp_path / "data", {"train": [part]})
        assert_holds(open_blocks("counted://data", **options).store, part)
    for path in (tmp_path / "cache").glob("blocks/*/*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert_holds(open_blocks("counted://data", **options).store, part)


def test_a_block_with_fewer_or_more_bytes_is_not_used(tmp_path):
    cache = BlockCache(tmp_path, "<u2", has_mask=True)
    block = Block(np.arange(5, dtype=np.uint16), np.arange(5) > 2)
    cache.save(0, block)
    np.testing.assert_array_equal(cache.load(0, 5), block)
    data = (tmp_path / "0").read_bytes()
    for other in (data[:-1], data[:10], data + b"0"):  # 10: the tokens without their mask
        (tmp_path / "0").write_bytes(other)
        assert cache.load(0, 5) is None


def test_a_full_disk_disables_the_cache_with_one_warning(tmp_path, rng, caplog, monkeypatch):
    store = CountedReads(make_store(rng))
    cache = BlockCache(tmp_path / "cache", "<u2", True)
    blocks = BlockedTokens(store, 40, 2, cache)
    blocks.read(0, 5)

    def write_bytes(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", write_bytes)
    with caplog.at_level(logging.WARNING):
        for start in range(0, 400, 40):
            np.testing.assert_array_equal(
                blocks.read(start, start + 5), store.tokens[start : start + 5]
            )
    assert [r.getMessage() for r in caplog.records] == [
        f"data.cache_dir: {tmp_path}/cache cannot be written (No space left on device); blocks are "
        "read again from the source"
    ]
    assert os.listdir(tmp_path / "cache") == ["0"]


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder, and ranges of them."""

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        header = self.headers.get("Range")
        path = self.translate_path(self.path)
        if header is None or not os.path.isfile(path):
            return super().do_GET()
        first, last = map(int, header.removeprefix("bytes=").split("-"))
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="http:// needs aiohttp")
def test_data_of_a_web_server_equal_local_data(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(remote, "DELAYS", (0.0,))
    docs = documents(rng, 40)
    write_prepared(tmp_path / "data", {"train": [docs[:15], docs[15:]]})
    write_megatron(tmp_path / "megatron", docs)
    handler = functools.partial(RangeHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert_holds(open_blocks(f"{url}/data", verify="full").store, docs)
            assert_holds(open_blocks(f"{url}/megatron", "all").store, docs)
            assert kind_of(f"{url}/absent") is None
            with pytest.raises(ConfigError, match="cannot be read.*ClientConnectorError"):
                kind_of("http://127.0.0.1:1/data")
        finally:
            server.shutdown()
            thread.join(10)
