"""Fixtures of the tests in this folder."""

import jax
import pytest

from tests.transformations import cases


@pytest.fixture
def case(request) -> cases.Case:
    """A case by its name; float64 is enabled unless it is a kernel."""
    case = cases.BY_NAME[request.param]
    with jax.enable_x64(not case.is_kernel):
        yield case
