"""Extracts from the full reference vectors what the tests need.

    python tests/golden/make_small.py REFERENCE_FOLDER

reads `<name>.npz` and `<name>.json` from the folder and writes compressed `<name>.npz` next to this
script, with inputs, parameters and the float64 results of one implementation (the recurrent one if
a file has several). A float32 result is included only without a float64 one. Config and
package versions are stored as JSON under the key `about`. Checkpoint folders are copied unchanged.
"""

import json
import pathlib
import re
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
CELLS = ["slstm_cell_*", "mlstm_cell_*", "v1_components", "init_constants"]
MODELS = ["[ms]lstm_layer*", "[ms]lstm_block", "xlstm_*", "hf_*_io", "[lmr]*_tiny_io"]
FOLDERS = ["hf_tiny", "hf_tiny_sharded", "xlstm_large_plain_checkpoint"]
FOLDERS += ["llama_tiny", "mamba_tiny", "rwkv4_tiny"]

INPUTS = re.compile(r"input/|param/|param_ext/|fused/")
FLOAT64 = re.compile(r"(output|state|grad)64(_h_only)?/|grad64_h_only/")
RESULTS = re.compile(r"(output|state|grad|state_mid|state_prefill_\d+)/")
# Other implementations than the recurrent one, and states that follow from splitting a sequence.
EXCLUDED = re.compile(r"parallel|stablef|chunkwise|split|padded|v1_recurrent|state(64)?/all")


def keys_of_cell(keys: list[str]) -> list[str]:
    """Selects the keys of a file about a cell or components."""
    results = FLOAT64 if any(FLOAT64.match(key) for key in keys) else RESULTS
    if not any(RESULTS.match(key) for key in keys):  # constants and components: only one precision
        return keys
    return [k for k in keys if INPUTS.match(k) or (results.match(k) and not EXCLUDED.search(k))]


def keys_of_model(keys: list[str]) -> list[str]:
    """Selects the keys of a file about a layer, a block or a model."""
    in_float64 = {
        re.sub(r"^(output|state|grad)64/", r"\1/", key) for key in keys if FLOAT64.match(key)
    }
    results = [k for k in keys if FLOAT64.match(k) or (RESULTS.match(k) and k not in in_float64)]
    return [k for k in keys if INPUTS.match(k)] + results


def about(description: dict) -> str:
    """Metadata of a file as JSON."""
    fields = ("config", "notes", "seed", "versions")
    return json.dumps({f: description[f] for f in fields if f in description}, sort_keys=True)


def main(reference: pathlib.Path) -> None:
    """Writes all files and prints their total size."""
    count = 0
    for names, select in ((CELLS, keys_of_cell), (MODELS, keys_of_model)):
        sources = sorted(path for name in names for path in reference.glob(f"{name}.npz"))
        if not sources:
            sys.exit(f"{reference} has none of {', '.join(names)}; pass the reference folder.")
        count += len(sources)
        for source in sources:
            with np.load(source) as arrays:
                chosen = {key: arrays[key] for key in select(arrays.files)}
            description = json.loads(source.with_suffix(".json").read_text())
            np.savez_compressed(HERE / source.name, about=about(description), **chosen)
    for name in FOLDERS:
        (HERE / name).mkdir(exist_ok=True)
        for file in (reference / name).iterdir():
            shutil.copyfile(file, HERE / name / file.name)
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{count} files, {len(FOLDERS)} folders, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
