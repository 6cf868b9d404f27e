"""Time models: recovery of rates and overheads, and the smooth maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling import TimeModel, fit_time_model, times

FLOPS, BYTES = (
    x.ravel() for x in np.meshgrid(np.geomspace(1e9, 1e14, 6), np.geomspace(1e7, 1e12, 6))
)
smooth_max = jax.jit(times.smooth_max)
BATCH = np.tile([1.0, 8.0, 64.0], 12)


def test_smooth_maximum_is_between_mean_and_maximum_and_tends_to_it(x64):
    x, y = jnp.array([1e-3, 2.0, 5.0, 3e9]), jnp.array([4e-3, 2.0, 1.0, 2e9])
    largest = jnp.maximum(x, y)
    before = (x + y) / 2
    for sharpness in (0.1, 1.0, 10.0, 100.0):
        smooth = smooth_max(x, y, sharpness)
        assert (before <= smooth * (1 + 1e-9)).all() and (smooth <= largest * (1 + 1e-12)).all()
        before = smooth
    np.testing.assert_allclose(smooth_max(x, y, 1e9), largest, rtol=1e-6)


def test_equal_arguments_return_themselves(x64):
    x = jnp.array([1e-6, 1.0, 7e12])
    np.testing.assert_allclose(smooth_max(x, x), x, rtol=1e-12)
    np.testing.assert_allclose(-smooth_max(-x, -x), x, rtol=1e-12)


def check_recovery(model):
    true = TimeModel(model, 3e14, 1.2e12, 2e-3, 5e-5 if model == "memory" else 0.0, 8.0, 0.0, 0)
    if model in ("compute", "memory"):
        absent = "bytes_per_s" if model == "compute" else "flop_per_s"
        true = true._replace(**{absent: np.inf})
    seconds = true(FLOPS, BYTES, BATCH)
    batch = BATCH if model == "memory" else None
    fit = fit_time_model(FLOPS, BYTES, seconds, model=model, batch_size=batch)
    np.testing.assert_allclose(fit[1:5], true[1:5], rtol=1e-4)
    np.testing.assert_allclose(fit(FLOPS, BYTES, BATCH), seconds, rtol=1e-6)
    assert fit.rms < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["roofline", "compute", "sum", "smooth_max", "smooth_roofline", "max", "memory"]
)
def test_models_are_recovered(model):
    check_recovery(model)


@pytest.mark.slow
def test_overheads_are_not_negative():
    seconds = FLOPS / 3e14 * (1 + np.linspace(-0.05, 0.05, len(FLOPS)))
    fit = fit_time_model(FLOPS, None, seconds - 1e-6 * seconds.min(), model="compute")
    assert 0 <= fit.overhead_s < 1e-6
    np.testing.assert_allclose(fit.flop_per_s, 3e14, rtol=0.02)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "arguments, part",
    [
        (dict(model="fast"), "model must be one of"),
        (dict(residuals="square"), "residuals must be one of"),
        (dict(bytes=None), "bytes must be given"),
        (dict(seconds=np.ones(3)), "vectors of one length"),
        (dict(seconds=-np.ones(36)), "seconds must be positive"),
    ],
)
def test_unusable_arguments_are_refused(arguments, part):
    defaults = dict(flops=FLOPS, bytes=BYTES, seconds=np.ones(36))
    with pytest.raises(ArgumentError, match=part):
        fit_time_model(**defaults | arguments)
