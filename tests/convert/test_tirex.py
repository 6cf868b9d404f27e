"""TiRex-2: results of the package `tirex-2`, streams, missing values, gradients, bad files."""

import dataclasses
import functools
import json
import math
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files
from tests.convert.files import rewrite
from xlstm_jax import convert
from xlstm_jax.convert import WeightsError, mapping
from xlstm_jax.convert.fields import Fields, read_config
from xlstm_jax.convert.tensors import WeightsWarning
from xlstm_jax.convert.tirex_fields import tirex_config
from xlstm_jax.errors import ArgumentError, ConfigError, UnsupportedError
from xlstm_jax.modules import tirex
from xlstm_jax.modules.tirex import scaling

FOLDER = golden_files.FOLDER / "tirex2_tiny"
CFG = tirex_config(Fields(read_config(FOLDER), "config.json"), 2)
PLAIN = dataclasses.replace(CFG, sign_flip=False, difference=False)
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
P, HORIZON = CFG.patch_size, 18


@functools.cache  # not when tests are collected
def params():
    """The parameters of the folder."""
    with jax.ensure_compile_time_eval():  # a function that is compiled may be the first to ask
        return convert.load_tirex(FOLDER)[1]


@functools.partial(jax.jit, static_argnames="cfg")
def network(cfg, x, group, is_target):
    """Quantiles at every position of a batch of series that were padded to one length."""
    is_known = ~jnp.isnan(x[:, -cfg.future_len :]).all(axis=1) & ~is_target
    roles = tirex.Roles(group, is_target, is_known)
    scale = scaling.fit_scale(x, cfg)
    patches = scaling.to_patches(scaling.apply_scale(scale, x, cfg), cfg.patch_size)
    variables = {"params": params()}
    y: Any = tirex.TiRex(cfg).apply(variables, patches, roles, method=tirex.TiRex.quantiles)
    return scaling.undo_scale(scale, y, cfg)


def result(case, x):
    """What the package computed for one case, by ours."""
    covariates = dict(past=x["past"], future=x["future"])
    if case == "network":
        return network(CFG, x["network"], x["group"].astype(int), x["is_target"] == 1)
    if case in ("gaps", "short"):
        return tirex.forecast(CFG, params(), x["gaps"], HORIZON, pad_context=case == "gaps")
    if case == "trend":
        return tirex.forecast(CFG, params(), x["targets"][:1, :50], HORIZON)
    if case == "past_only":
        return tirex.forecast(CFG, params(), x["targets"], CFG.future_len, past=x["past"])
    cfg = PLAIN if case == "plain" else CFG
    return tirex.forecast(cfg, params(), x["targets"], HORIZON, **covariates)


@pytest.fixture(scope="module")
def golden():
    """The results of the package."""
    return golden_files.load("tirex2_tiny_io")


def arrays(golden, dtype="float32"):
    """The inputs of the golden vectors."""
    return {name: jnp.asarray(array, dtype) for name, array in golden.under("input/").items()}


@pytest.mark.parametrize(
    "dtype, case",
    [("float32", "covariates")]
    + [("float64", case) for case in ("network", "gaps", "trend", "covariates", "past_only")]
    + [("float64", "plain")],
)
def test_results_are_those_of_the_package(dtype, case, golden):
    expected = golden.arrays[f"output64/{case}"]
    with jax.enable_x64(dtype == "float64"):
        actual = result(case, arrays(golden, dtype))
        assert actual.dtype == dtype
        golden_files.assert_matches(actual, expected, TOLERANCE[dtype], case)


def test_the_golden_series_use_every_path(golden):
    x = arrays(golden)
    assert scaling.has_trend(x["targets"]).tolist() == [True, False]
    assert scaling.has_trend(x["targets"][:1, :50]).all()
    assert x["targets"].shape[1] > CFG.context_len > x["gaps"].shape[1]
    is_binary = scaling.fit_scale(x["future"], CFG).is_binary
    assert is_binary.tolist() == [False, True]
    assert {block.cell for block in CFG.blocks} == {"mlstm", "slstm"}


def test_default_sizes_have_the_published_numbers_of_parameters():
    cfg = tirex.TiRexConfig()
    pair = cfg.blocks[:2]
    assert cfg.blocks == 6 * pair
    shapes = mapping.by_path(tirex.param_shapes(dataclasses.replace(cfg, blocks=pair)))
    univariate = multivariate = 0
    for path, leaf in shapes.items():
        size = math.prod(leaf.shape) * (6 if path.startswith(("time", "variate")) else 1)
        is_multivariate = "merge" in path or path.startswith("variate")
        univariate += size * (not is_multivariate)
        multivariate += size * is_multivariate
    assert (univariate, multivariate) == (38_449_264, 44_052_480)


# Streams


def periodic(rng, variates, periods):
    """Series whose scale does not depend on the number of periods, of 3 patches; with gaps."""
    x = rng.standard_normal((variates, 3 * P)).astype(np.float32)
    x[0, 5:15] = np.nan
    x[-1] = x[-1] > 0  # binary
    return jnp.asarray(np.tile(x, periods))


@pytest.fixture(scope="module")
def stream():
    """Targets and past covariates of two periods, and the state after the first one."""
    rng = np.random.default_rng(1)
    targets, past = periodic(rng, 2, 2), periodic(rng, 2, 2)
    return targets, past, begin(targets, past)


def begin(targets, past):
    """The state after the first 3 patches."""
    return tirex.start(CFG, params(), targets[:, : 3 * P], past=past[:, : 3 * P], pad_context=False)


def assert_close(actual, expected, tolerance=1e-5):
    """Asserts equality relative to the maximum of each array."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_a_forecast_after_the_start_is_that_of_the_context(golden):
    x = arrays(golden)
    state = tirex.start(CFG, params(), x["targets"], past=x["past"])
    expected = golden.arrays["output64/past_only"]
    assert_close(tirex.predict(CFG, params(), state, CFG.future_len), expected)
    # The width of the forecast of differences, here of the first target, depends on the horizon.
    assert_close(tirex.predict(CFG, params(), state, P)[1], expected[1, :, :P])


def test_a_streamed_forecast_is_that_of_all_values_at_once(stream):
    targets, past, state = stream
    state = tirex.append(CFG, params(), state, targets[:, 3 * P :], past=past[:, 3 * P :])
    at_once = tirex.forecast(CFG, params(), targets, HORIZON, past=past, pad_context=False)
    assert_close(tirex.predict(CFG, params(), state, HORIZON), at_once)


def test_values_can_be_appended_in_any_number_of_patches(golden):
    x = arrays(golden)
    targets, past = x["targets"][:, : 6 * P], x["past"][:, : 6 * P]
    state = begin(targets, past)
    # The differences and the level of a target with a trend are in the state.
    assert state.trend.is_diff.tolist() == [[True, False]] * 2
    at_once = tirex.append(CFG, params(), state, targets[:, 3 * P :], past=past[:, 3 * P :])
    for first in range(3 * P, 6 * P, P):
        patch = slice(first, first + P)
        state = tirex.append(CFG, params(), state, targets[:, patch], past=past[:, patch])
    assert_close(state._replace(trend=None), at_once._replace(trend=None))
    for a, b in zip(state.trend, at_once.trend, strict=True):
        np.testing.assert_array_equal(a, b)
    median = tirex.predict(CFG, params(), state, HORIZON)[0, 2]
    assert abs(median[0] - targets[0, -1]) < 20  # a level, not a difference


def test_the_size_of_a_state_does_not_depend_on_the_context():
    long = jnp.zeros((1, 6 * CFG.context_len))
    shapes = [
        jax.tree.map(jnp.shape, jax.eval_shape(lambda x: tirex.start(CFG, params(), x), x))
        for x in (long[:, :P], long)
    ]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_streamed_is_refused(stream, unchecked_types):
    targets, past, state = stream
    for call, error, message in (
        (lambda: tirex.start(CFG, params(), targets, future=past), UnsupportedError, "backward"),
        (lambda: tirex.append(CFG, params(), state, targets[:, : P + 1], past=past[:, : P + 1]),
         ArgumentError, "complete patches, a multiple of 8 values, got 9"),
        (lambda: tirex.append(CFG, params(), state, targets), ArgumentError, "2 past covariates"),
        (lambda: tirex.predict(CFG, params(), state, 25), ArgumentError, "from 1 to 24"),
        (lambda: tirex.forecast(CFG, params(), targets[0], 1), ArgumentError, "targets[None]"),
        (lambda: tirex.forecast(CFG, params(), targets, 1, past=past[:, 1:]), ArgumentError, "NaN"),
        (lambda: tirex.forecast(CFG, params(), targets, 9, future=past), ArgumentError, "57)"),
        (lambda: tirex.forecast(CFG, params(), targets.astype(int), 9), ArgumentError, "int32"),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value)


# Properties


@jax.jit
def hidden(patches, roles):
    return tirex.TiRex(CFG).apply({"params": params()}, patches, None, roles)[0]


def test_covariates_do_not_see_targets_and_targets_no_later_target(rng):
    patches = jnp.asarray(rng.standard_normal((4, 5, P)), jnp.float32)
    is_target = jnp.array([True, True, False, False])
    is_known = jnp.array([False, False, True, False])
    roles = tirex.Roles(jnp.zeros(4, jnp.int32), is_target, is_known)
    before, after = (hidden(x, roles) for x in (patches, patches.at[0, 3:].add(1)))
    is_same = (before == after).all(axis=2)
    expected = np.ones((4, 5), bool)
    expected[:2, 3:] = False  # both targets, from the change on
    np.testing.assert_array_equal(is_same, expected)
    # A covariate with a known future is read backward too, and seen by all.
    assert (hidden(patches.at[2, 4].add(1), roles) != before).any(axis=2).all()


def test_past_covariates_are_read_forward_only(rng):
    patches = jnp.asarray(rng.standard_normal((4, 5, P)), jnp.float32)
    is_target = jnp.array([True, True, False, False])
    roles = tirex.Roles(jnp.zeros(4, jnp.int32), is_target, jnp.zeros(4, bool))
    before, after = (hidden(x, roles) for x in (patches, patches.at[3, 4].add(1)))
    changed = (before != after).any(axis=2)
    assert changed[:, 4].all() and not changed[:, :4].any()
    assert_close(before, hidden(patches, roles._replace(is_known=None)))


def test_a_state_has_no_backward_direction(rng):
    patches = jnp.asarray(rng.standard_normal((2, 1, P)), jnp.float32)
    roles = tirex.Roles(jnp.zeros(2, jnp.int32), jnp.array([True, False]), jnp.zeros(2, bool))
    variables = {"params": params()}
    _, state = jax.eval_shape(tirex.TiRex(CFG).apply, variables, patches, None, roles)
    with pytest.raises(UnsupportedError, match="all positions at once"):
        tirex.TiRex(CFG).apply(variables, patches, state, roles)


def test_series_of_a_batch_do_not_affect_each_other(rng):
    patches = jnp.asarray(rng.standard_normal((4, 3, P)), jnp.float32)
    target, known = jnp.array([True, False, True, True]), jnp.array([False, True, False, False])
    roles = tirex.Roles(jnp.array([7, 7, 2, 5]), target, known)
    together = hidden(patches, roles)
    assert_close(together[:2], hidden(patches[:2], jax.tree.map(lambda leaf: leaf[:2], roles)))
    assert_close(together[2:], hidden(patches[2:], None))  # alone: no variate mixer


def test_scale_and_trend_ignore_missing_values(rng):
    x = rng.standard_normal((40, 60)) + rng.uniform(0, 0.25, (40, 1)) * np.arange(60)[None]
    x[rng.uniform(size=x.shape) < 0.3] = np.nan
    x[0], x[1], x[2] = np.nan, 3.0, np.where(np.arange(60) < 57, np.nan, x[2])
    scale = scaling.fit_scale(jnp.asarray(x, jnp.float32), CFG)
    np.testing.assert_allclose(scale.mean[1:], np.nanmean(x[1:], axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale.std[3:], np.nanstd(x[3:], axis=1), rtol=1e-5)
    assert scale.std[:2].tolist() == [1.0, pytest.approx(1e-8)]
    expected = []
    for y in x:
        (t,) = np.nonzero(~np.isnan(y))
        if len(t) < 4 or np.std(y[t]) == 0:
            expected.append(False)
            continue
        z = (y[t] - y[t].mean()) / np.std(y[t], ddof=1)
        slope, offset = np.polyfit(t, z, 1)
        r2 = 1 - np.sum((z - slope * t - offset) ** 2) / np.sum(z**2)
        expected.append(bool(abs(slope) * 60 >= 1.5 and r2 >= 0.87))
    assert scaling.has_trend(jnp.asarray(x, jnp.float32)).tolist() == expected
    assert 3 < sum(expected) < 37


def test_forecasts_can_be_mapped_and_compiled(golden):
    x = arrays(golden)["gaps"]

    @jax.jit
    def forecast(x):
        one = functools.partial(tirex.forecast, CFG, params(), pad_context=False)
        return jax.vmap(lambda x: one(x, HORIZON))(x)

    first, second = forecast(jnp.stack([x, 2 * x + 1]))
    assert_close(first, golden.arrays["output64/short"])
    assert_close(second, 2 * first + 1)


@pytest.mark.slow
def test_gradients_are_finite_where_values_are_missing_constant_or_binary(golden):
    x = arrays(golden)
    targets = jnp.stack([x["targets"][0, :40], jnp.full(40, jnp.nan), jnp.full(40, 2.0)])
    future = jnp.concatenate([x["future"][:, : 40 + P], jnp.full((1, 40 + P), jnp.nan)])
    cfg = dataclasses.replace(CFG, sign_flip=False)

    def loss(weights, targets, future):
        return jnp.sum(tirex.forecast(cfg, weights, targets, P, future=future) ** 2)

    y, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params(), targets, future)
    assert jnp.isfinite(y)
    for path, leaf in mapping.by_path(grads[0]).items():
        assert jnp.isfinite(leaf).all() and (leaf != 0).any(), path
    for leaf in grads[1:]:
        assert jnp.isfinite(leaf).all()


def test_random_parameters_have_the_names_and_shapes_of_loaded_ones(key):
    random = jax.eval_shape(lambda key: tirex.init_params(CFG, key), key)
    assert jax.tree.map(jnp.shape, params()) == jax.tree.map(jnp.shape, random)


# Files


@pytest.fixture
def folder(tmp_path):
    """A copy of the checkpoint, to be changed."""
    return shutil.copytree(FOLDER, tmp_path / "tirex", copy_function=shutil.copyfile)


def edit(folder, path, value):
    """Sets a field of config.json; `path` has dots."""
    config = json.loads((folder / "config.json").read_text())
    *parents, last = path.split(".")
    node = config
    for name in parents:
        node = node[name]
    node[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def message(folder, error=ConfigError):
    with pytest.raises(error) as caught:
        convert.load_tirex(folder)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


CELL = "stack.0.time_mixer.fwd_cell."


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    def corrupt(tensors):
        del tensors[CELL + "zgate.weight"]
        tensors["stack.1.time_mixer.fwd_cell.conv.weight"] = np.ones(3, np.float32)
        tensors["stack_out_norm.weight"] = np.ones(25, np.float32)

    rewrite(folder, corrupt)
    text = message(folder, WeightsError)
    for part in (
        CELL + "zgate.weight (4, 6, 6) is missing (our time_0/cell/cell_input/kernel)",
        "stack.1.time_mixer.fwd_cell.conv.weight (3,) is unexpected",
        "stack_out_norm.weight must have the shape (24,), got (25,) (our norm/scale)",
    ):
        assert part in text


@pytest.mark.parametrize("alias", ["rev_cell._bias_", "fwd_cell.bias", "rev_cell.fgate.weight"])
def test_a_shared_tensor_may_have_any_of_its_names(folder, alias):
    name = CELL + {"fgate.weight": "fgate.weight"}.get(alias.partition(".")[2], "_bias_")

    def rename(tensors):
        tensors["stack.0.time_mixer." + alias] = tensors.pop(name)

    rewrite(folder, rename)
    jax.tree.map(np.testing.assert_array_equal, convert.load_tirex(folder)[1], params())


def test_names_of_one_tensor_with_different_values_are_rejected(folder):
    def add(tensors):
        tensors[CELL + "recurrent_kernel"] = tensors[CELL + "_recurrent_kernel_"] + 1

    rewrite(folder, add)
    assert "must be equal" in message(folder, WeightsError)


def test_values_that_are_not_finite_are_reported(folder):
    rewrite(folder, lambda tensors: tensors["stack_out_norm.weight"].fill(np.nan))
    with pytest.warns(WeightsWarning, match="stack_out_norm.weight"):
        convert.load_tirex(folder)


def test_a_folder_of_the_older_format_is_explained(folder):
    for old, new in (("config.json", "model-config.yaml"), ("model.safetensors", "model.ckpt")):
        (folder / old).rename(folder / new)
    assert "only model-config.yaml, of an older format" in message(folder)


@pytest.mark.parametrize(
    "path, value, demand",
    [
        ("act_func", "Softplus", "act_func of"),
        ("embedding_dim", 10**9, "at most 96, the largest size in the weights"),
        ("num_blocks", 4, "num_blocks of"),
        ("quantiles", [0.1, 0.5, 0.8], "set sign_flip to False"),
        ("quantiles", "0.5", "a list of numbers between 0 and 1"),
        ("future_len", 20, "a multiple of patch_size=8"),
        ("output_patch_size", 4, "it must be input_patch_size"),
        ("tokenizer_cfg.input_patch_stride", 4, "overlapping patches are not supported"),
        ("tokenizer_cfg", None, "tokenizer_cfg of"),
        ("scaler_cfg.eps", 0, "above 0"),
        ("stack_config.recipe", ["mlstm"] * 3, "at most 2 names"),
        ("stack_config.recipe", ["other"], "a list of names in templates"),
        ("stack_config.templates.mlstm.time_mixer.model_type", "lstm", "bi-mlstm, bi-slstm"),
        ("stack_config.templates.mlstm.time_mixer.num_heads", 5, "num_heads"),
        ("stack_config.templates.slstm.variate_mixer.num_heads", 5, "num_variate_heads"),
        ("stack_config.templates.slstm.variate_mixer.embedding_dim", 8, "that of the model"),
    ],
)
def test_invalid_fields_of_the_config_are_named(folder, path, value, demand):
    edit(folder, path, value)
    assert demand in message(folder)
