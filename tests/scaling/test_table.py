"""Tables of runs: reading, synonyms, and what is refused or dropped with its name."""

import json

import numpy as np
import pytest

from xlstm_jax.config import load_config, to_dict
from xlstm_jax.errors import ConfigError
from xlstm_jax.scaling import Analysis, Condition, Rule, from_records, read_table
from xlstm_jax.scaling.table import check_conventions

RECORDS = [
    {
        "id": f"r{n}",
        "arch": "xlstm",
        "seq_len": 128,
        "N": 1e6 * (n + 1),
        "tokens": 1e8,
        "loss": 3.0 + n,
    }
    for n in range(6)
]


def write(folder, records):
    path = folder / "table.csv"
    lines = [",".join(records[0])] + [
        ",".join(str(x) for x in record.values()) for record in records
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_synonyms_are_understood(tmp_path):
    runs = read_table(write(tmp_path, RECORDS))
    assert len(runs) == runs.num_rows == 6 and len(runs.sha256) == 64
    np.testing.assert_array_equal(runs["num_params"], [record["N"] for record in RECORDS])
    np.testing.assert_array_equal(runs["val_loss"], [record["loss"] for record in RECORDS])
    np.testing.assert_array_equal(runs["train_flops"], 6 * runs["num_params"] * 1e8)
    assert runs.name(2) == "r2" and "6 * num_params * train_tokens" in runs.notes[0]


def test_own_names_of_columns_are_configurable(tmp_path):
    records = [{"size": 1e6, "seen": 1e8, "nats": 3.0}]
    own = {"num_params": "size", "train_tokens": "seen", "val_loss": "nats"}
    assert read_table(write(tmp_path, records), own)["val_loss"] == [3.0]
    with pytest.raises(ConfigError, match="no column num_params; name it num_params, params"):
        read_table(write(tmp_path, records))
    with pytest.raises(ConfigError, match=r"names 'sizes', which is absent; did you mean size\?"):
        read_table(write(tmp_path, records), own | {"num_params": "sizes"})


def test_parquet_equals_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [record | {"is_final": n > 2} for n, record in enumerate(RECORDS)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    read = read_table(tmp_path / "table.parquet")
    for name, column in read_table(write(tmp_path, records)).columns.items():
        np.testing.assert_array_equal(column, read[name])


@pytest.mark.parametrize(
    "text, part",
    [
        ("N,D\n1,2,3\n", "line 2, has 3 values for 2 columns"),
        ("N,tokens,loss\n1,2,high\n", "column val_loss must hold numbers, got 'high'"),
        ("N,tokens,loss\n", "at least one run"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, text, part):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ConfigError, match=part):
        read_table(tmp_path / "table.csv")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "table.xlsx").write_text("")
    with pytest.raises(ConfigError, match=r"not a \.csv or \.parquet file"):
        read_table(tmp_path / "table.xlsx")


def test_missing_losses_are_dropped_with_their_names():
    runs = from_records([*RECORDS, RECORDS[0] | {"id": "failed", "loss": ""}])
    selected = Analysis().select(runs)
    assert len(selected) == 6 and "dropped 1 runs" in selected.notes[-1]
    assert "failed" in selected.notes[-1]


@pytest.mark.parametrize("loss", [0.0, -1.0, float("inf")])
def test_impossible_losses_are_refused_with_the_run(loss):
    runs = from_records([*RECORDS, RECORDS[0] | {"id": "odd", "loss": loss}])
    with pytest.raises(ConfigError, match=f"val_loss must be positive .* got {loss} for odd"):
        Analysis().select(runs)


def test_equal_ids_are_refused():
    with pytest.raises(ConfigError, match="run_id must be unique, got 'r1' for 2 runs"):
        Analysis().select(from_records([*RECORDS, RECORDS[1] | {"loss": 9.0}]))


def test_copies_are_refused_or_dropped():
    runs = from_records([*RECORDS, RECORDS[1] | {"id": "copy"}])
    with pytest.raises(ConfigError, match="1 copies of runs with equal sizes and loss: copy"):
        Analysis().select(runs)
    selected = Analysis(drop_duplicates=True).select(runs)
    assert len(selected) == 6 and "dropped 1 copies: copy" in selected.notes[-1]


def test_mixed_contexts_and_conventions_are_refused_with_an_example():
    runs = from_records([*RECORDS, RECORDS[0] | {"id": "long", "seq_len": 256}])
    assert len(Analysis().split(runs)) == 2
    with pytest.raises(
        ConfigError, match=r"agree in context_length, got 128.0, 256.0 \(such as lo"
    ):
        check_conventions(runs, "xlstm")
    runs = from_records(
        [record | {"flop_count": "first" if n else "tfla"} for n, record in enumerate(RECORDS)]
    )
    with pytest.raises(ConfigError, match="agree in flop_count, got first, tfla"):
        check_conventions(runs, "xlstm")


def test_filters_keep_and_drop():
    cfg = Analysis(
        keep=(Condition(column="val_loss", high=7.5),),
        drop=(
            Rule(
                reason="spikes",
                conditions=(
                    Condition(column="val_loss", low=4),
                    Condition(column="run_id", values=("r2", "r0")),
                ),
            ),
        ),
    )
    selected = cfg.select(from_records(RECORDS))
    assert list(selected["run_id"]) == ["r0", "r1", "r3", "r4"]
    assert "dropped 1 runs: spikes" in selected.notes[-1]
    with pytest.raises(ConfigError, match="no run is left"):
        Analysis(keep=(Condition(column="val_loss", high=0),)).select(from_records(RECORDS))
    with pytest.raises(ConfigError, match="no column 'los'; did you mean loss"):
        Analysis(keep=(Condition(column="los", high=0),)).select(from_records(RECORDS))


def test_budgets_are_labels_a_column_or_clusters():
    flops = [5.9e18, 6.2e18, 6.1e18, 1e19, 1.02e19, 1.05e19, 5e20]
    records = [
        RECORDS[0] | {"id": str(n), "flops": x, "isoflop": "extra"} for n, x in enumerate(flops)
    ]
    runs = from_records(records)
    labels = Analysis(budgets=(6e18, 1e19, 3e19)).budget_of(runs)
    np.testing.assert_array_equal(labels, [6e18] * 3 + [1e19] * 3 + [np.nan])
    labels = Analysis(budgets=(6e18, 1.15e19)).budget_of(runs)  # 13, 11 and 9 % below
    np.testing.assert_array_equal(labels, [6e18] * 3 + [np.nan] * 2 + [1.15e19, np.nan])
    assert np.isnan(Analysis().budget_of(runs)).all()
    labels = Analysis(budget_column="").budget_of(runs)
    assert len(set(labels[:3])) == len(set(labels[3:6])) == 1 and np.isnan(labels[6])
    np.testing.assert_allclose(labels[[0, 3]], [6.07e18, 1.02e19], rtol=0.01)


def test_analysis_files_in_json_and_python_are_equal(tmp_path):
    cfg = Analysis(
        columns={"val_loss": "nats"},
        keep=(Condition(column="val_loss", low=1.0, values=("a", 2.0)),),
        drop=(Rule(reason="spike", conditions=(Condition(column="x", high=2.0),)),),
        budgets=(6e18, 1e19),
        flops_range=(5e18, 5e19),
        starts=7,
    )
    (tmp_path / "analysis.json").write_text(json.dumps(to_dict(cfg)))
    assert load_config(tmp_path / "analysis.json", Analysis) == cfg
    with pytest.raises(ConfigError, match="rule 'spike' must have at least one condition"):
        Rule(reason="spike", conditions=())
