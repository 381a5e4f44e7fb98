"""Draw the output of the quickstart as docs/images/quickstart.svg.

python docs/images/quickstart.py               # run the quickstart (a few minutes) and draw it
python docs/images/quickstart.py --text FILE   # draw output that was written to FILE
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_suffix(".svg")
COMMAND = "promptshard train examples/quickstart.yaml"
WIDTH = 112
#: Lines that are shown: scores at validations, and everything from the first table on.
VALIDATION = re.compile(r"step \d+  ")
TABLE = re.compile(r"\S+ \([\d,]+ validation rows")
#: Lines after the tables that depend on the machine.
LEFT_OUT = re.compile(r"seconds by phase|baselines [\d:]+ \(|\s*then open|\s*http|sending ")
#: Styles of lines, by a pattern of their beginning.
STYLES = {r"\$": "bold green", r"\* (?!baseline|best)": "bold green", r"Prompt \S+ \(": "bold"}


def run_quickstart() -> str:
    """Run the quickstart in a new folder and return what it prints."""
    with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        for name in ("examples", "ds_configs"):
            (Path(folder) / name).symlink_to(ROOT / name)
        program = Path(sys.executable).with_name("promptshard")
        done = subprocess.run(
            [program, *COMMAND.split()[1:]], cwd=folder, capture_output=True, text=True, check=True
        )
    return done.stdout


def shown_lines(output: str) -> Iterator[str]:
    """Yield the lines of the picture: of the validations only the first and the last step."""
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if TABLE.match(line))
    scores = [line for line in lines[:first] if VALIDATION.match(line)]
    steps = [line.split()[1] for line in scores]
    yield f"$ {COMMAND}"
    yield from (line for line, step in zip(scores, steps, strict=True) if step == steps[0])
    if len(set(steps)) > 2:
        yield "..."
    yield from (line for line, step in zip(scores, steps, strict=True) if step == steps[-1])
    yield ""
    yield from (line for line in lines[first:] if not LEFT_OUT.match(line))


def draw(output: str) -> str:
    """Return an SVG with the lines of the output."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for line in shown_lines(output):
        style = next((s for pattern, s in STYLES.items() if re.match(pattern, line)), "")
        console.print(Text(line, style=style))
    svg = console.export_svg(title="promptshard")
    # The picture loads nothing from other servers.
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="output of an earlier run")
    args = parser.parse_args()
    output = args.text.read_text(encoding="utf-8") if args.text else run_quickstart()
    PICTURE.write_text(draw(output), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
