"""Decoding speed of a large-block model and of `transformers` with the same weights, on a CPU.

Targets, in float32 on two cores: at batch size 1 three times the tokens per second of the peer and
60 % of the memory speed; at batch size 8 four times, or half of the roofline if that is lower.

    python experiments/benchmarks/generate.py --peer-python PEER/bin/python --out RESULT.json

Both decode 64 tokens greedily after prompts of 128 tokens; prefill is not timed, and the tokens
must be equal. Calls alternate, so that other load affects both alike; use an otherwise idle
machine. The roofline of a step is the larger of the time to read the weights at the measured memory
speed and that of its FLOPs at the measured matrix-product rate.
"""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure, peer
from xlstm_jax import convert, cpu
from xlstm_jax.flops import forward_flops
from xlstm_jax.generate import prepare_params, stream
from xlstm_jax.modules import LM, LargeConfig, LMConfig

MODEL = LMConfig(
    vocab_size=8192,
    dim=512,
    pattern="M" * 6,
    large=LargeConfig(num_heads=4),
    final_norm="rms",
    final_norm_eps=1e-6,
)
PROMPT, NEW_TOKENS = 128, 64  # tokens; as many new ones as in peer_generate.py
TARGETS = {1: 3.0, 8: 4.0}  # batch size -> minimum ratio of our tokens per second to the peer's
CONTEXTS = (64, 16_384)
PEER = pathlib.Path(__file__).with_name("peer_generate.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: timed calls of each package, of `NEW_TOKENS` tokens each."""

    repeats: int = 20
    sections: tuple[Literal["peer", "context"], ...] = ("peer", "context")
    peer_python: str | None = None  # interpreter with torch and transformers


class Decoder:
    """Prompts, and the calls that continue them."""

    def __init__(self, variables: Any, prompts: np.ndarray):
        self.variables, self.prompts = prepare_params(LM(MODEL), variables), prompts

    def seconds(self, repeats: int) -> list[float]:
        """Times of decoding `NEW_TOKENS` tokens, prefill not counted."""
        times = []
        for _ in range(repeats):
            pieces = self.pieces()
            times += measure.seconds(lambda p=pieces: next(p), 1)
        return times

    def pieces(self):
        return stream(
            LM(MODEL),
            self.variables,
            self.prompts,
            max_new_tokens=2 * NEW_TOKENS,
            piece=NEW_TOKENS,
        )


def main(args: Arguments) -> int:
    """Measures both batch sizes, and the time per token at two contexts."""
    cpu.prepare()
    variables = LM(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    result = measure.run_info("generate") | {"targets": TARGETS}
    if "peer" in args.sections:
        records = [compare(batch, variables, args) for batch in TARGETS]
        result["batches"] = records
        columns = (
            "batch_size",
            "tokens_per_second",
            "of_roofline",
            "peer_tokens_per_second",
            "ratio",
        )
        lines = [[f"{r[c]:.3g}" if r.get(c) else "" for c in columns] for r in records]
        print(measure.table(columns, lines))
    if "context" in args.sections:
        result["contexts"] = by_context(variables, args.repeats)
        lines = [
            [str(context), f"{1e3 * r['median_seconds']:.3f} ms"]
            for context, r in result["contexts"].items()
        ]
        print(measure.table(["context", "per token"], lines))
    measure.write(args.out, result)
    return 0


def compare(batch_size: int, variables: Any, args: Arguments) -> dict[str, Any]:
    """Our decoding, that of the peer, and the speeds of memory and of a product, interleaved."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, MODEL.vocab_size, (batch_size, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        convert.save_hf(folder, MODEL, variables["params"])
        np.save(pathlib.Path(folder) / "prompts.npy", prompts)
        with peer.start(args.peer_python, folder, script=PEER) as other:
            decoder = Decoder(variables, prompts)
            tokens = next(decoder.pieces()).tokens
            timers = {
                "read": functools.partial(measure.seconds, memory_read()),
                "product": functools.partial(
                    measure.seconds, measure.matrix_product(measure.MATRIX_SIZE)
                ),
                "ours": decoder.seconds,
            }
            if other is not None:
                timers["peer"] = other.seconds
                assert other.description["tokens"] == tokens, "the tokens differ"
            times = measure.interleaved(timers, args.repeats)
    steps = batch_size * NEW_TOKENS
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    weights -= variables["params"]["token_embedding"]["embedding"].nbytes  # one embedding is read
    read_rate = READ_BYTES / float(np.median(times["read"]))
    flops = batch_size * forward_flops(MODEL, 1)
    bound = max(weights / read_rate, flops / measure.product_rate(times["product"]))
    record = {
        "batch_size": batch_size,
        "read_bytes_per_second": read_rate,
        "matrix_product_flops_per_second": measure.product_rate(times["product"]),
        "weight_bytes": weights,
        "roofline_seconds_per_step": bound,
        "ours": measure.summary(times["ours"]),
    }
    record["tokens_per_second"] = steps / record["ours"]["median_seconds"]
    record["of_roofline"] = bound * NEW_TOKENS / record["ours"]["median_seconds"]
    if other is not None:
        record["peer"] = measure.summary(times["peer"]) | other.description
        record["peer_tokens_per_second"] = steps / record["peer"]["median_seconds"]
        record["ratio"] = record["tokens_per_second"] / record["peer_tokens_per_second"]
    return record


READ_BYTES = 256 * 2**20


def memory_read():
    """A compiled sum of a large array, on both cores, to be timed: it reads `READ_BYTES`."""
    x = jnp.ones((2, READ_BYTES // 8), jnp.float32)
    total = jax.jit(lambda x: jnp.max(x.reshape(2, -1, 1024), axis=1)).lower(x).compile()
    jax.block_until_ready(total(x))
    return lambda: total(x)


def by_context(variables: Any, repeats: int) -> dict[int, dict[str, Any]]:
    """Seconds per token after contexts of several lengths, interleaved."""
    rng, decoders = np.random.default_rng(0), {}
    for context in CONTEXTS:
        prompt = rng.integers(0, MODEL.vocab_size, (1, context))
        state = next(stream(LM(MODEL), variables, prompt, max_new_tokens=0)).state
        decoder = Decoder(variables, np.zeros((1, 1), int))
        decoder.pieces = functools.partial(
            stream,
            LM(MODEL),
            decoder.variables,
            [[1]],
            max_new_tokens=2 * NEW_TOKENS,
            piece=NEW_TOKENS,
            state=state,
        )
        decoder.seconds(1)
        decoders[context] = decoder.seconds
    times = measure.interleaved(decoders, repeats)
    return {
        context: measure.summary([t / NEW_TOKENS for t in seconds])
        for context, seconds in times.items()
    }


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
