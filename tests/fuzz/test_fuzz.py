"""Mutated input is accepted, or rejected by a short error at once, by every reader.

FUZZ_SEED selects other mutations, FUZZ_COUNT another total number of inputs.
"""

import collections
import os
import random
import re
import resource
import signal
import time
import traceback
import warnings
import zlib

import jaxtyping
import pytest

from tests.fuzz.readers import READERS, Case, Refused
from xlstm_jax import cpu
from xlstm_jax.cli.commands import explain
from xlstm_jax.convert.tensors import WeightsWarning
from xlstm_jax.errors import quote

SEED = int(os.environ.get("FUZZ_SEED", 0))
COUNT = int(os.environ.get("FUZZ_COUNT", sum(reader.num_cases for reader in READERS.values())))
MAX_MESSAGE = 700  # characters
MAX_SECONDS = 5  # of the processor; a case takes a few milliseconds
MAX_BYTES = 2**30  # more memory than before

pytestmark = pytest.mark.slow


class TooSlowError(BaseException):
    """Not an Exception, so that no reader catches it."""


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch, one_device):
    """Disables type checks, which only tests have, and `cpu.prepare`, which changes the process."""
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _raise_too_slow(*signal_and_frame):
    raise TooSlowError(f"takes more than {MAX_SECONDS} s")


def problem_of(case: Case) -> tuple[str | None, str]:
    """Why the outcome of a case is not allowed, and whether it was accepted or rejected."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = case.read()
    except WeightsWarning:
        return None, "warned"
    except TooSlowError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{error}, in {frame.filename}:{frame.lineno}", "failed"
    except Exception as error:
        code, message = explain(error)
        if code is None:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "xlstm_jax" in frame.filename] or frames
            where = f"{own[-1].filename}:{own[-1].lineno}"
            return f"raises {type(error).__name__}: {quote(str(error))} in {where}", "failed"
        result = Refused(message, code)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MAX_BYTES:
        return f"needs {grown / 2**30:.1f} GiB", "failed"
    if not isinstance(result, Refused):
        return None, "accepted"
    message = result.message
    if not 2 <= result.code <= 4:
        return f"exit code {result.code}", "failed"
    if not message or not message.isprintable() or len(message) > MAX_MESSAGE:
        return f"has a message of {len(message)} characters: {quote(message)}", "failed"
    return None, "rejected"


@pytest.mark.parametrize("name", READERS)
def test_mutated_input_is_accepted_or_rejected_by_a_short_error(name, tmp_path, record_property):
    reader = READERS[name]
    total = sum(other.num_cases for other in READERS.values())
    count = max(1, round(COUNT * reader.num_cases / total))
    make_case = reader.prepare(tmp_path)
    old = signal.signal(signal.SIGPROF, _raise_too_slow)
    outcomes: collections.Counter[str] = collections.Counter()
    failures: dict[str, str] = {}
    start = time.process_time()
    try:
        for index in range(count):
            # Each case has its own seed, so that it is reproduced without the others.
            case = make_case(random.Random(zlib.crc32(f"{SEED} {name} {index}".encode())))
            problem, outcome = problem_of(case)
            outcomes[outcome] += 1
            if problem:
                # One case for each kind of failure at each location.
                kind = re.sub(r"[0-9]+|: .* in ", "", problem)[:60] + problem[-40:]
                failures.setdefault(kind, f"case {index}: {problem}; input {show(case.shown)}")
    finally:
        signal.signal(signal.SIGPROF, old)
    record_property("outcomes", dict(outcomes))
    seconds = time.process_time() - start
    print(f"{name}: {count} inputs in {seconds:.1f} s, {dict(outcomes)}")
    lines = "\n".join(failures.values())
    assert not failures, f"FUZZ_SEED={SEED}, {outcomes['failed']} of {count} fail:\n{lines}"


def show(value):
    """The input for a message, shortened if it is long."""
    text = repr(value) if len(str(value)) < 1500 else quote(value)
    return text if len(text) < 3000 else text[:1500] + "..." + text[-1500:]
