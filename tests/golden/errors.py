"""Prints the errors of the golden-vector tests as a Markdown table.

    XLSTM_GOLDEN_ERRORS=errors.jsonl python -m pytest tests -k golden
    python tests/golden/errors.py errors.jsonl

Each is the largest over the comparisons of a file, relative to the maximum of an array.
"""

import collections
import json
import pathlib
import sys

COLUMNS = [(p, k) for p in ("float32", "float64") for k in ("values", "gradients")]


def main(path: pathlib.Path) -> None:
    """Prints one line of a Markdown table per file."""
    worst: dict[str, dict[tuple[str, str], float]] = collections.defaultdict(dict)
    for line in path.read_text().splitlines():
        name, precision, kind, error = json.loads(line)
        errors = worst[name]
        errors[precision, kind] = max(error, errors.get((precision, kind), 0.0))
    for name in sorted(worst):
        cells = [
            f"{worst[name][column]:.0e}" if column in worst[name] else "" for column in COLUMNS
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]))
