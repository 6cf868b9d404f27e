"""Worker processes, each of which tokenizes one input shard after another."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import NamedTuple

from xlstm_jax.config import import_module
from xlstm_jax.data.prepare import folder
from xlstm_jax.data.prepare.config import PrepareConfig
from xlstm_jax.data.prepare.encode import (
    Message,
    encode_shard,
    make_encoder,
    shard_name,
    tokenizer_threads,
)
from xlstm_jax.data.prepare.inputs import InputShard
from xlstm_jax.data.tokenizers import get

_STOP = (signal.SIGINT, signal.SIGTERM)
_SPAWN = multiprocessing.get_context("spawn")  # JAX and other threads of this process forbid a fork

Messages = Generator[tuple[InputShard, Message], None, None]


class Job(NamedTuple):
    """Arguments of all workers."""

    cfg: PrepareConfig
    out: Path
    num_threads: int  # of a worker


def run_here(job: Job, shards: Iterable[InputShard]) -> Messages:
    """Tokenizes the shards in this process."""
    for name in job.cfg.imports:
        import_module(name)
    tokenizer = get(job.cfg.tokenizer)
    encode = make_encoder(job.cfg, tokenizer)
    with tokenizer_threads(job.num_threads):
        for shard in shards:
            messages = encode_shard(
                shard, job.cfg, job.out, tokenizer, encode, num_threads=job.num_threads
            )
            with contextlib.closing(messages):
                for message in messages:
                    yield shard, message


def run_in_processes(job: Job, shards: Iterable[InputShard], num_workers: int) -> Messages:
    """Tokenizes the shards in new processes; a worker that is free takes the next one.

    When an error ends the generator, or it is closed, the workers are killed and their drafts
    deleted.

    Raises:
        ConfigError, OSError: raised by a worker. ChildProcessError: a worker died.
    """
    todo = iter(shards)
    workers: list[_Worker] = []
    try:
        with _blocked_signals():
            for shard in itertools.islice(todo, num_workers):
                workers.append(_Worker(job))
                workers[-1].start(shard)
        while busy := [worker for worker in workers if worker.shard is not None]:
            ready = connection.wait([worker.pipe for worker in busy])
            for worker in (worker for worker in busy if worker.pipe in ready):
                shard, message = worker.shard, worker.receive()
                assert shard is not None, "it is busy"
                if isinstance(message, dict):
                    worker.start(next(todo, None))
                yield shard, message
    finally:
        for worker in workers:
            worker.kill()


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Delays SIGINT and SIGTERM; processes that are started meanwhile never get them.

    The terminal sends Ctrl-C, and a scheduler SIGTERM, to workers as well: their parent kills them.
    """
    resource_tracker.ensure_running()  # when it starts, it unblocks both
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Worker:
    """A process, and the shard that it tokenizes."""

    def __init__(self, job: Job):
        self._out = job.out
        self.shard: InputShard | None = None
        self.pipe, far_end = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_main, args=(far_end, job), daemon=True)
        self._process.start()
        far_end.close()  # so that the end of the worker is the end of the pipe

    def start(self, shard: InputShard | None) -> None:
        self.shard = shard
        with contextlib.suppress(BrokenPipeError):  # it died: `receive` reports that
            self.pipe.send(shard)

    def receive(self) -> Message:
        try:
            message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(message, BaseException):
            raise message
        return message

    def _death(self) -> OSError:
        self._process.join()
        code = self._process.exitcode or 0
        reason = f"ended with exit code {code}"
        if code < 0:
            reason = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        if code == -signal.SIGKILL:
            reason += ", perhaps as memory ran out: use fewer --workers"
        assert self.shard is not None, "only a worker with a shard is waited for"
        return OSError(errno.ECHILD, f"a worker {reason}", self.shard.files[0].path)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()
        if self.shard is not None:
            folder.remove_drafts(self._out, shard_name(self.shard))


def _main(pipe: connection.Connection, job: Job) -> None:
    """A worker: receives shards until None, sends messages or the exception that ends it."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        for _, message in run_here(job, iter(pipe.recv, None)):
            pipe.send(message)
    except MemoryError:
        pipe.send(OSError(errno.ENOMEM, "a worker ran out of memory; use fewer --workers"))
    except (ValueError, OSError, NotImplementedError) as error:
        pipe.send(error)
    except Exception:  # a bug: the parent shows where
        pipe.send(RuntimeError(traceback.format_exc()))


def _exit_with_parent() -> None:
    # Otherwise, workers of a killed process would write at the same time as those of the next one.
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child process"
    connection.wait([parent.sentinel])
    os._exit(1)
