"""Rendering of Jinja templates from files, with limits of time, memory and output.

A template is a program: it cannot reach Python objects (Jinja's sandbox), but it can loop or build
large strings.
"""

import contextlib
import functools
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path

MAX_SOURCE = 1 << 20  # characters of a template
MAX_OUTPUT = 1 << 26  # characters of a formatted conversation
MAX_SECONDS = 5.0  # of one rendering
MAX_MEMORY = 512 << 20  # bytes of address space that one rendering may add
MAX_BITS = 4096  # of the factors of a product; products of long integers take unlimited time

# Mark a generation block in the output. Surrogates are in no text that can be encoded, so no
# message contains them.
_START, _STOP = "\ud800", "\ud801"
_MARK = re.compile(f"[{_START}{_STOP}]")


class _OutOfTime(BaseException):
    """Not an `Exception`, which filters of Jinja may catch."""


class _TemplateError(Exception):
    """Raised by a template for a conversation that it does not support."""


def render(path: Path, source: str, values: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The output of a template, and the characters (start, stop) in its generation blocks.

    Raises:
        ConfigError: the template is invalid, fails, or is over a limit.
    """
    with _limits(path):
        chunks, length = [], 0
        for chunk in _compiled(source).generate(values):
            chunks.append(chunk)
            length += len(chunk)
            if length > MAX_OUTPUT:
                raise _TemplateError(f"writes over {MAX_OUTPUT:,} characters")
        return _without_marks("".join(chunks))


def check(path: Path, source: str) -> None:
    """Compiles a template; raises ConfigError if it is invalid."""
    with _limits(path):
        _compiled(source)


@contextlib.contextmanager
def _limits(path: Path) -> Iterator[None]:
    """Limits time and memory, and raises every error of a template as a ConfigError.

    Time is limited in the main thread only, where Python handles signals; memory where the system
    has `RLIMIT_AS` and /proc. Other threads share the limit of memory meanwhile.

    Args:
        path: of the template, for messages.
    """
    try:
        with _time_limit(), _memory_limit():
            yield
    except ConfigError:
        raise
    except _OutOfTime:
        reason = f"takes over {MAX_SECONDS:g} seconds"
    except MemoryError:
        reason = f"needs over {MAX_MEMORY >> 20} MiB of memory"
    except RecursionError:
        reason = "is nested too deeply"
    except Exception as error:  # a template may raise whatever its operations raise
        reason = f"fails ({quote(str(error) or type(error).__name__)})"
    else:
        return
    raise ConfigError(
        f"the chat template {quote_path(path)} {reason}; correct the template or the conversation."
    )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and hasattr(signal, "setitimer")):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # of the caller, if one ran


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MAX_MEMORY
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The compiled template, a `jinja2.Template`."""
    if len(source) > MAX_SOURCE:
        raise _TemplateError(f"must have at most {MAX_SOURCE:,} characters, got {len(source):,}")
    return _environment().from_string(source)


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text = _MARK.split(marked)
    marks = "".join(_MARK.findall(marked))
    if marks != (_START + _STOP) * (len(marks) // 2):
        raise _TemplateError("nests generation blocks")
    ends = [0]
    for part in text:
        ends.append(ends[-1] + len(part))
    return "".join(text), list(zip(ends[1:-1:2], ends[2:-1:2], strict=True))


@functools.cache
def _environment() -> Any:
    """The environment of `transformers`: its options, filters and functions, without a clock."""
    import_optional("jinja2", "a chat template", install="xlstm-jax[data]")
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Undefined(jinja2.Undefined):
        """A value that may be tested, but not written: a misspelled name is not an empty text."""

        def __str__(self) -> str:
            self._fail_with_undefined_error()

    class Generation(jinja2.ext.Extension):
        """Marks `{% generation %}...{% endgeneration %}`, the text of the assistant."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, stop = (
                jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line)
                for mark in (_START, _STOP)
            )
            # In a scope of its own, like the blocks of `transformers`.
            return jinja2.nodes.Scope([start, *body, stop], lineno=line)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """The sandbox, without operations of C that no signal interrupts."""

        intercepted_binops = frozenset({"**", "*"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or any(_size(factor) > MAX_BITS for factor in (left, right)):
                raise _TemplateError(f"the operator {operator} has too large operands")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=Undefined,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    # Data are deterministic.
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


def _size(factor: Any) -> int:
    return factor.bit_length() if isinstance(factor, int) else 0


def _to_json(value: Any, ensure_ascii: Any = False, **options: Any) -> str:
    """JSON without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise _TemplateError(message)
