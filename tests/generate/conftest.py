"""Fast compilation for the tests in this folder, none of which measures speed."""

import pytest

from tests import quick


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(tmp_path_factory):
    with quick.compilation(tmp_path_factory.mktemp("compiled")):
        yield
