"""Runs that are killed by SIGKILL at random moments and resumed: the records are equal."""

import random
import time

import pytest

from tests.faults.conftest import Try

pytestmark = pytest.mark.faults
PHASES = ["step", "save", "publish", "delete", "evaluate"]
KILLS = 5  # for each seed


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_a_run_that_is_killed_in_any_phase_ends_with_the_records_of_an_unbroken_one(
    make_run, unbroken, tries, seed
):
    run, rng, rows = make_run(), random.Random(seed), []
    while len(rows) < KILLS:
        phase, count = rng.choice(PHASES), rng.randint(1, 3)
        child = run.start()
        child.wait_for(phase, count * 4 if phase == "step" else count)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        code, errors = child.finish()
        assert all(line.startswith("xlstm-jax: ") for line in errors), errors
        if code == 0:  # too late: it had finished
            assert run.records() == unbroken.records()
            run = make_run()
            continue
        assert code == -9
        rows.append((phase, max(child.steps - run.saved, 0)))
    run.to_end()
    is_equal = run.records() == unbroken.records()
    outcome = "resumed, equal" if is_equal else "resumed, not equal"
    tries += [Try("SIGKILL", phase, outcome, lost, seed) for phase, lost in rows]
    assert is_equal
