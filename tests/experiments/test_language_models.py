"""Experiments with language models: variants, outcomes, domains, questions; size smoke."""

import gzip
import json
import math
import pathlib

import numpy as np
import pytest

from experiments import ablations, downstream, ladder, language_models, paloma, slimpajama_15b
from xlstm_jax.config import ConfigError
from xlstm_jax.evaluate import Domain
from xlstm_jax.modules.config import LMConfig


def test_size_and_variant_are_one_option():
    cfg = slimpajama_15b.config("paper:llama")
    assert set(cfg.model.pattern) == {"a"} and cfg.data.source == "slimpajama"
    assert cfg == slimpajama_15b.config("paper", "llama")
    with pytest.raises(ConfigError, match="variant 'gpt' of size='paper:gpt' is unknown; use one"):
        slimpajama_15b.config("paper:gpt")
    with pytest.raises(ConfigError, match="size='huge' is unknown; use one of: smoke, cpu, paper"):
        ladder.config("huge")


def test_the_compared_step_is_evaluated_and_saved():
    train = slimpajama_15b.config("paper").train
    step = language_models.COMPARED_STEP
    assert step % train.eval_every == step % train.checkpoint_every == 0
    assert step + train.checkpoint_every * (train.keep - 1) > train.steps  # and is not deleted


def test_missing_data_are_one_line_with_the_layout(tmp_path):
    with pytest.raises(ConfigError, match=r"--data must be .*manifest\.json, tokenizer/, train/"):
        language_models.check_data(tmp_path)
    options = dict(size="paper", data=tmp_path, runs=tmp_path / "runs", out=tmp_path / "o.json")
    with pytest.raises(ConfigError, match="--data must be"):
        slimpajama_15b.main(slimpajama_15b.Options(**options))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "o.json").exists()


def test_the_best_learning_rate_is_that_with_the_lowest_mean_and_never_a_diverged_one():
    by_lr = [[1.0, math.nan], [3.0, 2.0], [2.5, 2.0]]
    losses = language_models.Losses((0.1, 0.01, 0.001), (0, 1), by_lr, 7)
    assert losses.best == 2
    result = losses.to_json()
    assert (result["lr"], result["bits_per_token"]) == (0.001, 2.25)
    assert result["by_seed"] == {"0": 2.5, "1": 2.0}


def test_ablations_expect_the_order_of_the_first_table():
    losses = {"lstm": 3.0, "xlstm_0:1": 2.0, "xlstm_7:1": 2.5}
    results = {name: {"bits_per_token": loss} for name, loss in losses.items()}
    assert list(ablations.outcome("lstm_to_xlstm", results).values()) == [True, False]
    assert ablations.outcome("gates", results) == {}
    measured = dict.fromkeys(ablations.variants_of("gates"), 14.0) | {
        "gates": 13.0,
        "forget_1": None,
    }
    holds = ablations.paper_outcome("gates", measured)
    assert holds["gates below forget_input_bias"] and not holds["forget_bias below fixed"]
    assert not any("forget_1" in name for name in holds)  # it has no published perplexity


def test_every_variant_of_an_ablation_is_another_model_at_every_size():
    for size in ablations.SIZES:
        for table in ("lstm_to_xlstm", "gates", "blocks"):
            configs = [ablations.config(size, name) for name in ablations.variants_of(table)]
            distinct = {(cfg.model, cfg.train.freeze) for cfg in configs}
            assert len(distinct) == len(configs), (size, table)


def test_fixed_biases_are_frozen_and_gates_without_inputs_have_no_kernel():
    cfg = ablations.config("cpu", "input")
    assert cfg.train.freeze == r"mlstm/forget_gate/bias$"
    assert not cfg.model.mlstm.forget_gate_kernel and cfg.model.mlstm.input_gate_kernel
    assert ablations.config("cpu", "gates").train.freeze is None


def test_published_perplexities_fit_lines_with_the_known_slopes():
    for family, slope in ladder.SLOPES.items():
        assert round(ladder.published_line(family).slope, 4) == slope
    line = ladder.fit_line([10, 100, 1000], [3 * n**-0.5 for n in (10, 100, 1000)])
    np.testing.assert_allclose(line, (0.5, math.log(3)), rtol=1e-9)
    rising = {"llama": ladder.Line(-0.1, 1.0)}
    assert list(ladder.outcome(rising).values()) == [True, True, False]


def test_documents_become_one_file_per_domain_and_are_refused_otherwise(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "domains"
    (raw / "c4").mkdir(parents=True)
    documents = [dict(text=f"t{n}", source="c4", subdomain=f"a/{n % 2}.org") for n in range(3)]
    with gzip.open(raw / "c4" / "val.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    (raw / "ptb.jsonl").write_text(json.dumps(dict(text="p", source="ptb")) + "\n")
    assert paloma.prepare_domains(raw, out) == 3
    names = sorted(path.name for path in out.iterdir())
    assert names == ["c4__a_0.org.jsonl", "c4__a_1.org.jsonl", "ptb__all.jsonl"]
    assert (out / names[0]).read_text().count("\n") == 2
    with pytest.raises(ConfigError, match="--domains must be a new or an empty folder"):
        paloma.prepare_domains(raw, out)
    (raw / "ptb.jsonl").write_text('{"text": "p"}\n')
    with pytest.raises(
        ConfigError, match=r"ptb\.jsonl:1 must be an object with the fields text and"
    ):
        paloma.prepare_domains(raw, tmp_path / "other")
    with pytest.raises(ConfigError, match="--prepare must be a folder with files"):
        paloma.prepare_domains(out / "none", tmp_path / "third")


def domain(nats, num_tokens=1, num_bytes=1):
    return Domain(nats, nats / math.log(2), num_tokens, num_bytes, 1)


def test_a_source_weights_its_domains_by_tokens_and_columns_equally():
    domains = {"c4__a": domain(1.0, 3, 3), "c4__b": domain(2.0, 1, 1), "ptb__all": domain(3.0)}
    sources = paloma.by_source(domains)
    assert sources["c4"].nats_per_token == pytest.approx(1.25)
    assert paloma.mean_of_columns(sources) is None  # most columns are missing
    complete = dict.fromkeys(paloma.COLUMNS, domain(0.0)) | {"ptb": domain(math.log(13))}
    assert paloma.mean_of_columns(complete) == pytest.approx(2.0)
    result = {"num_domains": 4, "wins": {"Llama": {"num_wins": 2}, "Mamba": {"num_wins": 3}}}
    assert list(paloma.outcome(result, None).values()) == [False, True]
    bits = {"stdlib": 2.0, "topics": 3.0, "unicode": 1.5}
    small = {"models": {"Llama": {"bits_per_byte": bits}}}
    assert list(paloma.outcome(small, "stdlib").values()) == [False]


def test_questions_have_the_right_continuation_first_and_words_that_occur_before():
    choices = list(downstream.questions("grammar", 5))
    assert choices == list(downstream.questions("grammar", 5))
    documents = downstream.validation_lines("grammar")
    for context, (right, *wrong) in choices:
        assert len(wrong) == 3 and len(context) <= downstream.CONTEXT_BYTES
        text = next(t for t in map("".join, documents) if context in t)
        assert text[text.index(context) + len(context) :].startswith(right)
    for context, (word,) in downstream.last_words("topics", 3):
        assert len(word) >= 4 and not context.endswith("\n")


def test_published_means_are_those_of_the_columns():
    """Two of the means are printed 0.01 higher than those of the rounded columns."""
    for name, (_, *columns, mean) in downstream.ACCURACIES.items():
        assert np.mean(columns) == pytest.approx(mean, abs=0.011), name


def test_the_size_paper_needs_models():
    for module in (downstream, paloma):
        with pytest.raises(ConfigError, match="--models must name at least"):
            module.main(module.Options(size="paper"))


@pytest.fixture
def smaller(monkeypatch):
    """One block of each model: less to compile."""
    small_model = language_models.small_model

    def small(family: str, dim: int, blocks: int = 8) -> LMConfig:
        model = small_model(family, dim, 8)
        return LMConfig(**{**vars(model), "pattern": model.pattern[0]})

    monkeypatch.setattr(language_models, "small_model", small)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "smaller")
def test_the_smallest_size_of_trained_models_writes_results(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for module in (paloma, downstream):
        out = tmp_path / f"{module.__name__}.json"
        assert module.main(module.Options(size="smoke", runs=runs, out=out)) == 0
        assert set(json.loads(out.read_text())["models"]) == {"xLSTM[1:0]", "Llama"}
        assert 0 < out.with_suffix(".png").stat().st_size < 300 * 1024
    scores = json.loads(out.read_text())["models"]["Llama"]
    assert scores["num_questions"] == 4 and scores["last_word_perplexity"] > 1
    out = tmp_path / "slimpajama.json"
    options = dict(size="smoke", families=("llama",), runs=runs, out=out)
    assert slimpajama_15b.main(slimpajama_15b.Options(**options)) == 0
    assert 0 < json.loads(out.read_text())["models"]["llama"]["bits_per_token"] < 10
    assert (runs / "prepared_grammar" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("smaller")
def test_the_smallest_size_of_grids_writes_results(tmp_path, monkeypatch):
    out = tmp_path / "o.json"
    monkeypatch.setitem(ladder.WIDTHS, "smoke", (16, 24))
    monkeypatch.setattr(ladder, "SMALL_FAMILIES", ("llama",))
    assert ladder.main(ladder.Options(size="smoke", seeds=(0,), out=out)) == 0
    assert [one["width"] for one in json.loads(out.read_text())["small"]["llama"]] == [16, 24]
    monkeypatch.setattr(
        ablations, "variants_of", lambda table: {"fixed": ablations.VARIANTS["fixed"]}
    )
    options = dict(size="smoke", table="gates", seeds=(0, 1), out=out)
    assert ablations.main(ablations.Options(**options)) == 0
    assert set(json.loads(out.read_text())["rows"]) == {"fixed"}
    assert 0 < pathlib.Path(out.with_suffix(".png")).stat().st_size < 300 * 1024
