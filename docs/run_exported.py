"""Generates text with a model that `xlstm-jax export` wrote; needs JAX alone, not this library.

`python run_exported.py FILE --prompt TEXT` continues a text greedily. The tokenizer is bytes, or
that of a tokenizer.json, for which it needs the package `tokenizers`.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


def read(path):
    """The record and the arrays of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    record = json.loads(header.pop("__metadata__")["xlstm_jax"])
    dtypes = {"F32": np.float32, "BF16": jnp.bfloat16, "I8": np.int8, "U8": np.uint8}
    return record, {
        name: np.frombuffer(data[slice(*x["data_offsets"])], dtypes[x["dtype"]]).reshape(x["shape"])
        for name, x in header.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    record, arrays = read(args.file)
    names = [name for name in arrays if name.startswith("weights/")]
    weights = {name.removeprefix("weights/"): jnp.asarray(arrays[name]) for name in names}
    prefill, decode = (
        jax.jit(export.deserialize(bytearray(arrays[f"programs/{name}"])).call)
        for name in ("prefill", "decode")
    )
    if record["tokenizer"] == "byte":
        ids = list(args.prompt.encode())
        text = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")  # noqa: E731
    elif "tokenizer/tokenizer.json" not in arrays:
        parser.error(f"{args.file} has no tokenizer.json, which this program needs")
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(arrays["tokenizer/tokenizer.json"].tobytes().decode())
        ids, text = tokenizer.encode(args.prompt, add_special_tokens=False).ids, tokenizer.decode

    if not ids:
        parser.error("--prompt must not be empty")
    state = {name: jnp.zeros(x["shape"], x["dtype"]) for name, x in record["state"].items()}
    logits, width = jnp.zeros((1, record["vocab_size"])), record["prefill_width"]
    for start in range(0, len(ids), width):
        part = ids[start : start + width]
        tokens = np.array([part + [0] * (width - len(part))], np.int32)
        mask = np.arange(width)[None] < len(part)
        logits, state = prefill(weights, state, logits, tokens, mask)
    generated = []
    while len(generated) < args.max_new_tokens and int(logits[0].argmax()) != record["eos_id"]:
        generated.append(int(logits[0].argmax()))
        logits, state = decode(weights, state, jnp.array(generated[-1:], jnp.int32))
    print(text(ids + generated))


if __name__ == "__main__":
    main()
