"""Does an agent that must remember its first observation need a recurrent policy?

Expected: the share of T-mazes in which the agent chooses the right side is above 0.95 for sLSTM and
mLSTM policies with every seed, and between 0.4 and 0.6 for a feed-forward one, that of chance.

    python experiments/recurrent_policy.py --size cpu        # three policies, JSON and plot

In a T-maze the agent sees at the start which side has the reward, walks down a corridor of random
length and then chooses a side. Many mazes run in parallel under `jax.vmap`, time is `lax.scan`, and
a maze that ends is replaced by a new one: the state of the policy is reset by the `reset` argument
of the layer, for single steps when it acts and for full sequences when it learns, by advantage
actor-critic.

Sources: the maze, Bakker 2002, "Reinforcement learning with long short-term memory"; the algorithm,
Mnih et al. 2016, arXiv:1602.01783, with synchronous environments.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import record
from xlstm_jax import compat, cpu
from xlstm_jax.errors import ConfigError, quote

SHORTEST, LONGEST = 4, 9  # lengths of corridors
LIMIT = 4 * LONGEST  # steps, after which a maze ends without a reward
FORWARD, LEFT, RIGHT = 0, 1, 2
OBSERVATION_DIM = 3  # the side at the start, whether in the corridor, whether at its end
WIDTH = 16
CELLS = {"sLSTM": compat.SLSTM, "mLSTM": compat.MLSTM}
POLICIES = ("sLSTM", "mLSTM", "feed-forward")
CHANCE = 0.5


class Maze(NamedTuple):
    """The state of one maze."""

    side: jax.Array  # LEFT or RIGHT
    length: jax.Array
    position: jax.Array  # 0 to length; at length the agent chooses a side
    step: jax.Array


def new_maze(key: jax.Array) -> Maze:
    """A maze with a random side and length."""
    side, length = jax.random.split(key)
    zero = jnp.zeros((), jnp.int32)
    return Maze(
        jax.random.randint(side, (), LEFT, RIGHT + 1),
        jax.random.randint(length, (), SHORTEST, LONGEST + 1),
        zero,
        zero,
    )


def observe(maze: Maze) -> jax.Array:
    """What the agent sees: the side only before its first step."""
    side = jnp.where(maze.side == LEFT, -1.0, 1.0) * (maze.step == 0)
    at_end = (maze.position == maze.length).astype(jnp.float32)
    return jnp.stack([side, 1 - at_end, at_end])


def step(maze: Maze, action: jax.Array, key: jax.Array) -> tuple[Maze, jax.Array, jax.Array]:
    """The next maze, which is a new one if this one ends; the reward; whether it ends.

    The reward is 1 for the right side and -1 for the other one. Against a wall it is -0.1.
    """
    at_end, is_forward = maze.position == maze.length, action == FORWARD
    choice = jnp.where(action == maze.side, 1.0, -1.0)
    reward = jnp.where(at_end & ~is_forward, choice, jnp.where(at_end ^ is_forward, 0.0, -0.1))
    done = (at_end & ~is_forward) | (maze.step + 1 == LIMIT)
    moved = maze._replace(position=maze.position + (is_forward & ~at_end), step=maze.step + 1)
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), new_maze(key), moved), reward, done


class Policy(nn.Module):
    """Logits of the actions and the value of every position; a state only with a cell."""

    cell: str  # of `POLICIES`

    def setup(self):
        self.embed = nn.Dense(WIDTH)
        is_recurrent = self.cell in CELLS
        self.layer: Any = CELLS[self.cell](WIDTH, WIDTH) if is_recurrent else nn.Dense(WIDTH)
        self.actor, self.critic = nn.Dense(3), nn.Dense(1)

    def __call__(self, x: jax.Array, state: Any, reset: jax.Array) -> tuple[jax.Array, ...]:
        """Of observations B T 3; `reset` is True at the first position of each maze."""
        h = nn.tanh(self.embed(x))
        if self.cell in CELLS:
            h, state = self.layer(h, state, reset=reset)
        else:
            h = nn.tanh(self.layer(h))
        return self.actor(h), self.critic(h).squeeze(-1), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> Any:
        """The initial state, or nothing."""
        is_recurrent = self.cell in CELLS
        return CELLS[self.cell](WIDTH, WIDTH).init_state(batch_size) if is_recurrent else ()


class Agents(NamedTuple):
    """Mazes and the policy's view of them, carried from one rollout to the next."""

    mazes: Maze
    reset: jax.Array  # whether the next observation is the first one of a maze
    state: Any


class Rollout(NamedTuple):
    """What happened in each maze, B T."""

    x: jax.Array
    reset: jax.Array
    action: jax.Array
    reward: jax.Array
    done: jax.Array


def new_agents(policy: Any, key: jax.Array, count: int) -> Agents:
    """Agents at the start of new mazes."""
    mazes = jax.vmap(new_maze)(jax.random.split(key, count))
    return Agents(mazes, jnp.ones(count, bool), policy.init_state(count))


def act(
    policy: Any, variables: Any, agents: Agents, key: jax.Array, length: int, *, greedy: bool
) -> tuple[Agents, Rollout]:
    """`length` steps of every agent."""
    count = agents.reset.shape[0]

    def one_step(agents: Agents, key: jax.Array):
        choose, renew = jax.random.split(key)
        x = jax.vmap(observe)(agents.mazes)
        logits, _, state = policy.apply(variables, x[:, None], agents.state, agents.reset[:, None])
        logits = logits[:, 0]
        action = logits.argmax(-1) if greedy else jax.random.categorical(choose, logits)
        keys = jax.random.split(renew, count)
        mazes, reward, done = jax.vmap(step)(agents.mazes, action, keys)
        return Agents(mazes, done, state), Rollout(x, agents.reset, action, reward, done)

    agents, rollout = jax.lax.scan(one_step, agents, jax.random.split(key, length))
    return agents, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), rollout)


def returns(rollout: Rollout, last_value: jax.Array, discount: float) -> jax.Array:
    """Discounted rewards until the end of the maze, or of the rollout and then `last_value`."""

    def one_step(later: jax.Array, now: tuple[jax.Array, jax.Array]):
        reward, done = now
        total = reward + discount * jnp.where(done, 0.0, later)
        return total, total

    steps = rollout.reward.T, rollout.done.T
    return jax.lax.scan(one_step, last_value, steps, reverse=True)[1].T


def loss_fn(variables: Any, policy: Any, before: Any, rollout: Rollout, target: jax.Array):
    """Policy gradient with the critic as baseline, squared error of the critic, and entropy."""
    logits, value, _ = policy.apply(variables, rollout.x, before, rollout.reset)
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, rollout.action[..., None], axis=-1).squeeze(-1)
    advantage = jax.lax.stop_gradient(target - value)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1).mean()
    return -(chosen * advantage).mean() + 0.5 * ((target - value) ** 2).mean() - 0.02 * entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and numerics of the training of one policy."""

    updates: int
    num_mazes: int = 64
    length: int = 24  # steps of a rollout, through which gradients flow
    lr: float = 5e-3
    discount: float = 0.97
    num_seeds: int = 3
    eval_length: int = 200
    num_points: int = 20  # evaluations during training


SIZES = {
    "smoke": Config(updates=4, num_mazes=4, num_seeds=2, eval_length=40, num_points=2),
    "cpu": Config(updates=400),
}


def config(size: str = "cpu") -> Config:
    """The training at one size, a key of `SIZES`.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def train(policy: Any, cfg: Config, key: jax.Array) -> jax.Array:
    """Trains one policy; returns the success rates of greedy agents during training."""
    init, start, key = jax.random.split(key, 3)
    agents = new_agents(policy, start, cfg.num_mazes)
    x, reset = jnp.zeros((cfg.num_mazes, 1, OBSERVATION_DIM)), jnp.ones((cfg.num_mazes, 1), bool)
    variables = policy.init(init, x, agents.state, reset)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(cfg.lr))

    def update(carry: Any, key: jax.Array):
        variables, opt_state, agents = carry
        before = agents.state
        agents, rollout = act(policy, variables, agents, key, cfg.length, greedy=False)
        x = jax.vmap(observe)(agents.mazes)[:, None]
        _, value, _ = policy.apply(variables, x, agents.state, agents.reset[:, None])
        target = returns(rollout, value[:, 0], cfg.discount)
        grads = jax.grad(loss_fn)(variables, policy, before, rollout, target)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return (optax.apply_updates(variables, updates), opt_state, agents), None

    def evaluate(variables: Any, key: jax.Array) -> jax.Array:
        first, run = jax.random.split(key)
        agents = new_agents(policy, first, cfg.num_mazes)
        _, rollout = act(policy, variables, agents, run, cfg.eval_length, greedy=True)
        return (rollout.reward == 1).sum() / jnp.maximum(rollout.done.sum(), 1)

    def point(carry: Any, key: jax.Array):
        learn, test = jax.random.split(key)
        keys = jax.random.split(learn, cfg.updates // cfg.num_points)
        carry, _ = jax.lax.scan(update, carry, keys)
        return carry, evaluate(carry[0], test)

    carry = variables, tx.init(variables), agents
    return jax.lax.scan(point, carry, jax.random.split(key, cfg.num_points))[1]


def run_policy(cfg: Config, name: str) -> dict[str, Any]:
    """Trains a policy with every seed, all seeds in one program; returns its record."""
    if name not in POLICIES:
        raise ConfigError(f"policy={quote(name)} is unknown; use one of: {', '.join(POLICIES)}.")
    start = time.perf_counter()
    program = jax.jit(jax.vmap(functools.partial(train, Policy(name), cfg)))
    success = program(jax.vmap(jax.random.key)(jnp.arange(cfg.num_seeds)))
    seconds = time.perf_counter() - start
    rates = [[round(float(rate), 4) for rate in seed] for seed in success]
    last = [seed[-1] for seed in rates]
    print(f"{name:12s}  success by seed {last}  ({seconds:.0f} s)", flush=True)
    return {"success": rates, "last": last, "seconds": round(seconds, 1)}


def outcome(policies: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds."""
    recurrent = [rate for name in CELLS for rate in policies[name]["last"]]
    others = policies["feed-forward"]["last"]
    return {
        "recurrent policies succeed in more than 0.95 of the mazes": min(recurrent) > 0.95,
        "a feed-forward policy is at chance": 0.4 < min(others) <= max(others) < 0.6,
    }


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Success rates over environment steps, a line per seed."""
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for n, (name, policy) in enumerate(result["policies"].items()):
        for seed, rates in enumerate(policy["success"]):
            steps = [result["steps"] * (k + 1) / len(rates) for k in range(len(rates))]
            axes.plot(steps, rates, color=f"C{n}", label=name if seed == 0 else None)
    axes.axhline(CHANCE, color="0.5", lw=0.8, ls=":")
    axes.set(xlabel="environment steps", ylabel="success rate", ylim=(-0.02, 1.02))
    axes.set_title("T-maze (dotted: chance)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains all policies and writes one JSON file and one plot."""

    size: Literal["smoke", "cpu"] = "cpu"
    out: pathlib.Path = record.RESULTS / "recurrent_policy.json"  # the plot is next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    cfg = config(options.size)
    result = record.start("recurrent_policy", options.size)
    policies = {name: run_policy(cfg, name) for name in POLICIES}
    result |= {
        "config": dataclasses.asdict(cfg),
        "steps": cfg.updates * cfg.num_mazes * cfg.length,
        "chance": CHANCE,
        "seconds": round(sum(policy["seconds"] for policy in policies.values()), 1),
        "policies": policies,
        "outcome": outcome(policies),
    }
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
