"""`xlstm-jax report`: what the page says about runs, in whatever state they are."""

import dataclasses
import html.parser
import json
import os
import re
import sys

import pytest

from experiments.char_lm import SMOKE
from tests import quick
from tests.report.records import ABOUT, eval_record, gate_record, train_record
from xlstm_jax import report
from xlstm_jax.cli import main
from xlstm_jax.config import ConfigError
from xlstm_jax.report import page
from xlstm_jax.train import fit, lock


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch):
    """A stand-in for plotly.js, whose megabytes only the test of the real file needs."""
    monkeypatch.setattr(page, "_plotly_js", lambda: "plotly")


@pytest.fixture
def make_page(tmp_path):
    """Writes the report of runs and returns its text."""

    def make(*runs) -> str:
        report.write(runs, tmp_path / "report.html")
        return (tmp_path / "report.html").read_text("utf-8")

    return make


class Parser(html.parser.HTMLParser):
    """Collects the start tags of a page, and checks that elements are closed in order."""

    VOID = {"meta", "input", "br", "path"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def data_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def table_of(text: str, section: str) -> list[list[str]]:
    """The cells of the table of a section, row by row, without tags."""
    part = text.split(f'<section id="{section}">')[1].split("</section>")[0]
    cells = [
        re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", part)
    ]
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in row] for row in cells]


def test_summary_has_the_final_values(make_run, make_page):
    header, run = table_of(make_page(make_run("a")), "summary")
    values = dict(zip(header, run, strict=True))
    assert values["run"] == "a" and values["status"] == "finished" and values["step"] == "100"
    assert (values["valid loss"], values["valid bits per byte"]) == ("1.0000", "2.0000")
    assert values["code loss"] == "2.0000" and values["training loss"] == "1.1353"
    assert values["tokens"] == "6,400" and values["time in steps"] == "50.0 s"
    assert values["parameters"] == "1,234" and values["tokens/s"] == "128"


def test_lowest_validation_loss_of_several_runs_is_marked(make_run, make_page):
    runs = [make_run(name, [eval_record(100, loss)]) for name, loss in (("a", 2.0), ("b", 1.5))]
    assert "<strong>" not in make_page(runs[0])
    text = make_page(*runs)
    assert "<strong>1.5000</strong>" in text and "<strong>2.0000</strong>" not in text


def test_charts_have_the_metrics_of_each_run_on_every_x_axis(make_run, make_page):
    fast = make_run("fast", [train_record(10, mfu=0.4), train_record(20, mfu=0.5)])
    data = data_of(make_page(fast, make_run("plain")))
    ids = [chart["id"] for chart in data["charts"]]
    assert ids == ["loss", "validation", "tokens", "mfu", "wait", "grad", "lr"]
    train = data["runs"][0]["train"]
    assert train["step"] == [10, 20] and train["tokens_seen"] == [640, 1280]
    assert train["seconds"] == [5, 10] and train["data_wait"] == [0.2, 0.2]
    validation = data["runs"][1]["validation"]
    assert validation["valid_loss"] == [1.5, 1] and validation["seconds"] == [25, 50]


def test_skipped_steps_are_counted_from_the_start(make_run, make_page):
    records = [train_record(10, skipped=3), train_record(20), train_record(30, skipped=4)]
    data = data_of(make_page(make_run("a", records)))
    assert data["runs"][0]["train"]["skipped"] == [3, 3, 7]
    assert "skipped" in [chart["id"] for chart in data["charts"]]


def test_gate_statistics_have_a_curve_per_block_and_head(make_run, make_page):
    gates = data_of(make_page(make_run("a")))["runs"][0]["gates"]
    assert gates["step"] == [50, 100] and gates["tokens_seen"] == [3200, 6400]
    lengths = {(c["block"], c["head"]): c["values"] for c in gates["curves"]["effective_length"]}
    assert lengths == {
        ("0:m", 0): [10, 10], ("0:m", 1): [100, 100], ("1:s", 0): [10, 10], ("1:s", 1): [100, 100],
    }  # fmt: skip


def test_gates_of_any_names_and_shapes_are_shown(make_run, make_page):
    values = [{"any": {"x": 1.5}}, {"any": {"x": [None, 2.0], "y": "no"}, "other": 3}, "none"]
    records = [{"step": n, "gates": gates} for n, gates in enumerate(values, 1)]
    gates = data_of(make_page(make_run("a", records)))["runs"][0]["gates"]
    heads = [(c["block"], c["head"], c["values"]) for c in gates["curves"]["x"]]
    assert heads == [("any", 0, [1.5, None]), ("any", 1, [None, 2])]


def test_only_fields_that_differ_are_compared_and_complete_configs_follow(make_run, make_page):
    text = make_page(make_run("a", lr=1e-3), make_run("b", lr=0.5, seed=3))
    header, *fields = table_of(text, "config")
    assert header == ["field", "a", "b"]
    assert fields == [["train.lr", "0.001", "0.5"], ["train.seed", "0", "3"]]
    assert text.count("<details>") == 2 and "&quot;weight_decay&quot;: 0.1" in text


def test_many_runs_are_the_rows_of_the_comparison(make_run, make_page):
    text = make_page(*[make_run(f"r{n}", [], seed=n) for n in range(4)])
    header, *runs = table_of(text, "config")
    assert header == ["run", "train.seed"] and runs[3] == ["r3", "3"]


def test_differing_lines_of_the_environment_are_marked(make_run, make_page):
    other = ABOUT | {"versions": {"python": "3.11.7", "jax": "0.12.0"}}
    text = make_page(make_run("a"), make_run("b", about=other), make_run("c"))
    header, *fields = table_of(text, "environment")
    assert header == ["field", "a,  c", "b"]
    assert [field for field in fields if "≠" in field[0]] == [
        ["≠ versions.jax", "0.10.2", "0.12.0"]
    ]
    assert text.count('<tr class="differs">') == 1
    assert table_of(text, "data-description")[0] == ["field", "all 3 runs"]


def test_same_run_twice_is_shown_once(make_run, tmp_path):
    run = make_run("a")
    (tmp_path / "link").symlink_to(run)
    names = [s.name for s in report.write([run, tmp_path / "link"], tmp_path / "r.html").runs]
    assert names == ["a"]


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run, tmp_path):
    runs = [make_run("x/a"), make_run("y/a"), make_run("z/b")]
    names = [s.name for s in report.write(runs, tmp_path / "r.html").runs]
    assert names == ["x/a", "y/a", "z/b"]


HOSTILE = "<script>alert(1)</script>&\"'%{y}"


def test_text_of_files_is_escaped(make_run, make_page, tmp_path):
    names = {"name": HOSTILE, "versions": {HOSTILE: HOSTILE}, "data": {HOSTILE: [HOSTILE]}}
    records = [train_record(10), gate_record(10, [HOSTILE]), {"step": 10, f"{HOSTILE}_loss": 1.0}]
    run = make_run(HOSTILE.replace("/", "-"), records, about=names)
    (run / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    text = make_page(run, make_run("b"))
    assert text.count("<script") == 3 and "alert(1)" in text
    assert [tag for tag, _ in Parser(text).tags].count("script") == 3
    assert data_of(text)["runs"][0]["gates"]["curves"]["forget_mean"][0]["block"] == HOSTILE


def test_page_has_title_language_headings_and_labelled_tables_and_charts(make_run, make_page):
    text = make_page(make_run("a"), make_run("b", lr=1.0))
    tags = Parser(text).tags
    assert "<title>2 training runs - xlstm-jax report</title>" in text
    assert ("html", {"lang": "en"}) in tags
    names = [tag for tag, _ in tags]
    assert names.count("h1") == 1 and names.count("h2") == 8
    assert names.count("table") == names.count("caption") == names.count("thead") == 4
    assert all(attrs["scope"] in ("row", "col") for tag, attrs in tags if tag == "th")
    charts = [attrs for _, attrs in tags if attrs.get("class") == "plot"]
    assert len(charts) == 8 and all(c["role"] == "img" and c["aria-label"] for c in charts)


def test_damaged_lines_are_ignored(make_run, make_page):
    run = make_run("a", [train_record(10), train_record(20)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": NaN}\n[]\n\0\n{"step": -1}\n{"step": 40, "los')
    assert data_of(make_page(run))["runs"][0]["train"]["step"] == [10, 20]


def test_loss_that_is_not_finite_is_a_gap(make_run, make_page):
    run = make_run("a", [train_record(10), train_record(20, loss=None), train_record(30, loss=1.0)])
    assert data_of(make_page(run))["runs"][0]["train"]["loss"] == [1.8187, None, 1]


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
def test_any_file_of_a_run_may_be_missing(make_run, make_page, name):
    run = make_run("a")
    (run / name).unlink()
    text = make_page(run, make_run("b"))
    assert len(table_of(text, "summary")) == 3
    (summary, _) = report.write([run, make_run("c")], run / "report.html").runs
    expected = {"config.json": "stopped", "metrics.jsonl": "no records"}
    assert summary.status == expected.get(name, "finished")


HUGE = dict(loss=1e308, step_time=1e308, skipped=10**300, tokens_seen=10**300)
RECORDS = [[], [{"step": 5}], [{"step": 0, "loss": 1.0}], [gate_record(1)]]
RECORDS += [[train_record(2**62, **HUGE), train_record(10, **HUGE)]]


@pytest.mark.parametrize("records", RECORDS)
def test_runs_with_few_records_or_huge_numbers_are_shown(make_run, make_page, records):
    text = make_page(make_run("a", records))
    Parser(text)  # raises an error unless the page is well-formed
    assert len(table_of(text, "summary")) == 2  # with the header


def test_status_of_an_unfinished_run_says_whether_it_goes_on(make_run, tmp_path):
    def status(run):
        return report.write([run], tmp_path / "r.html").runs[0].status

    run = make_run("a", [train_record(10, skipped=8, skipped_in_a_row=8)])
    assert status(run) == "stopped"
    (run / "diverged.json").write_text('{"first_skipped_step": 2}')
    assert status(run) == "diverged"
    started = make_run("b", [])
    assert status(started) == "no records"
    for folder in (run, started):
        with lock.hold(folder):
            assert status(folder) == "training"
    resumed = "".join(json.dumps(train_record(step)) + "\n" for step in (10, 20, 30))
    (run / "metrics.jsonl").write_text(resumed)
    assert status(run) == "stopped"
    again = json.dumps(train_record(40, skipped_in_a_row=8)) + "\n"
    (run / "metrics.jsonl").write_text(resumed + again)
    assert status(run) == "diverged"


def test_page_is_small_for_any_number_and_length_of_runs(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SERIES_BYTES", 15_000)
    monkeypatch.setattr(page, "GATE_BYTES", 3_000)
    records = [train_record(step, loss=step / 7) for step in range(1, 300)]
    records += [gate_record(step) for step in range(1, 300, 5)]
    runs = [make_run(f"r{n}", records, seed=n) for n in range(3)]
    for count in (1, 3):
        report.write(runs[:count], tmp_path / "r.html")
        text = re.search(r'id="data">(.*?)</script>', (tmp_path / "r.html").read_text())[1]
        assert 8_000 < len(text) < 23_000
        gates = [run["gates"]["step"] for run in json.loads(text)["runs"]]
        assert all(0 < len(steps) < 60 for steps in gates)


def test_page_beyond_the_limit_is_refused(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_BYTES", 10_000)
    with pytest.raises(ConfigError, match="must have at most 10,000 bytes, .* compare fewer runs"):
        report.write([make_run("a")], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_complete_configs_are_left_out_where_they_are_too_large(make_run, make_page, monkeypatch):
    monkeypatch.setattr(page, "CONFIG_BYTES", 7000)
    text = make_page(*[make_run(f"r{n}", []) for n in range(4)])
    left_out = 4 - text.count("<details>")
    assert 0 < left_out < 4 and f"{left_out} more configs are left out" in text


def test_interrupted_write_leaves_the_old_report(make_run, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write([make_run("a")], path)
    assert path.read_text() == "old" and list(tmp_path.glob("*.tmp")) == []


def test_missing_plotly_is_a_one_line_error(make_run, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"needs the package plotly, .*xlstm-jax\[report\]"):
        report.write([make_run("a")], tmp_path / "r.html")


def test_command_writes_the_page_and_prints_the_final_values(
    make_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(make_run("a")), str(make_run("b"))]) == 0
    assert (tmp_path / "report.html").exists()
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "a",
        "finished",
        "100",
        "1.1353",
        "1.0000",
    ]
    assert main(["report", "a", "--json", "--out", "b/x.html"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == "b/x.html" and result["runs"][0]["evaluation"]["valid_loss"] == 1.0
    assert [path.name for path in tmp_path.glob("**/*.html")] == ["report.html", "x.html"]


ERRORS = {
    "report": "a report needs at least one run, got none",
    "report nowhere": "RUN must be the directory of a run, with config.json or run.json",
    "report a empty": "but empty has none of these; pass another.",
    "report a a/run.json": "but a/run.json is not a directory; pass another.",
    "report a --out nowhere/r": "--out must be a file in an existing folder, got nowhere/r;",
    "report a --out empty": "--out must be a file in an existing folder, got empty",
    "report a --out pipe": "--out must be a file in an existing folder, got pipe",
    "report a list": "list/run.json must be a table of fields, got []; restore it.",
    "report a torn": "torn/config.json is not valid JSON",
    "report a deep": "deep/run.json is nested too deeply; restore it.",
}


@pytest.mark.parametrize("line", ERRORS)
def test_bad_arguments_give_a_one_line_error(make_run, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "list", "torn", "deep"):
        make_run(name)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list" / "run.json").write_text("[]")
    (tmp_path / "torn" / "config.json").write_text('{"name": ')
    (tmp_path / "deep" / "run.json").write_text('{"a": ' * 900 + "1" + "}" * 900)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("xlstm-jax: ") and err.count("\n") == 1
    assert ERRORS[line] in err
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.slow
def test_report_of_a_real_run_has_its_metrics(tmp_path, one_device):
    model = dataclasses.replace(SMOKE.model, dim=8, pattern="m")
    with quick.compilation(tmp_path / "cache"):
        fit(dataclasses.replace(SMOKE, model=model), tmp_path / "char_lm")
    (summary,) = report.write([tmp_path / "char_lm"], tmp_path / "report.html").runs
    text = (tmp_path / "report.html").read_text("utf-8")
    assert summary.status == "finished" and summary.step == summary.steps == 20
    assert summary.evaluation.keys() == {
        f"valid_{x}" for x in ("loss", "accuracy", "bits_per_byte")
    }
    assert None not in (summary.loss, summary.tokens_seen, summary.seconds, summary.num_params)
    charts = {chart["id"] for chart in data_of(text)["charts"]}
    assert charts >= {"loss", "validation", "tokens", "wait", "grad", "lr"}
    header, *fields = table_of(text, "environment")
    assert header == ["field", "char_lm"] and "versions.jax" in [name for name, _ in fields]


def test_file_has_no_source_that_a_browser_would_fetch(make_run, make_page, monkeypatch):
    monkeypatch.undo()  # the real plotly.js
    text = make_page(*[make_run(f"r{n}") for n in range(3)])
    assert len(text.encode()) < page.MAX_BYTES and "plotly.js v" in text
    tags = Parser(text).tags
    assert not [tag for tag, attrs in tags if "src" in attrs or tag in ("link", "iframe", "img")]
    assert all(attrs["href"].startswith("#") for _, attrs in tags if "href" in attrs)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] for _, attrs in tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy and "http" not in policy
