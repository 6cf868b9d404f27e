"""A run and `evaluate` give one number for one checkpoint."""

import dataclasses

import pytest

from xlstm_jax import cpu
from xlstm_jax.cli import evaluate as command
from xlstm_jax.cli import main
from xlstm_jax.data import load
from xlstm_jax.evaluate import by_position, perplexity
from xlstm_jax.modules import LM, MLSTMConfig
from xlstm_jax.sharding import make_devices
from xlstm_jax.train import fit
from xlstm_jax.train.program import TrainProgram


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """A run without resets between short documents, measured over all windows."""
    root = tmp_path_factory.mktemp("documents")
    for split in ("train", "valid", "test"):
        (root / split).mkdir()
        for i in range(9):
            (root / split / f"{i}.txt").write_text("gate " * (1 + i % 3) + "scan" * (i % 4))
    model = dict(mlstm=MLSTMConfig(num_heads=2, inner_dim=16), embedding_std=1.0, head_std=1.0)
    train = dict(steps=1, document_resets=False, eval_batches=50, loss_chunk=3)
    cfg = experiment(data=dict(source=str(root), seq_len=6), model=model, **train)
    return cfg, root / "run", fit(cfg, root / "run")


def measures(run, **train):
    """The metrics of a run of another config at this checkpoint, and how `evaluate` is called."""
    cfg, _, result = run
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **train))
    windows, params = load(cfg.data, "valid"), result.state.params
    program = TrainProgram(cfg, make_devices(cfg.mesh))
    with program.devices.active():
        metrics = program.evaluate(params, windows)
    return metrics, (LM(cfg.model), {"params": params}, windows)


def test_the_final_held_out_loss_is_that_of_the_command(run, monkeypatch, capsys):
    _, run_dir, result = run
    measured = []

    def note(*args, **options):
        measured.append(perplexity(*args, **options))
        return measured[-1]

    monkeypatch.setattr(command, "perplexity", note)
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    assert main(["evaluate", str(run_dir)]) == 0
    assert f"{measured[0].nats_per_token:.4f}" in capsys.readouterr().out
    assert measured[0].nats_per_token == result.evaluation["valid_loss"]
    assert measured[0].bits_per_byte == result.evaluation["valid_bits_per_byte"]
    assert measured[0].num_tokens == result.evaluation["valid_tokens"]


@pytest.mark.parametrize("document_resets", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_buckets_add_up_to_the_loss_with_and_without_resets(run, document_resets):
    metrics, args = measures(run, document_resets=document_resets)
    options = dict(batch_size=run[0].data.batch_size, document_resets=document_resets)
    assert perplexity(*args, **options).nats_per_token == metrics["valid_loss"]
    buckets = [b for b in by_position(*args, **options) if b.num_tokens]
    nats = sum(b.nats_per_token * b.num_tokens for b in buckets)
    assert nats / metrics["valid_tokens"] == pytest.approx(metrics["valid_loss"], rel=1e-5)
    same = metrics["valid_loss"] == pytest.approx(run[2].evaluation["valid_loss"], rel=1e-4)
    assert same != document_resets  # they matter here


def test_a_part_of_the_windows_is_the_same_part_in_both(run):
    metrics, args = measures(run, eval_batches=1)
    options = dict(batch_size=run[0].data.batch_size, max_batches=1, document_resets=False)
    assert perplexity(*args, **options).nats_per_token == metrics["valid_loss"]
    assert metrics["valid_tokens"] < run[2].evaluation["valid_tokens"]
