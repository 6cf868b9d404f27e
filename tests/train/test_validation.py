"""Training and `evaluate` compute the same validation loss for a checkpoint."""

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
    """A run without resets between short documents, evaluated on all windows."""
    root = tmp_path_factory.mktemp("documents")
    for split in ("train", "valid", "test"):
        (root / split).mkdir()
        for i in range(9):
            (root / split / f"{i}.txt").write_text("gate " * (1 + i % 3) + "scan" * (i % 4))
    model = dict(mlstm=MLSTMConfig(num_heads=2, inner_dim=16), embedding_std=1.0, head_std=1.0)
    train = dict(steps=1, document_resets=False, eval_batches=50, loss_chunk=3)
    cfg = experiment(data=dict(source=str(root), seq_len=6), model=model, **train)
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    return cfg, run_dir, fit(cfg, run_dir)


def evaluate_run(run, **train):
    """Metrics of this checkpoint under another config, and the arguments of `perplexity`."""
    cfg, _, result = run
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **train))
    windows, params = load(cfg.data, "valid"), result.state.params
    program = TrainProgram(cfg, make_devices(cfg.mesh))
    with program.devices.active():
        metrics = program.evaluate(params, windows)
    return metrics, (LM(cfg.model), {"params": params}, windows)


@pytest.mark.slow
def test_the_evaluate_command_gives_the_final_validation_loss_of_the_run(run, monkeypatch, capsys):
    _, run_dir, result = run
    results = []

    def spy(*args, **options):
        results.append(perplexity(*args, **options))
        return results[-1]

    monkeypatch.setattr(command, "perplexity", spy)
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    assert main(["evaluate", str(run_dir)]) == 0
    assert f"{results[0].nats_per_token:.4f}" in capsys.readouterr().out
    assert results[0].nats_per_token == result.evaluation["valid_loss"]
    assert results[0].bits_per_byte == result.evaluation["valid_bits_per_byte"]
    assert results[0].num_tokens == result.evaluation["valid_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("document_resets", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_by_position_sum_to_the_validation_loss(run, document_resets):
    metrics, args = evaluate_run(run, document_resets=document_resets)
    options = dict(batch_size=run[0].data.batch_size, document_resets=document_resets)
    assert perplexity(*args, **options).nats_per_token == metrics["valid_loss"]
    buckets = [b for b in by_position(*args, **options) if b.num_tokens]
    nats = sum(b.nats_per_token * b.num_tokens for b in buckets)
    assert nats / metrics["valid_tokens"] == pytest.approx(metrics["valid_loss"], rel=1e-5)
    same = metrics["valid_loss"] == pytest.approx(run[2].evaluation["valid_loss"], rel=1e-4)
    assert same != document_resets  # resets change the loss of these data


def test_training_and_evaluate_sample_the_same_windows(run):
    metrics, args = evaluate_run(run, eval_batches=1)
    options = dict(batch_size=run[0].data.batch_size, max_batches=1, document_resets=False)
    assert perplexity(*args, **options).nats_per_token == metrics["valid_loss"]
    assert metrics["valid_tokens"] < run[2].evaluation["valid_tokens"]
