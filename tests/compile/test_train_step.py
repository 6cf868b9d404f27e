"""A whole step of training, compiled for a pod."""

from experiments.benchmarks import tpu_train_step


def test_a_step_of_the_1_4b_model_fits_sixteen_chips_and_holds_nothing_whole():
    found = tpu_train_step.report(tpu_train_step.Arguments())
    assert found["kernels"] == ["mlstm_backward", "mlstm_forward"]
    assert found["parameters"] > 1.4e9
    # Weights and both moments, cut over all chips; norms and gate biases alone are held whole.
    assert found["state_bytes_per_chip"] < 1.01 * found["state_bytes"] / found["chips"]
    total = found["argument_bytes_per_chip"] + found["temporary_bytes_per_chip"]
    assert total < 4 << 30
