"""Writes docs/ops/OP.md from the docstrings: `python docs/op_pages.py`; `--check` fails if one is stale.

A page without the marker is written by hand and left alone.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- from the docstrings: python docs/op_pages.py -->"
NOTES = {"march_rays": "march_composite", "composite": "march_composite", "marching_tets": "marching_tets"}
NOTES |= dict.fromkeys(("rasterize", "interpolate", "texture", "antialias"), "rasterize")


def signature(function: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{function.name}({ast.unparse(function.args)}){returns}"


def page(path: Path) -> str:
    """Module summary, then each public function or class with its signature and docstring, and where to read on."""
    tree, op = ast.parse(path.read_text()), path.stem
    parts = [f"# `{op}`", MARKER, ast.get_docstring(tree) or ""]
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        about = ast.get_docstring(node) if public else None
        if about is None:
            continue
        title = signature(node) if isinstance(node, ast.FunctionDef) else node.name
        parts += [f"## `ops.{node.name}`", f"```python\n{title}\n```", f"```text\n{about}\n```"]
    served = [name for name, file in (("CPU", f"csrc/{op}/{op}.cpp"), ("CUDA", f"csrc/{op}/{op}.cu"),
                                      ("Triton", f"kernels/triton/{op}.py")) if (ROOT / file).exists()]
    read = f"The formulae: [reference](../../text3d_fast/reference/{op}.py)"
    if (ROOT / "csrc" / op / f"{op}.h").exists():
        read += f"; the maths of the kernels: [csrc/{op}/{op}.h](../../csrc/{op}/{op}.h)"
    notes = NOTES.get(op, op)
    if (ROOT / "benchmarks" / "notes" / f"{notes}.md").exists():
        read += f"; its cost, and what did not help: [notes](../../benchmarks/notes/{notes}.md)"
    parts.append(f"Served by {', '.join([*served, 'the reference'])}. {read}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    stale = []
    for path in sorted((ROOT / "text3d_fast" / "ops").glob("*.py")):
        out = ROOT / "docs" / "ops" / f"{path.stem}.md"
        by_hand = out.exists() and MARKER not in out.read_text()
        if by_hand or not (ROOT / "text3d_fast" / "reference" / path.name).exists() or path.stem == "__init__":
            continue
        fresh = page(path)
        if not out.exists() or out.read_text() != fresh:
            stale.append(path.stem)
            if "--check" not in sys.argv:
                out.write_text(fresh)
    if "--check" in sys.argv and stale:
        sys.exit(f"docs/ops: {', '.join(stale)} are stale; run python docs/op_pages.py")


main()
