"""Input of the tests of preparation."""

import pytest

from tests.data.prepare.runs import write_records


@pytest.fixture
def source(tmp_path):
    """Five files of 60 records each."""
    for number in range(5):
        write_records(tmp_path / f"in/{number}.jsonl", [f"{number} text {i} ü" for i in range(60)])
    return tmp_path / "in"
