"""`xlstm-jax fit` and `predict`: files, output and one-line errors."""

import csv
import json

import pytest

from tests.scaling.test_fitting import make_records
from tests.test_cli import error_of, workdir  # noqa: F401
from xlstm_jax.cli import main

pytestmark = pytest.mark.usefixtures("workdir")

ANALYSIS = """
from xlstm_jax.scaling import Analysis

def config():
    return Analysis(free_gamma=False, starts=20)
"""


@pytest.fixture
def table(workdir):  # noqa: F811
    with (workdir / "table.csv").open("w") as file:
        writer = csv.DictWriter(file, list(make_records()[0]))
        writer.writeheader()
        writer.writerows(make_records())
    return "table.csv"


@pytest.mark.slow
def test_fit_writes_pictures_and_predict_reads_the_fit(table, workdir, capsys):  # noqa: F811
    (workdir / "analysis.py").write_text(ANALYSIS)
    assert main(["fit", table, "--analysis", "analysis.py"]) == 0
    out = capsys.readouterr().out
    assert "llama, 512: 32 runs" in out and "of 20 starts at the best" in out
    names = {path.name for path in (workdir / "fits").iterdir()}
    kinds = ("isoflop", "surface", "residuals", "pareto", "allocation")
    assert names == {"fit.json"} | {
        f"{kind}_{theme}.{suffix}"
        for kind in kinds
        for theme in ("light", "dark")
        for suffix in ("svg", "png")
    }
    assert main(["predict", "--flops", "1e19"]) == 0
    assert "nearest preset  scaling_llama" in capsys.readouterr().out
    assert main(["predict", "--flops", "1e19", "--out", "optimal.py", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["proposal"]["train"] == "xlstm-jax train optimal.py --data.source DATA"
    assert main(["describe", "optimal.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_flops"] == pytest.approx(1e19, rel=0.02)


def test_errors(table, workdir, capsys):  # noqa: F811
    assert "none.csv is not a file" in error_of(capsys, "fit", "none.csv")
    assert "must be a folder" in error_of(capsys, "fit", table, "--out", table)
    (workdir / "bad.json").write_text('{"start": 3}')
    message = error_of(capsys, "fit", table, "--analysis", "bad.json")
    assert "did you mean starts" in message
    message = error_of(capsys, "predict", "--flops", "1e19")
    assert "fits/fit.json does not exist; write it with `xlstm-jax fit" in message
    assert "--batch-tokens and" in error_of(
        capsys, "predict", "--flops", "1", "--batch-tokens", "0"
    )
