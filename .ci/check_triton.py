"""Compile Triton twins ahead of time, without a GPU, for sm_80, sm_90, sm_100 and gfx942: `check_triton.py [OP ...]`.

Each op's file in kernels/triton has `compile_cases()`: (kernel, signature, constants) triples, the signature as
Triton's ASTSource takes it, for example {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}. One architecture takes all
cases, the others the last of each kernel, which keeps the check to some minutes.
"""

import importlib
import importlib.util
import sys
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TWINS = Path(__file__).resolve().parent.parent / "kernels" / "triton"
FUSE = {"enable_fp_fusion": True}
TARGETS = {f"sm_{arch}": (GPUTarget("cuda", arch, 32), "cubin") for arch in (90, 80, 100)}
if importlib.util.find_spec("triton.backends.amd"):
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64), "hsaco"


def main():
    failed, started = False, time.monotonic()
    for path in sorted(TWINS.glob("*.py")):
        module = importlib.import_module(f"text3d_fast._triton.{path.stem}")
        if not hasattr(module, "compile_cases") or (sys.argv[1:] and path.stem not in sys.argv[1:]):
            continue
        cases = list(module.compile_cases())
        last = {kernel: case for case in cases for kernel in case[:1]}
        for number, (name, (target, binary)) in enumerate(TARGETS.items()):
            sizes = {}
            for kernel, signature, constants in cases if number == 0 else last.values():
                try:
                    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                    size = len(triton.compile(source, target=target, options=FUSE).asm[binary])
                    sizes.setdefault(kernel.__name__, []).append(size)
                except Exception as error:
                    failed = True
                    print(f"{path.stem}.{kernel.__name__} {name}: {error}")
            print(f"{path.stem} {name} at {time.monotonic() - started:.0f} s: bytes {sizes}", flush=True)
    sys.exit(failed)


main()
