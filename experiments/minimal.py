"""An xLSTM language model on one page: data, model, training and sampling, without the trainer.

    python experiments/minimal.py

reads source code of the running Python, trains for about a minute on two CPU cores, prints a loss
that falls from 8 bits per byte to 2.8, and writes a sample. Only the cells and norms come from the
library; a cell takes a state and returns the next one, so the function that trains on sequences
also generates one byte at a time.

Source: Beck et al. 2024, arXiv:2405.04517, section 2; here without convolutions.
"""

import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlstm_jax import ops

VOCAB, D, H, K = 256, 96, 4, 24  # bytes, width, heads, width of a head
CELLS = "mms"  # one letter per block: m is mLSTM, s is sLSTM
B, T = 16, 128  # sequences of a batch, bytes of a sequence


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """The training bytes and, from other files, the validation bytes."""
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    train = b"".join(path.read_bytes() for n, path in enumerate(files) if n % 20)
    valid = b"".join(path.read_bytes() for path in files[::20])
    return np.frombuffer(train, np.uint8), np.frombuffer(valid, np.uint8)


def draw_batch(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """B sequences of T + 1 bytes at random positions: inputs, and targets one later."""
    starts = rng.integers(0, len(text) - T, (B, 1))
    return text[starts + np.arange(T + 1)].astype(np.int32)


def init_block(key: jax.Array, cell: str) -> dict[str, jax.Array]:
    """The parameters of one block; matrices map the first axis to the last."""
    keys = iter(jax.random.split(key, 8))

    def matrix(inputs: int, outputs: int) -> jax.Array:
        return jax.random.normal(next(keys), (inputs, outputs)) * inputs**-0.5

    block = {"up": matrix(D, 4 * D), "down": matrix(4 * D, D), "out": matrix(D, D)}
    forget_bias = jnp.linspace(3.0, 6.0, H)  # gates start open: a time constant for each head
    if cell == "m":
        block |= {"qkvo": matrix(D, 4 * H * K), "gates": matrix(D, 2 * H)}
        return block | {"bias": jnp.stack([jnp.zeros(H), forget_bias])}
    bias = jnp.zeros((H, 4, K)).at[:, 1].set(forget_bias[:, None])
    return block | {"gates": matrix(D, 4 * H * K), "r": jnp.zeros((H, K, 4, K)), "bias": bias}


def init_params(key: jax.Array) -> dict:
    """All parameters: embedding, blocks, head."""
    first, *keys = jax.random.split(key, 1 + len(CELLS))
    embedding = jax.random.normal(first, (VOCAB, D))
    blocks = [init_block(key, cell) for key, cell in zip(keys, CELLS, strict=True)]
    return {"embedding": embedding, "blocks": blocks, "head": jnp.zeros((D, VOCAB))}


def mix(block: dict, cell: str, x: jax.Array, state):
    """The recurrent layer of a block, from x: B T D to the same shape, and its next state."""
    batch, length, _ = x.shape
    if cell == "m":  # a matrix memory, computed in parallel over chunks of time
        q, k, v, o = jnp.split(x @ block["qkvo"], 4, axis=-1)
        q, k, v = (a.reshape(batch, length, H, K) for a in (q, k, v))
        gates = (x @ block["gates"]).reshape(batch, length, 2, H) + block["bias"]
        h, state = ops.mlstm(q, k, v, gates[:, :, 0], gates[:, :, 1], state)
        return ops.multi_head_norm(h) * jax.nn.sigmoid(o) @ block["out"], state
    # Scalar memories whose gates see the last output through the recurrent weights r.
    gates = (x @ block["gates"]).reshape(batch, length, 4, H, K)
    h, state = ops.slstm(gates, block["r"], block["bias"], state)
    return ops.multi_head_norm(h) @ block["out"], state


def apply(params: dict, tokens: jax.Array, states=None):
    """Logits of the next byte at every position, B T vocab, and the state after the last one."""
    x, after = params["embedding"][tokens], []
    states = states or [None] * len(CELLS)
    for block, cell, state in zip(params["blocks"], CELLS, states, strict=True):
        y, state = mix(block, cell, ops.layer_norm(x), state)
        x = x + y
        x = x + jax.nn.gelu(ops.layer_norm(x) @ block["up"]) @ block["down"]
        after.append(state)
    return ops.layer_norm(x) @ params["head"], tuple(after)


@jax.jit
def loss_fn(params: dict, batch: jax.Array) -> jax.Array:
    """Mean cross entropy in bits per byte."""
    logits, _ = apply(params, batch[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return nats.mean() / jnp.log(2)


def make_train_step(steps: int):
    """The optimizer, and the step `(params, its state, batch) -> (params, its state, loss)`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps, 3e-4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx, train_step


@functools.partial(jax.jit, static_argnames="length")
def sample(params: dict, prompt: jax.Array, key: jax.Array, length: int) -> jax.Array:
    """`length` bytes that continue the prompt, 1 T, at temperature 0.8."""
    logits, states = apply(params, prompt)

    def step(carry, key):
        logits, states = carry
        token = jax.random.categorical(key, logits / 0.8)
        logits, states = apply(params, token[:, None], states)
        return (logits[:, -1], states), token[0]

    return jax.lax.scan(step, (logits[:, -1], states), jax.random.split(key, length))[1]


def main(steps: int = 300) -> tuple[list[float], bytes]:
    """Trains and samples; returns validation losses, the first one untrained, and the sample."""
    train, valid = read_text()
    rng, params = np.random.default_rng(0), init_params(jax.random.key(0))
    tx, train_step = make_train_step(steps)
    opt_state, losses = tx.init(params), []
    batches = [draw_batch(valid, rng) for _ in range(8)]
    for number in range(steps + 1):
        if number % max(1, steps // 6) == 0:
            losses.append(float(np.mean([loss_fn(params, batch) for batch in batches])))
            print(f"step {number:4d}: {losses[-1]:.3f} validation bits per byte", flush=True)
        params, opt_state, _ = train_step(params, opt_state, draw_batch(train, rng))
    prompt = np.frombuffer(b"def read(self, ", np.uint8)[None]
    tokens = sample(params, prompt, jax.random.key(1), 400)
    text = prompt.tobytes() + np.asarray(tokens, np.uint8).tobytes()
    print("\n" + text.decode(errors="replace"))
    return losses, text


if __name__ == "__main__":
    main()
