"""Compile every Triton twin ahead of time, without a GPU, for sm_80, sm_90 and sm_100.

Each file in kernels/triton has `compile_cases()`: (kernel, signature, constants) triples, the signature as Triton's
ASTSource takes it, for example {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}.
"""

import importlib
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TWINS = Path(__file__).resolve().parent.parent / "kernels" / "triton"


def main():
    failed = False
    for path in sorted(TWINS.glob("*.py")):
        if path.stem == "__init__":
            continue
        for kernel, signature, constants in importlib.import_module(f"text3d_fast._triton.{path.stem}").compile_cases():
            for arch in (80, 90, 100):
                try:
                    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
                    print(f"{path.stem}.{kernel.__name__} sm_{arch}: {len(compiled.asm['cubin'])} bytes")
                except Exception as error:
                    failed = True
                    print(f"{path.stem}.{kernel.__name__} sm_{arch}: {error}")
    sys.exit(failed)


main()
