"""How the next token is drawn: pure functions on logits and a key, over the last axis.

The filters take logits to logits, with minus infinity where a token is ruled out, so they compose
by being called one after another. `greedy` and every `Sampler` have the signature `decode` calls
for one row of a batch: (logits, key, seen) -> token.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.config import ConfigError
from xlstm_jax.typing import Array, Bool, Float, Int, PRNGKeyArray


def temperature(logits: Float[Array, "*B vocab"], value: float) -> Float[Array, "*B vocab"]:
    """Sharper below 1, flatter above; the limit 0 is `greedy`."""
    return logits / value


def top_k(logits: Float[Array, "*B vocab"], k: int) -> Float[Array, "*B vocab"]:
    """Keeps the k most likely tokens, and what ties with the last of them."""
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits >= largest[..., -1:], logits, -jnp.inf)


def top_p(logits: Float[Array, "*B vocab"], p: float) -> Float[Array, "*B vocab"]:
    """Keeps the fewest tokens that hold probability p together, and what ties with the last.

    Source: nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # A token is needed while those before it hold less than p; the first one always is.
    needed = jnp.cumsum(probabilities, axis=-1) - probabilities < p
    least = jnp.min(descending, axis=-1, keepdims=True, where=needed, initial=jnp.inf)
    return jnp.where(logits >= least, logits, -jnp.inf)


def min_p(logits: Float[Array, "*B vocab"], p: float) -> Float[Array, "*B vocab"]:
    """Keeps tokens at least p times as likely as the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= largest + math.log(p), logits, -jnp.inf)


def repetition_penalty(
    logits: Float[Array, "*B vocab"], seen: Bool[Array, "*B vocab"], penalty: float
) -> Float[Array, "*B vocab"]:
    """Makes tokens that occurred before less likely, by a factor on their logits.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1, with negative logits multiplied, so
    that a penalty above 1 lowers those too.
    """
    lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lowered, logits)


def greedy(
    logits: Float[Array, "*B vocab"],
    key: PRNGKeyArray | None = None,
    seen: Bool[Array, "*B vocab"] | None = None,
) -> Int[Array, "*B"]:
    """The likeliest token; the key and what was seen do not matter."""
    return jnp.argmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """A random draw after the filters that are set, applied in the order of the fields.

    Two samplers with equal fields are equal, so decoding with either compiles once.
    """

    repetition_penalty: float | None = None  # above 1 discourages tokens of prompt and answer
    never: tuple[int, ...] = ()  # tokens that are ruled out
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
            most = 1 if name in ("top_p", "min_p") else math.inf
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                demand = "above 0" if most == math.inf else f"above 0 and at most {most}"
                raise ConfigError(
                    f"{name} must be {demand}, got {value}; leave it out to draw without it, "
                    "or use `greedy` to draw nothing."
                )

    def __call__(
        self,
        logits: Float[Array, "*B vocab"],
        key: PRNGKeyArray,
        seen: Bool[Array, "*B vocab"],
    ) -> Int[Array, "*B"]:
        """One token, given which ones occurred in the prompt and the answer so far."""
        if self.repetition_penalty is not None:
            logits = repetition_penalty(logits, seen, self.repetition_penalty)
        if self.never:
            logits = logits.at[..., jnp.array(self.never)].set(-jnp.inf)
        logits = temperature(logits, self.temperature)
        filters: Any = (top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p)
        for keep, value in filters:
            if value is not None:
                logits = keep(logits, value)
        return jax.random.categorical(key, logits)
