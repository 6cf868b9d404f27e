"""Several processes, the wall clock, and signals."""

import signal
import socket
import time

import numpy as np
import pytest

from tests.faults.conftest import Try

pytestmark = pytest.mark.faults


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [-86400 * 365, 86400 * 365], ids=["back", "ahead"])
def test_a_jump_of_the_wall_clock_changes_nothing(make_run, unbroken, tries, seconds):
    run = make_run(checkpoint_minutes=5.0)
    child = run.start(clock=dict(seconds=seconds, at_step=10))
    assert child.finish() == (0, [])
    # By monotonic time five minutes never pass.
    saved = [step for phase, step in child.phases if phase == "publish"]
    assert saved == [7, 14, 21, 28, 35, 40]
    assert run.records() == unbroken.records()
    tries.append(Try("clock jump", f"{seconds // 86400:+} days", "no effect"))


def test_two_runs_in_one_directory_are_refused_and_the_first_one_goes_on(make_run, unbroken, tries):
    run = make_run()
    first = run.start()
    first.wait_for("step", 2)
    first.process.send_signal(signal.SIGSTOP)  # else it may finish before the second one starts
    run.fails(2, "must not be in use", f"process {first.process.pid} on")
    first.process.send_signal(signal.SIGCONT)
    assert first.finish() == (0, [])
    assert run.records() == unbroken.records()
    tries.append(Try("two runs in one directory", "second", "exit 2, one line; first equal"))


def test_a_second_signal_while_saving_is_one_line_and_the_run_resumes(make_run, unbroken, tries):
    run = make_run()
    child = run.start(seconds={"publish": 5})
    child.wait_for("step", 12)
    child.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    child.process.send_signal(signal.SIGINT)
    code, errors = child.finish(60)
    assert code == 130 and len(errors) == 1 and "interrupted by SIGINT" in errors[0], errors
    lost = child.steps - run.saved
    run.to_end()
    assert run.records() == unbroken.records()
    tries.append(Try("second signal", "while saving", "exit 130, one line; resumed, equal", lost))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_two(run, **options):
    address, processes = f"127.0.0.1:{free_port()}", []
    for process_id in range(2):
        argv = ["--processes.coordinator", address, "--processes.num-processes", "2"]
        argv += ["--processes.process-id", str(process_id)]
        processes.append(run.start(*argv, **options))
    return processes


@pytest.fixture(scope="module")
def unbroken_pair(make_run):
    run = make_run()
    for child in start_two(run):
        assert child.finish()[0] == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["step", "publish"])
@pytest.mark.parametrize("victim", [1, 0], ids=["worker", "coordinator"])
def test_the_survivor_of_two_processes_ends_in_time_and_both_resume(
    make_run, unbroken_pair, tries, victim, phase
):
    run, names = make_run(), ["coordinator", "worker"]
    children = start_two(run)
    # Process 0 alone completes a checkpoint.
    children[victim if phase == "step" else 0].wait_for(phase, 12 if phase == "step" else 1)
    children[victim].kill()
    children[victim].finish()
    survivor, start = children[1 - victim], time.monotonic()
    code, errors = survivor.finish(180)
    seconds = time.monotonic() - start
    ours = [line for line in errors if line.startswith("xlstm-jax: another process of the run")]
    # JAX prints more if the coordinator died, and aborts the process if it is slower to end.
    is_aborted = victim == 0 and code == -signal.SIGABRT
    assert is_aborted or (code == 4 and len(ours) == 1), (code, errors)
    assert errors == ours or victim == 0, errors
    lines = "one line" if errors == ours else "lines of JAX"
    lost = survivor.steps - run.saved
    for child in start_two(run):
        code, errors = child.finish()
        assert code == 0, errors
    assert run.records() == unbroken_pair.records()
    ending = "abort by JAX" if is_aborted else f"exit 4, {lines}"
    where = f"{names[victim]}, {phase}"
    outcome = f"{ending}, after {seconds:.0f} s; resumed, equal"
    tries.append(Try("one of two processes killed", where, outcome, lost))
    assert seconds < 120


@pytest.mark.slow
def test_two_processes_rewind_to_the_same_step(make_run, tries):
    runs = make_run(spike_rewinds=1), make_run(spike_rewinds=1)
    nan_batches = [*range(17, 25)]
    runs[0].to_end(nan_batches=nan_batches)
    for child in start_two(runs[1], nan_batches=nan_batches):
        code, errors = child.finish()
        assert code == 0 and "the run returns to step 14" in errors[0], errors
    one, two = ([r["loss"] for r in run.records() if "loss" in r] for run in runs)
    np.testing.assert_allclose(two, one, rtol=1e-5)
    tries.append(Try("NaN batch", "eight in a row, rewind, two processes", "as in one process"))
