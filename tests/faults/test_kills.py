"""Runs that are killed by SIGKILL at random moments and resumed: the records are equal."""

import random
import time

import pytest

from tests.faults.conftest import Try

pytestmark = pytest.mark.faults
PHASES = ["step", "save", "publish", "delete", "evaluate"]
KILLS = 5  # for each seed; the last seed exports its checkpoints


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7))]
)
def test_a_run_that_is_killed_in_any_phase_ends_with_the_records_of_an_unbroken_one(
    make_run, make_exporting_run, unbroken, tries, seed
):
    phases, rng, kills = PHASES, random.Random(seed), []
    if seed == 6:
        make_run, phases = make_exporting_run, [*PHASES, "export", "export"]
        (unbroken := make_run()).to_end()
    run = make_run()
    while len(kills) < KILLS:
        phase, count = rng.choice(phases), rng.randint(1, 3)
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
        kills.append((phase, max(child.steps - run.saved, 0)))
    run.to_end()
    is_equal = run.records() == unbroken.records() and run.exports() == unbroken.exports()
    outcome = "resumed, equal" if is_equal else "resumed, not equal"
    tries += [Try("SIGKILL", phase, outcome, lost, seed) for phase, lost in kills]
    assert is_equal
