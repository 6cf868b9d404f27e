"""Scaling laws: fits of the losses of runs, and what they predict."""

from xlstm_jax.scaling.checks import Errors, prediction_errors
from xlstm_jax.scaling.laws import Line, PowerLaw, fit_fixed_ratio, fit_power_law
from xlstm_jax.scaling.parabolas import Parabola, fit_isoflop
from xlstm_jax.scaling.surface import LossSurface, parabola_bias
from xlstm_jax.scaling.surface_fit import fit_loss_surface
from xlstm_jax.scaling.times import TimeModel, fit_time_model

__all__ = [
    "Errors",
    "Line",
    "LossSurface",
    "Parabola",
    "PowerLaw",
    "TimeModel",
    "fit_fixed_ratio",
    "fit_isoflop",
    "fit_loss_surface",
    "fit_power_law",
    "fit_time_model",
    "parabola_bias",
    "prediction_errors",
]
