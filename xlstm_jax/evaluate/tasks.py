"""Tasks of the EleutherAI evaluation harness, its own and those in local files."""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xlstm_jax.config import check_range, did_you_mean
from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path

SCORED = ("test_split", "validation_split")
"""Fields of a task that name the documents to score; one of them is enough."""

_PURPOSE = "an evaluation task (--tasks)"


class Tasks:
    """Tasks by name, checked before any model runs.

    Args:
        names: of tasks, groups or tags.
        folder: with task files, NAME.yaml, besides those of the harness. Paths of data in them are
            relative to the current directory, or else to this folder.
        num_fewshot: examples before every question; None: as the task says.
        limit: documents per task; None: all.

    Raises:
        ConfigError: a name is unknown, a file lacks a field, or data cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path | None = None,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ):
        check_range("num_fewshot", num_fewshot, "at least 0", "leave it out")
        check_range("limit", limit, "at least 1", "leave it out to use all documents")
        import_optional("lm_eval", _PURPOSE, install="xlstm-jax[eval]", package="lm-eval")
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(
                f"--task-path must be a folder with task files, got {quote_path(self._folder)}; "
                "check the path."
            )
        self._names, self._num_fewshot, self._limit = list(names), num_fewshot, limit
        tasks: Any = importlib.import_module("lm_eval.tasks")
        self._manager = tasks.TaskManager(include_path=self._folder and str(self._folder))
        for name in names:
            self._check(name)
        self._load()

    def run(self, lm: Any) -> dict[str, dict[str, Any]]:
        """Metrics of an `lm_eval.api.model.LM` by task, with their standard errors.

        A metric has the name of the harness, without ",none" for that of no filter.
        """
        # Its bootstrap would fork the process, in which JAX has threads.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        lm_eval: Any = importlib.import_module("lm_eval")
        undefined: Any = importlib.import_module("jinja2").UndefinedError
        try:
            with _quiet():
                results = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=self._load(),
                    task_manager=self._manager,
                    num_fewshot=self._num_fewshot,
                    limit=self._limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                )
        except undefined as error:
            raise ConfigError(
                f"a task uses a field that a document does not have ({error}); correct the task "
                "or its data."
            ) from error
        return {
            name: _metrics(metrics)
            | {
                "num_fewshot": results["n-shot"].get(name),
                "num_documents": results["n-samples"].get(name, {}).get("effective"),
            }
            for name, metrics in results["results"].items()
        }

    def _check(self, name: str) -> None:
        """Raises ConfigError if a name is unknown, or its file lacks a field."""
        index: Mapping[str, Any] = self._manager.task_index
        if name not in index:
            near = did_you_mean(name, index, self._known(index))
            raise ConfigError(f"unknown task {quote(name)}; {near}")
        entry = index[name]
        if "TASK" not in str(entry.kind) or "class" in (entry.cfg or {}):
            return
        if missing := missing_field(entry.cfg):
            raise ConfigError(
                f"{quote_path(entry.yaml_path)} must have the field {missing}, but has only "
                f"{', '.join(sorted(entry.cfg))}; add it."
            )

    def _known(self, index: Mapping[str, Any]) -> str:
        if self._folder is None:
            return "list tasks with `lm-eval ls tasks`, or give a folder with --task-path."
        local = [n for n, e in index.items() if e.yaml_path and self._folder in e.yaml_path.parents]
        if local:
            return f"--task-path has {', '.join(sorted(local)[:10])}."
        return f"{quote_path(self._folder)} has no *.yaml file with the field task; add it."

    def _load(self) -> list[Any]:
        """New tasks and groups: those of the harness keep state of a run."""
        built: list[Any] = []
        for name in self._names:
            loaded = self._loaded(name)
            if name in loaded.get("groups", {}):
                built.append(loaded["groups"][name])
            else:
                built += loaded["tasks"].values()
        return built

    def _loaded(self, name: str) -> Any:
        load: Callable[[list[str]], Any] = self._manager.load
        try:
            with _quiet():
                try:
                    return load([name])
                except FileNotFoundError:
                    if self._folder is None:
                        raise
                    with contextlib.chdir(self._folder):
                        return load([name])
        except Exception as error:  # of datasets, jinja2 or the harness: the types are their own
            reason = quote(" ".join(str(error).split()) or type(error).__name__)
            raise ConfigError(
                f"task {quote(name)} cannot be loaded ({reason}); correct its file or its data."
            ) from error


def missing_field(cfg: Mapping[str, Any]) -> str | None:
    """The first field that a task needs and does not have."""
    needed = ["doc_to_text", "doc_to_target"]
    if "custom_dataset" not in cfg:
        needed.insert(0, "dataset_path")
    if cfg.get("output_type") == "multiple_choice":
        needed.append("doc_to_choice")
    missing = [name for name in needed if cfg.get(name) is None]
    if not any(cfg.get(name) for name in SCORED):
        missing.append(" or ".join(SCORED))
    return next(iter(missing), None)


def _metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task that are numbers."""
    return {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name != "sample_len"  # `num_documents` has it
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings about defaults of tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
