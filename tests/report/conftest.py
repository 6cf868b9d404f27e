"""Run directories without training."""

import pytest

from tests.report.records import write_run


@pytest.fixture
def make_run(tmp_path):
    """Makes a run, as `write_run` below a temporary folder."""
    return lambda name, *args, **kwargs: write_run(tmp_path / name, *args, **kwargs)
