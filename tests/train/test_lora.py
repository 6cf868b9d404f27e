"""Low-rank adapters: algebra, targets, training, checkpoints and the layout of peft."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm_jax import convert
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import WeightsError
from xlstm_jax.data import batch_at, load
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules import LM, LargeConfig, LMConfig
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.sharding import MeshConfig, make_devices
from xlstm_jax.train import (
    ExperimentConfig,
    LoraConfig,
    fit,
    lora,
    metrics,
    program,
    restore_adapters,
    restore_params,
)
from xlstm_jax.train.checkpoint.unstacked import restore_unstacked
from xlstm_jax.train.evaluators import Evaluator
from xlstm_jax.train.lora.adapters import flatten
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.trainable import num_bytes
from xlstm_jax.train.watch import Watch

RANK2 = LoraConfig(rank=2, alpha=8.0)


def random_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    """Parameters of all built-in kinds of blocks."""
    return random_tree(param_shapes(LMConfig(vocab_size=16, dim=16, pattern="mmsM")))


def test_fresh_adapters_change_nothing_when_merged(params, assert_same, key):
    adapters = lora.init(params, RANK2, key)
    assert_same(lora.merge(params, adapters, RANK2), params)
    pair = adapters["stack"]["m"]["mlstm"]["proj_up"]["kernel"]
    assert pair["lora_a"].shape == (2, 16, 2) and pair["lora_b"].shape == (2, 2, 128)
    assert not pair["lora_b"].any() and np.std(pair["lora_a"]) == pytest.approx(0.25, rel=0.2)


@pytest.mark.parametrize(
    "path",
    [
        "lm_head/kernel",
        "token_embedding/embedding",
        "stack/m/mlstm/proj_up/kernel",  # layers in out
        "stack/m/mlstm/q_proj/kernel",  # layers blocks in out
        "stack/s/slstm/cell_input/kernel",
    ],
)
def test_every_matrix_gets_its_own_product(params, path, key):
    cfg = dataclasses.replace(RANK2, target=f"^{path}$")
    adapters = random_tree(jax.eval_shape(lambda: lora.init(params, cfg, key)), 1)
    (target,), pairs = lora.targets(params, cfg).matrices, flatten(adapters)
    assert target == path and list(pairs) == [path]
    before, after = lora_leaf(params, path), lora_leaf(lora.merge(params, adapters, cfg), path)
    for index in np.ndindex(before.shape[:-2]):
        a, b = (pairs[path][name][index] for name in ("lora_a", "lora_b"))
        np.testing.assert_allclose(after[index], before[index] + 4 * a @ b, atol=1e-5)


def lora_leaf(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


def test_the_default_target_skips_kernels_that_are_not_matrices(params):
    matrices, skipped = lora.targets(params, RANK2)
    assert skipped == [
        "stack/m/mlstm/conv/kernel", "stack/s/slstm/conv/kernel", "stack/s/slstm/recurrent_kernel",
    ]  # fmt: skip
    assert "lm_head/kernel" in matrices and "stack/M/ffn/proj_down/kernel" in matrices
    assert all(path.endswith("/kernel") for path in matrices)


@pytest.mark.parametrize(
    "target, message",
    [
        ("conv/kernel$", r"matrices only, got stack/m/mlstm/conv/kernel of shape \(2, 4, 64\)"),
        ("recurrent|proj_up", "matrices only, got stack/s/slstm/recurrent_kernel"),
        ("bias$", "matrices only, got stack/M/mlstm/forget_gate/bias"),
        ("query/kernel", "got no match; the nearest paths are "),
    ],
)
def test_another_target_must_match_matrices_only(params, target, message, key):
    with pytest.raises(ConfigError, match=message):
        lora.init(params, dataclasses.replace(RANK2, target=target), key)


def test_adapters_of_another_model_are_rejected(params, key):
    adapters = lora.init(params, RANK2, key)
    other = random_tree(param_shapes(LMConfig(vocab_size=16, dim=32, pattern="mmsM")))
    with pytest.raises(ArgumentError, match="lm_head/kernel must have the shape"):
        lora.merge(other, adapters, RANK2)


@pytest.fixture(scope="module")
def base(tiny_lm, experiment, tmp_path_factory):
    cfg, run_dir = experiment(steps=4, eval_every=0), tmp_path_factory.mktemp("base") / "run"
    return fit(cfg, run_dir).state.params, run_dir


@pytest.fixture(scope="module")
def tuned(base, experiment, tmp_path_factory):
    cfg = dataclasses.replace(experiment(steps=6), init_from=str(base[1]), lora=RANK2)
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    return cfg, fit(cfg, run_dir), run_dir


def test_training_adapters_leaves_the_base_bit_identical(base, tuned, assert_same):
    cfg, result, run_dir = tuned
    params = result.state.params
    assert_same({name: tree for name, tree in params.items() if name != "lora"}, base[0])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(params["lora"]))
    about = json.loads((run_dir / "run.json").read_text())
    assert about["lora"]["matrices"] == ["ffn/proj_down/kernel", "lm_head/kernel"]
    assert about["optimizer_bytes"] == num_bytes(result.state.opt_state)
    assert about["optimizer_bytes"] == 2 * num_bytes(params["lora"]) + 4


def test_a_run_restores_merged_parameters_and_adapters_alone(tuned, assert_same):
    cfg, result, run_dir = tuned
    adapters = restore_adapters(run_dir)[1]
    assert_same(adapters, result.state.params["lora"])
    merged = restore_params(run_dir)[1]
    assert_same(restore_unstacked(run_dir)[1], merged)  # computed, so it stays stacked
    assert_same(merged, lora.merged(result.state.params, cfg.lora))
    plain = TrainProgram(dataclasses.replace(cfg, lora=LoraConfig()), make_devices(cfg.mesh))
    evaluation = plain.evaluate(merged, load(cfg.data, "valid"))
    assert evaluation["valid_loss"] == pytest.approx(result.evaluation["valid_loss"], rel=1e-6)


def test_a_resumed_run_of_adapters_is_bit_exact(tuned, tmp_path, assert_same, crash_and_resume):
    cfg, expected, _ = tuned
    assert_same(crash_and_resume(cfg, tmp_path / "run").state, expected.state)


def test_evaluators_and_exports_get_merged_parameters_and_statistics_the_trained_ones(
    base, experiment, tmp_path, assert_same
):
    seen, train = {}, dict(steps=2, watch="params", watch_every=2, log_every=1, export_every=1)
    cfg = dataclasses.replace(experiment(**train, eval_every=2), init_from=str(base[1]), lora=RANK2)

    def export(folder, params):
        folder.mkdir()
        seen["export"] = params

    def evaluate(params, step):
        seen["evaluator"] = jax.device_get(params)
        return {}

    result = fit(cfg, tmp_path / "run", evaluators=[Evaluator("e", evaluate)], exporter=export)
    merged = lora.merged(result.state.params, RANK2)
    assert_same(seen["export"], merged)
    assert_same(seen["evaluator"], jax.device_get(merged))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (record,) = (record for line in lines if "params" in (record := json.loads(line)))
    assert set(record["params"]) == {
        f"lora/{path}/{name}"
        for path in ("ffn/proj_down/kernel", "lm_head/kernel")
        for name in ("lora_a", "lora_b")
    }


def test_statistics_of_gates_are_those_of_the_merged_model(experiment, monkeypatch):
    monkeypatch.setattr(program, "LM", LM)
    cfg = dataclasses.replace(experiment(model={"pattern": "M"}, watch="all"), lora=RANK2)
    watched = TrainProgram(cfg, make_devices(MeshConfig(data=1)))
    state, _, batch = watched.arguments
    statistics = jax.eval_shape(Watch(watched)._statistics, state.params, state.opt_state, batch)
    assert statistics["gates"]["M"]["forget_mean"].shape == (1, 4)
    norms = statistics["params"]
    assert norms["lora/stack/M/mlstm/q/kernel/lora_b"]["grad_norm"].shape == (1,)


def test_a_run_without_adapters_says_so(base):
    with pytest.raises(ConfigError, match="has no adapters"):
        restore_adapters(base[1])


def test_a_target_without_parameters_is_rejected_before_anything_is_written(
    tiny_lm, experiment, tmp_path
):
    cfg = dataclasses.replace(experiment(), lora=LoraConfig(rank=2, target="projdown"))
    with pytest.raises(ConfigError, match="nearest paths are ffn/proj_down"):
        fit(cfg, tmp_path / "run")
    assert list(tmp_path.rglob("*.json")) == []


def test_adapters_and_frozen_parameters_exclude_each_other(experiment):
    with pytest.raises(ConfigError, match="train.freeze='ffn' must be None with lora.rank=2"):
        dataclasses.replace(experiment(freeze="ffn"), lora=RANK2)


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_on_a_mesh_equals_that_of_one_device(tiny_lm, experiment, accumulation):
    """Adapters are sharded like their kernels; their moments too."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2, min_shard_size=1)
    cfg = dataclasses.replace(experiment(accumulation=accumulation), lora=RANK2)
    with jax.default_device(None):
        states = []
        for one in (mesh, MeshConfig(data=1)):
            devices = jax.devices()[: 8 if one is mesh else 1]
            target = TrainProgram(
                dataclasses.replace(cfg, mesh=one), make_devices(one, devices), optax.adam(0.1)
            )
            batch = target.devices.batch(batch_at(load(cfg.data, "train"), cfg.data, 0))
            totals = target.devices.replicate(metrics.empty())
            with target.devices.active():
                states.append(target.step(target.init(), totals, batch)[0])
        adapter = states[0].params["lora"]["ffn"]["proj_down"]["kernel"]
        assert {name: x.sharding.spec for name, x in adapter.items()} == {
            "lora_a": jax.P("tensor", None), "lora_b": jax.P(None, "fsdp"),
        }  # fmt: skip
        for a, b in zip(*(jax.tree.leaves(s.params["lora"]) for s in states), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


LARGE = LMConfig(
    vocab_size=50,
    dim=16,
    pattern="MM",
    large=LargeConfig(num_heads=2, ffn_dim=24),
    final_norm="rms",
    final_norm_eps=1e-6,
)


@pytest.fixture
def saved(tmp_path, key):
    """Parameters of a large model, random adapters, and their folder."""
    params = random_tree(param_shapes(LARGE))
    params = jax.tree.map(lambda x: 0.1 * x, params)
    adapters = random_tree(jax.eval_shape(lambda: lora.init(params, RANK2, key)), 1)
    lora.save(tmp_path / "adapter", adapters, RANK2)
    return params, adapters, tmp_path / "adapter"


def test_saved_adapters_are_loaded_bit_exactly(saved, assert_same):
    params, adapters, folder = saved
    cfg, loaded = lora.load(folder)
    assert (cfg.rank, cfg.alpha) == (2, 8.0)
    assert_same(loaded, adapters)
    assert set(lora.targets(params, cfg).matrices) == set(flatten(adapters))
    with pytest.raises(ConfigError, match="must be new or have no weights"):
        lora.save(folder, adapters, RANK2)


def test_names_and_shapes_are_those_of_peft(saved):
    from safetensors.numpy import load_file

    _, _, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    block = f"{prefix}backbone.blocks.1."
    assert tensors[f"{prefix}lm_head.lora_A.weight"].shape == (2, 16)
    assert tensors[f"{prefix}lm_head.lora_B.weight"].shape == (50, 2)
    assert tensors[f"{block}ffn.proj_down.lora_A.weight"].shape == (2, 24)
    assert tensors[f"{block}mlstm_layer.igate_preact.lora_B.weight"].shape == (2, 2)
    assert len(tensors) == 2 * (1 + 2 * 10)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8.0)
    assert "mlstm_layer.q" in config["target_modules"] and "lm_head" in config["target_modules"]


def test_adapters_that_peft_cannot_represent_are_not_saved(params, tmp_path, key):
    adapters = lora.init(params, LoraConfig(rank=2, target="proj_up/kernel"), key)
    with pytest.raises(ConfigError, match="large blocks.*got stack/m/mlstm"):
        lora.save(tmp_path / "a", adapters, RANK2)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora of .* must be False, got True"),
        ({"peft_type": "IA3"}, "peft_type of .* must be 'LORA'"),
        ({"r": 0}, "must be numbers above 0, got 0"),
        ({"r": 3}, r"of rank 3 for lm_head/kernel, got the ranks \[2\]"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern of"),
    ],
)
def test_folders_with_other_adapters_are_rejected(saved, change, message):
    folder = saved[2]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        lora.load(folder)


@pytest.mark.parametrize(
    "name, message",
    [
        ("base_model.model.backbone.blocks.3.mlstm_layer.q.lora_A.weight", "for all blocks"),
        ("base_model.model.backbone.embeddings.lora_embedding_A", "of a linear map"),
    ],
)
def test_folders_with_other_tensors_are_rejected(saved, name, message):
    from safetensors.numpy import load_file, save_file

    path = saved[2] / "adapter_model.safetensors"
    save_file(load_file(path) | {name: np.zeros((2, 16), np.float32)}, path)
    with pytest.raises(WeightsError, match=message):
        lora.load(saved[2])


def test_a_folder_without_adapters_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"must be a folder with adapter_config\.json"):
        lora.load(tmp_path)


def test_a_copy_of_the_head_in_a_folder_is_ignored(saved, assert_same):
    from safetensors.numpy import load_file, save_file

    _, adapters, folder = saved
    path = folder / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.base_layer.weight": np.zeros((50, 16), np.float32)}
    save_file(load_file(path) | head, path)
    assert_same(lora.load(folder)[1], adapters)


REASON = "the logits of peft need the packages torch, transformers and peft"


@pytest.mark.filterwarnings("ignore")  # of third-party packages
def test_peft_and_transformers_compute_the_logits_of_merged_parameters(saved, tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    peft = pytest.importorskip("peft", reason=REASON)
    params, adapters, folder = saved
    convert.save_hf(tmp_path / "base", LARGE, params)
    tokens = np.random.default_rng(2).integers(0, 50, (1, 32))
    merged = lora.merge(params, adapters, RANK2)
    expected = LM(LARGE).apply({"params": merged}, jnp.asarray(tokens))[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, folder).float().eval()
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(np.abs(expected).max()))
    model.save_pretrained(tmp_path / "theirs")
    cfg, loaded = lora.load(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_rank_0_trains_everything_without_adapters(experiment):
    cfg: ExperimentConfig = experiment()
    assert cfg.lora.rank == 0
    assert lora.attach({"a": 1}, cfg.lora, jax.random.key(0)) == {"a": 1}
