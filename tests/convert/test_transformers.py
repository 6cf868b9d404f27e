"""Comparison with `transformers`, if it is installed."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from tests.convert.baselines import GOLDEN, OTHERS, random_params
from tests.golden_files import FOLDER
from xlstm_jax import convert
from xlstm_jax.convert import compare
from xlstm_jax.data import DataConfig, loader
from xlstm_jax.modules import LM, LargeConfig, LMConfig
from xlstm_jax.train import TrainConfig, init_state, make_optimizer, make_train_step

REASON = "the logits of transformers need the packages torch and transformers"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

pytestmark = [
    # Warnings of third-party packages.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("name", ["hf_tiny", "hf_tiny_sharded", *GOLDEN.values()])
def test_logits_of_a_loaded_folder_are_those_of_transformers(name):
    comparison = compare.with_transformers(FOLDER / name)
    assert comparison.error < 2e-5


@pytest.mark.parametrize("family", OTHERS)
def test_saved_baseline_has_the_same_logits_in_transformers(family, tmp_path):
    convert.save_hf(tmp_path / "out", OTHERS[family], random_params(OTHERS[family]))
    comparison = compare.with_transformers(tmp_path / "out")
    assert comparison.error < 1e-5


def test_gpu_kernels_in_the_config_are_replaced(tmp_path):
    folder = shutil.copytree(FOLDER / "hf_tiny", tmp_path / "hf", copy_function=shutil.copyfile)
    fields = json.loads((folder / "config.json").read_text())
    fields["chunkwise_kernel"] = "chunkwise--triton_xl_chunk"
    (folder / "config.json").write_text(json.dumps(fields))
    comparison = compare.with_transformers(folder)
    assert comparison.error < 2e-5


@pytest.mark.parametrize("use_bias, cap", [(False, 30), (True, 30.0), (False, None)])
def test_trained_and_saved_model_has_the_same_logits_in_transformers(tmp_path, use_bias, cap):
    model = LMConfig(
        vocab_size=257,
        dim=64,
        pattern="MM",
        large=LargeConfig(num_heads=2, ffn_dim=96, use_bias=use_bias),
        final_norm="rms",
        final_norm_eps=1e-6,
        logit_soft_cap=cap,
    )
    cfg, data = TrainConfig(steps=20, lr=3e-3), DataConfig(source="grammar", seq_len=64)
    tx, examples = make_optimizer(cfg), loader.load(data, "train")
    state = init_state(LM(model), tx, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    step = jax.jit(make_train_step(LM(model), tx, cfg))
    losses = []
    for index in range(20):
        state, metrics = step(state, loader.batch_at(examples, data, index))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    convert.save_hf(tmp_path / "out", model, state.params, max_shard_bytes=100_000)
    comparison = compare.with_transformers(tmp_path / "out")
    assert comparison.error < 2e-5
