"""Prints the reference of the command line: `--help` of every command as Markdown tables."""

import contextlib
import importlib
import io
import os
import re

os.environ["COLUMNS"] = "100"  # wider terminals get panels side by side

from xlstm_jax.cli.commands import COMMANDS  # noqa: E402

PANEL = re.compile(r"^╭─* ?(.*?) ─*╮$")


def help_of(name: str, *arguments: str) -> list[str]:
    """The lines of a command's help."""
    text = io.TextIOWrapper(buffer := io.BytesIO(), encoding="utf-8")  # tyro draws boxes in UTF-8
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"xlstm_jax.cli.{name}").run([*arguments, "--help"])
    text.flush()
    return re.sub(r"\x1b\[[0-9;]*m", "", buffer.getvalue().decode()).splitlines()


def markdown(lines: list[str]) -> str:
    """Usage, description, and a table for each panel of options."""
    out, panel = [], None
    for line in lines:
        if title := PANEL.match(line):
            panel = []
            out += ["", f"**{title[1].capitalize()}**", ""]
        elif line.startswith("╰") and panel is not None:
            out += ["| option | meaning |", "|---|---|"]
            out += [f"| `{cell(option)}` | {cell(text, escape=True)} |" for option, text in panel]
            panel = None
        elif panel is not None:
            text = line.strip("│").rstrip().removeprefix(" ")
            if set(text.strip()) == {"─"}:  # what precedes the rule describes the panel
                out += [" ".join(option for option, _ in panel), ""]
                panel = []
            elif text.startswith(" "):
                panel[-1][1] = f"{panel[-1][1]} {text.strip()}".strip()
            else:
                option, _, meaning = text.partition("  ")
                if panel and is_incomplete(*panel[-1]):
                    panel[-1][0] += f" {option}"
                else:
                    panel.append([option, meaning.strip()])
        elif line.startswith("usage:"):
            out += ["```text", line.removeprefix("usage: "), "```", ""]
        else:
            out.append(line)
    return "\n".join(out)


def is_incomplete(option: str, meaning: str) -> bool:
    """Whether the next line continues the names or the choices of an option."""
    unbalanced = any(option.count(a) > option.count(b) for a, b in ("[]", "{}"))
    return not meaning and (option.endswith(",") or unbalanced)


def cell(text: str, *, escape: bool = False) -> str:
    """Text of a table cell."""
    return re.sub(r"([*_<\[|])", r"\\\1", text) if escape else text


def main() -> None:
    print("# Command line\n")
    print("The text of `xlstm-jax COMMAND --help`. Options are given as `--name VALUE`.\n")
    for name, summary in COMMANDS.items():
        lines = help_of(name)
        subcommands = [
            line.split()[2] for line in lines if re.match(rf"  xlstm-jax {name} \S+ --help", line)
        ]
        print(f"## {name}\n\n{summary.split(': ', 1)[1].capitalize()}.\n")
        for subcommand in subcommands:
            print(f"### {name} {subcommand}\n\n{markdown(help_of(name, subcommand))}\n")
        if not subcommands:
            print(f"{markdown(lines)}\n")


if __name__ == "__main__":
    main()
