"""Runs compared on one HTML page: metrics, gate statistics, configs, environments and data."""

from xlstm_jax.report.loading import Summary
from xlstm_jax.report.page import Report, write

__all__ = ["Report", "Summary", "write"]
