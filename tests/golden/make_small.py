"""Cuts the reference vectors down to what the tests need.

    python tests/golden/make_small.py REFERENCE_FOLDER

reads `<name>.npz` and `<name>.json` from the folder and writes `<name>.npz` here, compressed. Kept
are inputs, parameters and, of the results, the float64 arrays of one path (the recurrent one where
a file has several). A float32 result is kept only where it has no float64 twin. The configuration
and the versions that made a file travel in it as JSON, under `about`. Checkpoint folders are copied
as they are.
"""

import json
import pathlib
import re
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
CELLS = ["slstm_cell_*", "mlstm_cell_*", "v1_components", "init_constants"]
MODELS = ["[ms]lstm_layer*", "[ms]lstm_block", "xlstm_*", "hf_*_io"]
FOLDERS = ["hf_tiny", "hf_tiny_sharded", "xlstm_large_plain_checkpoint"]

GIVEN = re.compile(r"input/|param/|param_ext/|fused/")
TRUSTED = re.compile(r"(output|state|grad)64(_h_only)?/|grad64_h_only/")
PLAIN = re.compile(r"(output|state|grad|state_mid|state_prefill_\d+)/")
# Of several paths to one result, the recurrent; intermediate states follow from cutting.
DROPPED = re.compile(r"parallel|stablef|chunkwise|split|padded|v1_recurrent|state(64)?/all")


def kept_of_cell(keys: list[str]) -> list[str]:
    """The keys worth keeping of a file about a cell or small parts."""
    results = TRUSTED if any(TRUSTED.match(key) for key in keys) else PLAIN
    if not any(PLAIN.match(key) for key in keys):  # constants and components: nothing has a twin
        return keys
    return [k for k in keys if GIVEN.match(k) or (results.match(k) and not DROPPED.search(k))]


def kept_of_model(keys: list[str]) -> list[str]:
    """The keys worth keeping of a file about a layer, a block or a model."""
    twins = {re.sub(r"^(output|state|grad)64/", r"\1/", key) for key in keys if TRUSTED.match(key)}
    results = [k for k in keys if TRUSTED.match(k) or (PLAIN.match(k) and k not in twins)]
    return [k for k in keys if GIVEN.match(k)] + results


def about(description: dict) -> str:
    """What a test or a reader may ask of a file."""
    fields = ("config", "notes", "seed", "versions")
    return json.dumps({field: description[field] for field in fields}, sort_keys=True)


def main(reference: pathlib.Path) -> None:
    """Write every file, and say how large they are together."""
    count = 0
    for names, kept in ((CELLS, kept_of_cell), (MODELS, kept_of_model)):
        sources = sorted(path for name in names for path in reference.glob(f"{name}.npz"))
        if not sources:
            sys.exit(f"{reference} holds none of {', '.join(names)}; name the reference folder.")
        count += len(sources)
        for source in sources:
            with np.load(source) as arrays:
                chosen = {key: arrays[key] for key in kept(arrays.files)}
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
