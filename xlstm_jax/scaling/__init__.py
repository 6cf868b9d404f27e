"""Scaling laws: sweeps and their launchers, tables of runs, fits, and what these predict."""

from xlstm_jax.scaling.analysis import Analysis, Condition, Rule
from xlstm_jax.scaling.checks import Errors, prediction_errors
from xlstm_jax.scaling.collect import Table, collect
from xlstm_jax.scaling.fitting import Fits, GroupFit, fit_table, holdout
from xlstm_jax.scaling.grids import Grids
from xlstm_jax.scaling.launch import Local, Slurm
from xlstm_jax.scaling.laws import Line, PowerLaw, fit_fixed_ratio, fit_power_law
from xlstm_jax.scaling.parabolas import Parabola, fit_isoflop
from xlstm_jax.scaling.prediction import Prediction, predict
from xlstm_jax.scaling.runs import run
from xlstm_jax.scaling.surface import LossSurface, parabola_bias
from xlstm_jax.scaling.surface_fit import fit_loss_surface
from xlstm_jax.scaling.sweep import Point, RunSpec, Shape, Sweep, plan
from xlstm_jax.scaling.table import Runs, from_records, read_table
from xlstm_jax.scaling.times import TimeModel, fit_time_model

__all__ = [
    "Analysis",
    "Condition",
    "Errors",
    "Fits",
    "Grids",
    "GroupFit",
    "Line",
    "Local",
    "LossSurface",
    "Parabola",
    "Point",
    "PowerLaw",
    "Prediction",
    "Rule",
    "RunSpec",
    "Runs",
    "Shape",
    "Slurm",
    "Sweep",
    "Table",
    "TimeModel",
    "collect",
    "fit_fixed_ratio",
    "fit_isoflop",
    "fit_loss_surface",
    "fit_power_law",
    "fit_table",
    "fit_time_model",
    "from_records",
    "holdout",
    "parabola_bias",
    "plan",
    "predict",
    "prediction_errors",
    "read_table",
    "run",
]
