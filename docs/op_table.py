"""Writes the op x backend table into README.md: `python docs/op_table.py`; `--check` fails if it is stale."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- op table: python docs/op_table.py -->", "<!-- end of op table -->"


def exists(*parts: str) -> str:
    return "yes" if ROOT.joinpath(*parts).exists() else ""


def summary(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())).splitlines()[0].rstrip(".")


def table() -> str:
    rows = ["| op | what | CPU | CUDA | Triton | reference |", "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "text3d_fast" / "ops").glob("*.py")):
        op = path.stem
        if op == "__init__" or not (ROOT / "text3d_fast" / "reference" / path.name).exists():
            continue
        cells = [exists("csrc", op, f"{op}.cpp"), exists("csrc", op, f"{op}.cu"),
                 exists("kernels", "triton", f"{op}.py"), "yes"]
        rows.append(f"| `{op}` | {summary(path)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    fresh = f"{before}{START}\n\n{table()}\n\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit("README.md: the op table is stale; run python docs/op_table.py" if fresh != text else 0)
    readme.write_text(fresh)


main()
