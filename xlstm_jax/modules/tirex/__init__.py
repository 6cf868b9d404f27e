"""TiRex-2: a pretrained forecaster of series with covariates (arXiv:2607.01204)."""

from xlstm_jax.modules.tirex.config import TiRexBlockConfig, TiRexConfig
from xlstm_jax.modules.tirex.forecasting import forecast
from xlstm_jax.modules.tirex.network import Roles, TiRex, init_params, param_shapes
from xlstm_jax.modules.tirex.stream import StreamState, append, predict, start

__all__ = [
    "Roles",
    "StreamState",
    "TiRex",
    "TiRexBlockConfig",
    "TiRexConfig",
    "append",
    "forecast",
    "init_params",
    "param_shapes",
    "predict",
    "start",
]
