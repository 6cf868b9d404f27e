"""Continues a text greedily with a model that `xlstm-jax export` wrote; needs JAX and flatbuffers.
The tokenizer is bytes, or a tokenizer.json, for which it needs the package `tokenizers`."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("file")
parser.add_argument("--prompt", required=True, type=lambda text: text or parser.error("no prompt"))
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()
DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "I8": np.int8, "U8": np.uint8}

with open(args.file, "rb") as file:  # safetensors
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    data = file.read()
record, arrays = json.loads(header.pop("__metadata__")["xlstm_jax"]), {}
for name, x in header.items():
    part = data[slice(*x["data_offsets"])]
    arrays[name] = np.frombuffer(part, DTYPES[x["dtype"]]).reshape(x["shape"])
weights = {k.removeprefix("weights/"): jnp.asarray(v) for k, v in arrays.items() if "weights/" in k}
programs = [bytearray(arrays[f"programs/{name}"]) for name in ("prefill", "decode")]
prefill, decode = (jax.jit(export.deserialize(program).call) for program in programs)

if record["tokenizer"] == "byte":
    ids = list(args.prompt.encode())
    text = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")  # noqa: E731
elif "tokenizer/tokenizer.json" in arrays:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(arrays["tokenizer/tokenizer.json"].tobytes().decode())
    ids, text = tokenizer.encode(args.prompt, add_special_tokens=False).ids, tokenizer.decode
else:
    parser.error(f"{args.file} has no tokenizer.json, which this program needs")
state = {name: jnp.zeros(x["shape"], x["dtype"]) for name, x in record["state"].items()}
logits, width, new = jnp.zeros((1, record["vocab_size"])), record["prefill_width"], []
for start in range(0, len(ids), width):
    part = np.array([ids[start : start + width]], np.int32)
    tokens = np.pad(part, ((0, 0), (0, width - part.size)))
    logits, state = prefill(weights, state, logits, tokens, np.arange(width)[None] < part.size)
while len(new) < args.max_new_tokens and int(logits.argmax()) != record["eos_id"]:
    new.append(int(logits.argmax()))
    logits, state = decode(weights, state, jnp.array(new[-1:], jnp.int32))
print(text(ids + new))
