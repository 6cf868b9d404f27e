"""The model on one page: its size and imports, its state, and a short run."""

import ast
import pathlib

import jax
import numpy as np
import pytest

from experiments import minimal

# A page for readers: it broadcasts biases and positions as NumPy does.
with_broadcasting = jax.numpy_rank_promotion("allow")
SOURCE = pathlib.Path(minimal.__file__).read_text()


def test_it_fits_on_a_page_and_uses_neither_trainer_nor_modules():
    assert len(SOURCE.splitlines()) <= 150
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)]
    assert [(node.module, [name.name for name in node.names]) for node in imports] == [
        ("xlstm_jax", ["ops"])
    ]


def test_targets_are_the_inputs_one_byte_later_and_validation_files_are_others():
    train, valid = minimal.read_text()
    assert len(train) > 10 * len(valid) > 10_000
    batch = minimal.draw_batch(np.arange(200, dtype=np.uint8), np.random.default_rng(0))
    assert batch.shape == (minimal.B, minimal.T + 1)
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)


@pytest.mark.slow
@with_broadcasting
def test_a_sequence_can_be_split_anywhere(monkeypatch):
    monkeypatch.setattr(minimal, "CELLS", "ms")  # less to compile
    params = minimal.init_params(jax.random.key(0))
    params["head"] = jax.random.normal(jax.random.key(1), params["head"].shape)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, minimal.VOCAB)
    expected, _ = jax.jit(minimal.apply)(params, tokens)
    first, states = jax.jit(minimal.apply)(params, tokens[:, :5])
    second, _ = jax.jit(minimal.apply)(params, tokens[:, 5:], states)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, atol=1e-3)


@pytest.mark.slow
@with_broadcasting
def test_the_loss_falls_and_a_sample_follows(capsys, monkeypatch):
    monkeypatch.setattr(minimal, "CELLS", "ms")  # less to compile
    monkeypatch.setattr(minimal, "B", 4)
    losses, text = minimal.main(steps=12)
    assert losses[0] == pytest.approx(8.0, abs=1e-3) and losses[-1] < 7.0
    assert text.startswith(b"def read(self, ") and len(text) == 415
    assert "validation bits per byte" in capsys.readouterr().out
