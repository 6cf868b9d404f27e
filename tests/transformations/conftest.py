"""Fixtures of the tests in this folder."""

import jax
import pytest

from tests.transformations import rows


@pytest.fixture
def row(request) -> rows.Row:
    """A row of the table, by its name; float64 is enabled unless it is a kernel."""
    row = rows.BY_NAME[request.param]
    with jax.enable_x64(not row.is_kernel):
        yield row
