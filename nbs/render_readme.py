"""README.md from nbs/index.ipynb. `--check` changes nothing, and fails with a diff if README.md is out of date."""
import argparse
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

NBS = Path(__file__).resolve().parent
INDEX, README = NBS / "index.ipynb", NBS.parent / "README.md"
HEADER = "<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"

DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
DROPPED = re.compile(r"^#\|\s*(hide|default_exp|export|exports|exporti)\b", re.M)
NO_ECHO = re.compile(r"^#\|\s*echo:\s*false\b", re.M | re.I)
# Code first, so that a link inside code is seen as code and left alone.
LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)"
    r"|(?P<before>\]\(\s*<?|\b(?:src|href)=[\"']|^\[[^\]\n]+\]:[ \t]+)(?P<target>[^\s)>\"']+)",
    re.M | re.S,
)


def from_root(text: str) -> str:
    """The same Markdown with links relative to the repository root rather than to nbs/."""

    def fix(match):
        target = match["target"]
        if match["code"] or re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target, re.I):
            return match[0]
        path, mark, rest = re.match(r"([^#?]*)([#?]?)(.*)", target).groups()
        return match["before"] + posixpath.normpath(posixpath.join(NBS.name, path)) + mark + rest

    return LINK.sub(fix, text)


def shown_outputs(cell) -> list:
    """The outputs that are text: no picture, no progress bar or warning on stderr."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or any(kind.startswith("image/") for kind in data):
            continue
        shown.append(output)
        if "text/markdown" in data:
            data["text/markdown"] = from_root(data["text/markdown"])
    return shown


def render(path: Path = INDEX) -> str:
    """The README's text."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata = {"language_info": {"name": "python"}}  # nbdev_clean removes it, and the fences need it
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "raw" or DROPPED.search(cell.source):
            continue
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        else:
            cell.metadata = {"transient": {"remove_source": bool(NO_ECHO.search(cell.source))}}
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            cell.outputs = shown_outputs(cell)
        cells.append(cell)
    nb.cells = [cell for cell in cells if cell.source or cell.get("outputs")]
    # A README is read as text too: Markdown tables and plain text rather than HTML.
    priority = Config({"NbConvertBase": {"display_data_priority": ["text/markdown", "text/plain"]}})
    body, _ = MarkdownExporter(config=priority).from_notebook_node(nb)
    return f"{HEADER}\n\n" + re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", body.strip()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is out of date")
    check = parser.parse_args().check
    new = render()
    old = README.read_text(encoding="utf-8") if README.exists() else ""
    if not check:
        README.write_text(new, encoding="utf-8", newline="\n")
        return 0
    diff = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "nbs/index.ipynb, rendered")
    sys.stdout.writelines(diff)
    if old != new:
        print("README.md is out of date: run `make readme`.")
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
