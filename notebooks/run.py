"""Executes and checks the notebooks.

    python notebooks/run.py                  # toy sizes, in minutes; outputs are discarded
    python notebooks/run.py --full           # full sizes; writes outputs, date and seconds
    python notebooks/run.py --full 01 07     # of the notebooks whose names start so

Both fail if a cell raises an error, or if a committed notebook breaks a rule of `problems`.
Needs `nbclient` and `ipykernel`, which `make install` installs.
"""

import argparse
import base64
import datetime
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parent

REPOSITORY = "OWNER/xlstm-jax"
"""Address on GitHub of badges and install cells; after a change: `run.py --badges`."""

INSTALL = f"""import sys

if "google.colab" in sys.modules:
    %pip install --quiet git+https://github.com/{REPOSITORY}"""

SMOKE = "XLSTM_NOTEBOOK_SMOKE"
MAX_SECONDS = 1800
MAX_BYTES = 600 * 1024
MAX_PICTURE_BYTES = 300 * 1024

# Folders that differ between machines: of users, temporary ones, and those of this clone.
PATHS = re.compile(r"(?<![\w.])(/(home|root|tmp|var|work|Users|mnt)/[\w.]+|[A-Z]:\\+Users)")


def badge(name: str) -> str:
    """The first cell of a notebook: a link that opens it on Colab."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    page = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({image})]({page})"


def paths(prefixes: list[str] | None = None) -> list[pathlib.Path]:
    """The notebooks, or those whose names start with one of the prefixes."""
    paths = sorted(FOLDER.glob("*.ipynb"))
    if missing := [x for x in prefixes or () if not any(path.name.startswith(x) for path in paths)]:
        names = ", ".join(path.name[:2] for path in paths)
        raise SystemExit(f"error: no notebook begins with {missing[0]!r}; use some of: {names}.")
    return [path for path in paths if not prefixes or path.name.startswith(tuple(prefixes))]


def read(path: pathlib.Path) -> Any:
    """A notebook as JSON, with the source of each cell as one string."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def write(notebook: Any, path: pathlib.Path) -> None:
    """Writes a notebook in the layout of Jupyter: strings as lists of lines."""
    notebook = json.loads(json.dumps(notebook))
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
        for output in cell.get("outputs", []):
            if isinstance(output.get("text"), str):
                output["text"] = output["text"].splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def clean(notebook: Any) -> None:
    """Removes what differs between machines and says nothing about the result."""
    own = notebook["metadata"].get("xlstm_jax", {})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook["metadata"] |= {"xlstm_jax": own} if own else {}
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    for number, cell in enumerate(notebook["cells"]):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()


def code_hash(notebook: Any) -> str:
    """Of all code cells: outputs of other code are out of date."""
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\n".join(cells).encode()).hexdigest()[:16]


class Seconds(NamedTuple):
    """The time of one execution: on the clock, and of all cores together."""

    wall: float
    cpu: float


def execute(notebook: Any, *, smoke: bool) -> Seconds:
    """Runs all cells in a new process and an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    import nbclient
    import nbformat

    os.environ.pop(SMOKE, None)
    if smoke:
        os.environ[SMOKE] = "1"
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    start, cpu = time.perf_counter(), _cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        node: Any = nbformat.from_dict(notebook)
        client = nbclient.NotebookClient(
            node,
            timeout=MAX_SECONDS,
            kernel_name="python3",
            startup_timeout=300,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    notebook["cells"] = json.loads(json.dumps(node["cells"]))
    return Seconds(time.perf_counter() - start, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of the kernels that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def problems(path: pathlib.Path) -> list[str]:
    """What is wrong with a committed notebook."""
    notebook = read(path)
    cells, problems = notebook["cells"], []
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in _data(output)]
    texts = [json.dumps(output | {"data": _without_pictures(output)}) for output in outputs]
    texts += [cell["source"] for cell in cells] + [json.dumps(notebook["metadata"])]
    own = notebook["metadata"].get("xlstm_jax", {})
    if cells[0]["source"] != badge(path.stem):
        problems.append("the first cell is not the badge of Colab; run `run.py --badges`")
    if code[0]["source"] != INSTALL:
        problems.append("the first code cell is not the install cell; run `run.py --badges`")
    if notebook["metadata"]["kernelspec"]["name"] != "python3":
        problems.append("the kernel is not python3")
    if own.get("code") != code_hash(notebook):
        problems.append("the outputs are not those of a full run of this code; run `run.py --full`")
    if not pictures:
        problems.append("no cell has a picture")
    if path.stat().st_size > MAX_BYTES:
        problems.append(f"the file is larger than {MAX_BYTES // 1024} KiB")
    if any(len(base64.b64decode(picture)) > MAX_PICTURE_BYTES for picture in pictures):
        problems.append(f"a picture is larger than {MAX_PICTURE_BYTES // 1024} KiB")
    if any(output.get("name") == "stderr" for output in outputs):
        problems.append("a cell prints a warning")
    if any(output["output_type"] == "error" for output in outputs):
        problems.append("a cell raises an error")
    problems += [
        f"it has the path {match[0]!r}" for text in texts for match in PATHS.finditer(text)
    ]
    return [f"{path.name}: {problem}." for problem in problems]


def _data(output: Any) -> dict[str, Any]:
    return output.get("data", {})


def _without_pictures(output: Any) -> dict[str, Any]:
    return {kind: data for kind, data in _data(output).items() if not kind.startswith("image/")}


def run(path: pathlib.Path, *, full: bool) -> Seconds:
    """Executes a notebook; a full run rewrites it."""
    notebook = read(path)
    seconds = execute(notebook, smoke=not full)
    if full:
        today = datetime.date.today().isoformat()
        own = {"code": code_hash(notebook), "date": today, "seconds": round(seconds.wall)}
        own["cpu_seconds"] = round(seconds.cpu)
        notebook["metadata"]["xlstm_jax"] = own
        clean(notebook)
        write(notebook, path)
    return seconds


def set_badges(path: pathlib.Path) -> None:
    """Writes the badge and the install cell of `REPOSITORY`; outputs stay valid."""
    notebook = read(path)
    is_current = notebook["metadata"].get("xlstm_jax", {}).get("code") == code_hash(notebook)
    notebook["cells"][0]["source"] = badge(path.stem)
    next(c for c in notebook["cells"] if c["cell_type"] == "code")["source"] = INSTALL
    if is_current:
        notebook["metadata"]["xlstm_jax"]["code"] = code_hash(notebook)
    write(notebook, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Executes and checks the notebooks.")
    parser.add_argument("names", nargs="*", help="beginnings of file names; default: all")
    parser.add_argument("--full", action="store_true", help="full sizes; rewrites the outputs")
    parser.add_argument("--badges", action="store_true", help="only rewrite badges and installs")
    options = parser.parse_args()
    for path in paths(options.names):
        if options.badges:
            set_badges(path)
            continue
        seconds = run(path, full=options.full)
        print(f"{path.name:32s} {seconds.wall:6.1f} s, CPU {seconds.cpu:6.1f} s", flush=True)
    messages = [message for path in paths(options.names) for message in problems(path)]
    print("\n".join(messages), end="\n" * bool(messages))
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
