"""The recurrent policy: the maze, returns, resets of the state, criteria, and a short run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recurrent_policy as rl
from xlstm_jax.config import ConfigError

KEY = jax.random.key(0)


def maze(*, side=rl.LEFT, length=4, position=0, step=0):
    return rl.Maze(*(jnp.asarray(value, jnp.int32) for value in (side, length, position, step)))


def test_a_maze_shows_its_side_before_the_first_step_only():
    assert rl.observe(maze(side=rl.LEFT)).tolist() == [-1, 1, 0]
    assert rl.observe(maze(side=rl.RIGHT)).tolist() == [1, 1, 0]
    assert rl.observe(maze(side=rl.RIGHT, step=1)).tolist() == [0, 1, 0]
    assert rl.observe(maze(position=4, step=4)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "position, action, reward, moves, ends",
    [
        (0, rl.FORWARD, 0.0, 1, False),
        (0, rl.LEFT, -0.1, 0, False),
        (4, rl.FORWARD, -0.1, 0, False),
        (4, rl.LEFT, 1.0, 0, True),
        (4, rl.RIGHT, -1.0, 0, True),
    ],
)
def test_rewards_and_ends_of_a_maze(position, action, reward, moves, ends):
    before = maze(position=position, step=5)
    after, given, done = rl.step(before, jnp.asarray(action), KEY)
    assert given == pytest.approx(reward) and done == ends
    expected = rl.new_maze(KEY) if ends else before._replace(position=position + moves, step=6)
    assert jax.tree.map(int, after) == jax.tree.map(int, expected)


def test_a_maze_ends_after_too_many_steps():
    _, reward, done = rl.step(maze(step=rl.LIMIT - 1), jnp.asarray(rl.FORWARD), KEY)
    assert done and reward == 0
    assert not rl.step(maze(step=rl.LIMIT - 2), jnp.asarray(rl.FORWARD), KEY)[2]


def test_new_mazes_have_both_sides_and_all_lengths():
    mazes = jax.vmap(rl.new_maze)(jax.random.split(KEY, 200))
    assert set(mazes.side.tolist()) == {rl.LEFT, rl.RIGHT}
    assert set(mazes.length.tolist()) == set(range(rl.SHORTEST, rl.LONGEST + 1))


def test_returns_stop_at_the_end_of_a_maze():
    reward, done = jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[False, True, False, False]])
    rollout = rl.Rollout(jnp.zeros((1, 4, 3)), done, done, reward, done)
    totals = rl.returns(rollout, jnp.array([16.0]), 0.5)
    np.testing.assert_allclose(totals, [[2.0, 2.0, 12.0, 16.0]])


def test_gradients_favor_rewarded_actions_and_move_values_to_their_targets():
    policy = rl.Policy("feed-forward")
    agents = rl.new_agents(policy, KEY, 3)
    x = jnp.zeros((3, 1, rl.OBSERVATION_DIM))
    variables = policy.init(jax.random.key(1), x, agents.state, agents.reset[:, None])
    _, rollout = rl.act(policy, variables, agents, KEY, 8, greedy=False)
    target = jnp.full(rollout.reward.shape, 5.0)  # above every value: all actions were good
    grads = jax.grad(rl.loss_fn)(variables, policy, agents.state, rollout, target)

    def log_p_and_values(variables):
        logits, values, _ = policy.apply(variables, rollout.x, agents.state, rollout.reset)
        log_p = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_p, rollout.action[..., None], axis=-1).mean(), values

    log_p, values = log_p_and_values(variables)
    # Only the squared error of the critic reaches it, not the advantage.
    expected = [(values - target).mean()]
    np.testing.assert_allclose(grads["params"]["critic"]["bias"], expected, rtol=1e-5)
    after = jax.tree.map(lambda leaf, gradient: leaf - 0.01 * gradient, variables, grads)
    assert log_p_and_values(after)[0] > log_p


@pytest.mark.parametrize("cell", ["sLSTM", pytest.param("mLSTM", marks=pytest.mark.slow)])
def test_single_steps_equal_the_full_sequence_across_mazes(cell):
    policy, count = rl.Policy(cell), 3
    agents = rl.new_agents(policy, KEY, count)
    x = jnp.zeros((count, 1, rl.OBSERVATION_DIM))
    variables = policy.init(jax.random.key(1), x, agents.state, agents.reset[:, None])

    @jax.jit
    def run(variables, agents):
        after, rollout = rl.act(policy, variables, agents, KEY, 60, greedy=False)
        _, _, state = policy.apply(variables, rollout.x, agents.state, rollout.reset)
        # The last maze of each agent alone, from the initial state.
        number = jnp.cumsum(rollout.reset, axis=1)
        last = number == number[:, -1:]
        xs = jnp.where(last[..., None], rollout.x, 0)
        starts = last & rollout.reset
        _, _, alone = policy.apply(variables, xs, policy.init_state(count), starts)
        return after, rollout, state, alone

    after, rollout, state, alone = run(variables, agents)
    assert rollout.done.sum() > count  # several mazes
    assert rollout.reset[:, 0].all()
    np.testing.assert_array_equal(rollout.reset[:, 1:], rollout.done[:, :-1])
    for other in (state, alone):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.state, other)


def test_recurrent_policies_must_succeed_and_the_other_one_must_not():
    def policies(*rates):
        return dict(zip(rl.POLICIES, ({"last": list(rate)} for rate in rates), strict=True))

    good = policies((1.0, 0.96), (0.97, 1.0), (0.5, 0.45))
    assert list(rl.outcome(good).values()) == [True, True]
    assert list(rl.outcome(policies((1.0, 0.9), (1.0, 1.0), (0.5, 0.7))).values()) == [False, False]


def test_an_unknown_policy_or_size_is_rejected():
    with pytest.raises(ConfigError, match="policy='LSTM' is unknown; use one of: sLSTM, mLSTM"):
        rl.run_policy(rl.config("smoke"), "LSTM")
    with pytest.raises(ConfigError, match="size='paper' is unknown; use one of: smoke, cpu"):
        rl.config("paper")


@pytest.mark.slow
def test_the_smallest_size_writes_a_result(tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(rl.cpu, "prepare", lambda: True)
    assert rl.main(rl.Options(size="smoke", out=tmp_path / "r.json")) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert all(np.shape(policy["success"]) == (2, 2) for policy in result["policies"].values())
    assert 0 < (tmp_path / "r.png").stat().st_size < 300 * 1024
