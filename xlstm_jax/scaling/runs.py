"""Running the runs of a sweep that are not finished, and collecting the results in one table."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from xlstm_jax.config import ConfigError, differences, read_json, to_dict
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.scaling.execute import DIVERGED, execute, prepare
from xlstm_jax.scaling.launch import Execute, Local
from xlstm_jax.scaling.source import source_fingerprint
from xlstm_jax.scaling.status import RESULT, SPEC, RunStatus, status
from xlstm_jax.scaling.sweep import RunSpec
from xlstm_jax.train import rundir

PLAN, TABLE = "plan.json", "table.csv"
MAX_NAMED = 3
"""Runs that an error message names."""


@runtime_checkable  # so that signatures can be checked at run time
class Launcher(Protocol):
    """Trains runs: `Local`, `Slurm`, or a class of the caller."""

    def launch(self, folders: Sequence[Path], execute: Execute) -> None:
        """Calls `execute`, here or in other processes, with each of these prepared folders."""


class Table(NamedTuple):
    """The results of a sweep."""

    rows: list[dict[str, Any]]  # of finished runs, in the order of the plan
    unfinished: list[RunStatus]

    def csv(self) -> str:
        """The rows as comma-separated values with a header."""
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self.rows for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def run(
    specs: Sequence[RunSpec],
    out: str | Path,
    *,
    launcher: Launcher | None = None,
    allow_mixed: bool = False,
) -> list[RunStatus]:
    """Trains the runs that are not finished, each in its folder of `out`, and returns all states.

    Repeating the call continues: finished runs stay, stopped and failed ones resume from their
    checkpoints, those that another process trains are left alone. A run that diverged would do so
    again and is not repeated; delete its folder to try.

    Args:
        launcher: `Local()` by default, which trains one run after the other in this process.
        allow_mixed: accept results of another source of this library beside new ones.

    Raises:
        ConfigError: `out` has runs of another plan, or finished runs of another source.
    """
    out = rundir.expand(out)
    rundir.check_folder(out)
    _check_plan(specs, out)
    states = statuses(specs, out)
    if not allow_mixed and any(one.state != "finished" for one in states):
        _check_source(out, specs)
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_json(out / PLAN, {"runs": [spec.row() for spec in specs]})
    folders = []
    for spec, one in zip(specs, states, strict=True):
        # A run may only seem to be running, after a job was killed on another host.
        if one.state != "finished" and one.code != DIVERGED:
            prepare(out / spec.run_id, spec)
            folders.append(out / spec.run_id)
    (launcher or Local()).launch(folders, execute)
    return statuses(specs, out)


def statuses(specs: Iterable[RunSpec], out: Path) -> list[RunStatus]:
    """The state of every run."""
    return [status(out / spec.run_id, spec.cfg.name) for spec in specs]


def collect(out: str | Path, *, allow_mixed: bool = False) -> Table:
    """The results of a sweep as one table, also written to `out`/table.csv.

    Args:
        allow_mixed: accept results of different sources of this library; the column `source` tells
            them apart.

    Raises:
        ConfigError: `out` is not a sweep, or has results of another plan, copies of results, or
            results of different sources.
    """
    out = rundir.expand(out)
    if not (out / PLAN).is_file():
        raise ConfigError(f"{quote_path(out)} has no {PLAN} of a sweep; run it first.")
    planned = {row["run_id"]: row["name"] for row in read_json(out / PLAN)["runs"]}
    results = _results(out)
    if strays := [name for name in results if name not in planned]:
        raise ConfigError(
            f"{quote_path(out)} has {len(strays)} results of another plan ({_listed(strays)}); "
            "move them elsewhere, or run the sweep that planned them."
        )
    if not allow_mixed:
        _refuse_mixed(out, results)
    # `versions` is a table of its own.
    rows = [
        {name: x for name, x in results[i].items() if name not in ("versions", "name")}
        for i in planned
        if i in results
    ]
    unfinished = [status(out / i, planned[i]) for i in planned if i not in results]
    table = Table(rows, unfinished)
    rundir.write(out / TABLE, table.csv().encode())
    return table


def _results(out: Path) -> dict[str, dict[str, Any]]:
    """The result of every finished run, by id; raises ConfigError if one is in another's folder."""
    results = {}
    for path in sorted(out.glob(f"*/{RESULT}")):
        result = read_json(path)
        if result.get("run_id") != path.parent.name:
            raise ConfigError(
                f"{quote_path(path)} must be the result of the run {path.parent.name}, but has the "
                f"id {quote(result.get('run_id'))}: a duplicate; delete the copy."
            )
        results[path.parent.name] = result
    return results


def _refuse_mixed(out: Path, results: dict[str, dict[str, Any]]) -> None:
    sources: dict[str, list[str]] = {}
    for name, result in results.items():
        sources.setdefault(result["source"], []).append(name)
    if len(sources) > 1:
        groups = "; ".join(f"{x}: {len(n)} runs ({_listed(n)})" for x, n in sources.items())
        raise ConfigError(
            f"{quote_path(out)} has results of {len(sources)} sources of xlstm_jax ({groups}); "
            "delete the folders of one and run the sweep again, or pass allow_mixed=True "
            "(--allow-mixed)."
        )


def _check_source(out: Path, specs: Sequence[RunSpec]) -> None:
    """Raises ConfigError if finished runs are of another source than new ones would be."""
    finished, ids = _results(out), {spec.run_id for spec in specs}
    source = source_fingerprint()
    others = [i for i, result in finished.items() if i in ids and result["source"] != source]
    if others:
        raise ConfigError(
            f"{quote_path(out)} has {len(others)} results of the source "
            f"{finished[others[0]]['source']} of xlstm_jax ({_listed(others)}), and new ones would "
            f"be of {source}; use another folder, delete theirs, or pass allow_mixed=True "
            "(--allow-mixed)."
        )


def _check_plan(specs: Sequence[RunSpec], out: Path) -> None:
    """Raises ConfigError, with the fields that differ, if `out` has runs that are not planned."""
    ids, names = {spec.run_id for spec in specs}, {spec.cfg.name: spec for spec in specs}
    for path in sorted(out.glob(f"*/{SPEC}")):
        if path.parent.name in ids:
            continue
        stored = read_json(path.parent / rundir.CONFIG)
        new = names.get(stored.get("name", ""))
        lines = differences(to_dict(new.cfg), stored)[:MAX_NAMED] if new else ["not in this plan"]
        raise ConfigError(
            f"{quote_path(out)} has the run {path.parent.name} of another plan "
            f"({quote(stored.get('name'))}: {'; '.join(lines)}); use another folder, or delete "
            "that run."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
