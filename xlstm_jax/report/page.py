"""The page: its sections, filled into the template with styles, script and plotly.js."""

import dataclasses
import datetime
import html
import importlib.resources
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xlstm_jax import __version__
from xlstm_jax.config import ConfigError, flatten, user_path
from xlstm_jax.errors import import_optional
from xlstm_jax.report import charts, loading, tables
from xlstm_jax.report.runs import Run, Summary
from xlstm_jax.report.tables import escape
from xlstm_jax.train import rundir

MAX_BYTES = 8_000_000  # of the page, of which plotly.js has 4.8 million
SERIES_BYTES, GATE_BYTES, CONFIG_BYTES = 1_500_000, 700_000, 300_000  # of all runs together

MAX_GATE_RUNS = 30  # the first ones; with more, a record may exceed the share of a run

# Of run.json; what else it has is the environment.
NOT_ENVIRONMENT = ("name", "fingerprint", "started", "from_step", "num_params", "data", "config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and the final values that the page shows."""

    path: str
    runs: list[Summary]


def write(runs: Sequence[str | Path], path: str | Path) -> Report:
    """Writes one HTML file that compares runs and loads nothing else; at most `MAX_BYTES`.

    Args:
        runs: directories of runs, also of unfinished ones.
        path: of the file, which is replaced at once.

    Raises:
        ConfigError: a directory is not that of a run, or a file in it is damaged; plotly is not
            installed; or the page would be too large.
    """
    plotly = _plotly_js()
    folders = loading.find(runs)
    count = len(folders)
    loaded = [
        loading.load(
            name,
            folder,
            series_bytes=SERIES_BYTES / count,
            gate_bytes=GATE_BYTES / min(count, MAX_GATE_RUNS) if n < MAX_GATE_RUNS else 0,
        )
        for n, (name, folder) in enumerate(folders.items())
    ]
    page = _render(loaded, plotly).encode("utf-8", "replace")
    if len(page) > MAX_BYTES:
        raise ConfigError(
            f"a report must have at most {MAX_BYTES:,} bytes, but that of these {count} runs "
            f"would have {len(page):,}; compare fewer runs."
        )
    # A link is followed, not replaced.
    rundir.write(user_path(path).resolve(), page)
    return Report(path=str(path), runs=[run.summary for run in loaded])


def _plotly_js() -> str:
    plotly = import_optional("plotly.offline", "a report", install="xlstm-jax[report]")
    return plotly.get_plotlyjs()


def _render(runs: Sequence[Run], plotly: str) -> str:
    sections = {
        "losses": (*charts.LOSSES, *charts.validation_charts(runs)),
        "throughput": charts.THROUGHPUT,
        "optimization": charts.OPTIMIZATION,
    }
    shown = {name: charts.present(listed, runs) for name, listed in sections.items()}
    data = charts.to_data([chart for listed in shown.values() for chart in listed], runs)
    names = [run.summary.name for run in runs]
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    configs = {run.summary.name: flatten(run.config) for run in runs}
    return string.Template(_file("page.html")).substitute(
        {name: charts.to_html(listed, len(runs)) for name, listed in shown.items()},
        title=escape(names[0] if len(runs) == 1 else f"{len(runs)} training runs"),
        about=f"Written by xlstm-jax {__version__} on {written}",
        summary=tables.summary([run.summary for run in runs]),
        legend="".join(map(_legend_entry, range(len(names)), names)),
        gates=charts.gates_to_html(runs),
        differences=tables.comparison("Fields that differ", configs, only_differing=True),
        configs=_full_configs(runs),
        environment=tables.comparison("Environment", _tables_of(runs, _environment)),
        data=tables.comparison("Data", _tables_of(runs, lambda about: about.get("data"))),
        css=_file("page.css"),
        js=_file("page.js"),
        plotly=plotly,
        # JSON has "<" within strings only, where it could end the script element.
        json=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _file(name: str) -> str:
    return (importlib.resources.files("xlstm_jax.report") / name).read_text("utf-8")


def _legend_entry(index: int, name: str) -> str:
    box = f'<input type="checkbox" checked data-run="{index}">'
    return f"<label>{box} {tables.swatch(index)} {escape(name)}</label>"


def _environment(about: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name not in NOT_ENVIRONMENT}


def _tables_of(
    runs: Sequence[Run], select: Callable[[dict[str, Any]], Any]
) -> dict[str, dict[str, Any]]:
    """The selected part of each run.json, flattened."""
    parts = {run.summary.name: select(run.about) for run in runs}
    return {name: flatten(part) if isinstance(part, dict) else {} for name, part in parts.items()}


def _full_configs(runs: Sequence[Run]) -> str:
    """The config of each run, as far as `CONFIG_BYTES` allow."""
    texts, size = [], 0
    for run in runs:
        text = html.escape(json.dumps(run.config, indent=1, ensure_ascii=False))
        size += len(text)
        if size > CONFIG_BYTES:
            rest = len(runs) - len(texts)
            texts.append(f'<p class="note">{rest} more configs are left out for their size.</p>')
            break
        name = escape(run.summary.name)
        texts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(texts)
