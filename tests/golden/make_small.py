"""Cuts the reference vectors down to what the tests need.

    python tests/golden/make_small.py REFERENCE_FOLDER

reads `<name>.npz` and `<name>.json` from the folder and writes `<name>.npz` here, compressed. Kept
are inputs, parameters and, of the results, the float64 arrays of one path (the recurrent one where
a file has several). Float32 results are kept only where a file has no float64 ones. The
configuration and the versions that made a file travel in it as JSON, under `about`.
"""

import json
import pathlib
import re
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
NAMES = ["slstm_cell_*", "mlstm_cell_*", "v1_components", "init_constants"]

GIVEN = re.compile(r"input/|param/|param_ext/")
TRUSTED = re.compile(r"(output|state|grad)64(_h_only)?/|grad64_h_only/")
PLAIN = re.compile(r"(output|state|grad)/")
# Of several paths to one result, the recurrent; intermediate states follow from cutting.
DROPPED = re.compile(r"parallel|stablef|chunkwise|split|padded|v1_recurrent|state(64)?/all")


def kept(keys: list[str]) -> list[str]:
    """The keys of a file worth keeping."""
    results = TRUSTED if any(TRUSTED.match(key) for key in keys) else PLAIN
    if not any(PLAIN.match(key) for key in keys):  # constants and components: nothing has a twin
        return keys
    return [k for k in keys if GIVEN.match(k) or (results.match(k) and not DROPPED.search(k))]


def about(description: dict) -> str:
    """What a test or a reader may ask of a file."""
    fields = ("config", "notes", "seed", "versions")
    return json.dumps({field: description[field] for field in fields}, sort_keys=True)


def main(reference: pathlib.Path) -> None:
    """Write every file, and say how large they are together."""
    sources = sorted(path for name in NAMES for path in reference.glob(f"{name}.npz"))
    if not sources:
        sys.exit(f"{reference} holds none of {', '.join(NAMES)}; name the reference folder.")
    for source in sources:
        with np.load(source) as arrays:
            chosen = {key: arrays[key] for key in kept(arrays.files)}
        description = json.loads(source.with_suffix(".json").read_text())
        np.savez_compressed(HERE / source.name, about=about(description), **chosen)
    size = sum((HERE / source.name).stat().st_size for source in sources)
    print(f"{len(sources)} files, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
