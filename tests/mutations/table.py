"""Mutations of the library, each with a test that must fail: `python -m tests.mutations.run`.

Those of `READER` were chosen from the library alone, by a reader who had not written its tests.
"""

from tests.mutations import data, training
from tests.mutations.mutation import Mutation

CELLS = (
    Mutation(
        "xlstm_jax/cells/mlstm.py",
        "    n = f_scaled[..., None] * state.n + i_scaled[..., None] * k\n",
        "    n = f_scaled[..., None] * state.n + k\n",
        "tests/cells/test_cells.py",
    ),
    Mutation(
        "xlstm_jax/cells/mlstm.py",
        "    return jnp.maximum(jnp.abs(d), _floor(m)) + eps\n",
        "    return jnp.maximum(d, _floor(m)) + eps\n",
        "tests/cells/test_cells.py",
    ),
    Mutation(
        "xlstm_jax/cells/mlstm.py",
        "    return q * (q.shape[-1] ** -0.5 * jnp.exp(state.m - m)[..., None]), m\n",
        "    return q * (q.shape[-1] ** -0.5), m\n",
        "tests/cells/test_cells.py",
    ),
    Mutation(
        "xlstm_jax/cells/slstm.py",
        "    log_carry = jnp.where(state.n == 0, -jnp.inf, log_f + state.m)\n",
        "    log_carry = log_f + state.m\n",
        "tests/cells/test_cells.py",
    ),
    Mutation(
        "xlstm_jax/cells/slstm.py",
        "    c = f_scaled * state.c + i_scaled * jnp.tanh(z)\n",
        "    c = f_scaled * state.c + i_scaled * z\n",
        "tests/cells/test_cells.py",
    ),
)

OPS = (
    Mutation(
        "xlstm_jax/ops/gradient.py",
        "    return jnp.where(is_any, a, a)\n",
        "    return a\n",
        "tests/transformations/test_mapping.py -k gradient_of_vmap",
    ),
    Mutation(
        "xlstm_jax/ops/mlstm/segments.py",
        "leaf.reshape(B, count, *leaf.shape[1:])[:, -1], last)\n",
        "leaf.reshape(B, count, *leaf.shape[1:])[:, 0], last)\n",
        "tests/ops/test_segments.py",
    ),
    Mutation(
        "xlstm_jax/ops/mlstm/segments.py",
        "    return T if count < MIN_SEGMENTS else common.round_up(-(-T // count), MULTIPLE)\n",
        "    return common.round_up(-(-T // count), MULTIPLE)\n",
        "tests/ops/test_segments.py",
    ),
    Mutation(
        "xlstm_jax/ops/mlstm/summaries.py",
        "    m = jnp.maximum(log_carry, y.m)\n",
        "    m = y.m\n",
        "tests/ops/test_context.py",
    ),
    Mutation(
        "xlstm_jax/ops/mlstm/chunkwise.py",
        "    scale = x.q.shape[-1] ** -0.5\n",
        "    scale = x.v.shape[-1] ** -0.5\n",
        "tests/ops/test_recurrence.py -k chunkwise",
    ),
    Mutation(
        "xlstm_jax/ops/device_check.py",
        "        return self.error <= LIMITS[self.workload.dtype]\n",
        "        return not self.error > LIMITS[self.workload.dtype]\n",
        "tests/ops/test_verdicts.py",
    ),
)

GATES, GATE_TESTS = (
    "pallas_kernels/mlstm/triton_gates.py",
    "tests/kernels/test_mlstm_triton_gates.py",
)
KERNELS = (
    Mutation(
        GATES,
        "    m = tl.where(is_reset != 0, _max(i, f), i)\n",
        "    m = i\n",
        GATE_TESTS,
    ),
    Mutation(
        GATES,
        "(j + 1 < chunk) & (offsets + 1 < BLOCK)",
        "(j + 1 < chunk)",
        GATE_TESTS,
    ),
    Mutation(
        GATES,
        "    is_closed = (total <= CLOSED) | (is_reset != 0)\n",
        "    is_closed = is_reset != 0\n",
        GATE_TESTS,
    ),
    Mutation(
        GATES,
        "            normalizer = tl.where(tl.abs(q_n) > bound, dnorm, 0.0)\n",
        "            normalizer = dnorm\n",
        GATE_TESTS,
    ),
    Mutation(
        GATES,
        "    return x_2 + tl.where(stop_2 != 0, 0.0, x_1), stop_1 | stop_2\n",
        "    return x_2 + x_1, stop_1 | stop_2\n",
        GATE_TESTS + " -k cotangents",
    ),
    Mutation(
        "pallas_kernels/mlstm/triton_kernels.py",
        "            decay = tl.load(gates + DECAY * T + position)\n",
        "            decay = 1.0\n",
        "tests/kernels/test_quick.py -k triton",
    ),
    Mutation(
        "pallas_kernels/mlstm/triton_kernels.py",
        "    visible = t[:, None] <= s[None, :] if LATER else t[:, None] >= s[None, :]\n",
        "    visible = t[:, None] <= s[None, :] if LATER else t[:, None] > s[None, :]\n",
        "tests/kernels/test_quick.py -k triton",
    ),
    Mutation(
        "pallas_kernels/mlstm/api.py",
        "        dm_last = -scaling if dm is None else dm - scaling\n",
        "        dm_last = jnp.zeros_like(scaling) if dm is None else dm\n",
        "tests/kernels/test_quick.py",
    ),
    Mutation(
        "pallas_kernels/mlstm/tpu_layout.py",
        "jnp.where((lane >= lanes.start) & (lane < lanes.stop), x, jnp.zeros_like(x))\n",
        "x\n",
        "tests/kernels/test_mlstm_tpu_layout.py",
    ),
    Mutation(
        "pallas_kernels/slstm/triton_calls.py",
        "    return h, jnp.swapaxes(final, 0, 1), *saved[: save + save_gates]\n",
        "    return h, final.reshape(initial.shape), *saved[: save + save_gates]\n",
        "tests/ops/test_recurrence.py -k slstm-triton",
    ),
)

TRAINING = (
    Mutation(
        "xlstm_jax/train/checkpoint/save.py",
        "            delete(*(self._folder / str(step) for step in saved[: -self._keep]))\n",
        "            delete(*(self._folder / str(step) for step in saved[: self._keep]))\n",
        "tests/train/test_checkpoint.py",
    ),
    Mutation(
        "xlstm_jax/train/checkpoint/save.py",
        "            later = [saved for saved in steps(self._folder.parent) if saved > step]\n",
        "            later = [saved for saved in steps(self._folder.parent) if saved >= step]\n",
        "tests/train/test_rewind.py tests/train/test_checkpoint.py",
    ),
    Mutation(
        "xlstm_jax/data/loader.py",
        "(2 * np.arange(count, dtype=np.int64) + 1) * num_windows // (2 * max(count, 1))\n",
        "np.arange(count, dtype=np.int64)\n",
        "tests/data/test_loader.py",
    ),
)

GOLDEN_TIREX = "tests/convert/test_tirex.py -k results_are"

FORECASTS = (
    Mutation(
        "xlstm_jax/convert/tirex.py",
        '    ("fgate", "input_gate", "headwise"),\n    ("igate", "forget_gate", "headwise"),\n',
        '    ("igate", "input_gate", "headwise"),\n    ("fgate", "forget_gate", "headwise"),\n',
        GOLDEN_TIREX,
    ),
    Mutation(
        "xlstm_jax/modules/tirex/network.py",
        "        is_visible = same_group & (roles.is_target[:, None] | ~roles.is_target[None])\n",
        "        is_visible = same_group\n",
        "tests/convert/test_tirex.py -k do_not_see_targets",
    ),
    Mutation(
        "xlstm_jax/modules/tirex/network.py",
        "            backward, _ = cell(jnp.flip(u, axis=1), None)\n",
        "            backward, _ = cell(jnp.flip(u, axis=1), state)\n",
        GOLDEN_TIREX,
    ),
    Mutation(
        "xlstm_jax/modules/tirex/scaling.py",
        "    return diffs if previous is not None else diffs.at[:, 0].set(0)\n",
        "    return diffs\n",
        GOLDEN_TIREX,
    ),
    Mutation(
        "xlstm_jax/modules/tirex/stream.py",
        "        return StreamState(cells, hidden[:, -1:], state.scale, x.trend)\n",
        "        return StreamState(cells, hidden[:, -1:], state.scale, state.trend)\n",
        "tests/convert/test_tirex.py -k any_number_of_patches",
    ),
)

READER: tuple[Mutation, ...] = (*data.SHARDING, *data.DATA, *training.STEPS, *training.MODELS)
MUTATIONS: tuple[Mutation, ...] = (*CELLS, *OPS, *KERNELS, *TRAINING, *FORECASTS, *READER)
