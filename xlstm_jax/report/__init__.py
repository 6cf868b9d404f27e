"""Runs compared on one HTML page: metrics, gate statistics, configs, environments and data."""

from xlstm_jax.report.page import Report, write
from xlstm_jax.report.runs import Summary

__all__ = ["Report", "Summary", "write"]
