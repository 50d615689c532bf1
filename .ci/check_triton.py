"""Compile Triton twins ahead of time, without a GPU, for sm_80, sm_90, sm_100 and gfx942: `check_triton.py [OP ...]`.

Each op's file in kernels/triton has `compile_cases()`: (kernel, signature, constants) triples, the signature as
Triton's ASTSource takes it, for example {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}; a fourth entry has the
launch's num_stages and num_warps where they are not Triton's own. One architecture takes all cases, the others the last
of each kernel, which keeps the check to some minutes. What needs more shared memory than the GPU has fails too.
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
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a block can have


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
            for kernel, signature, constants, *options in cases if number == 0 else last.values():
                try:
                    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                    compiled = triton.compile(source, target=target, options=FUSE | dict(*options))
                    sizes.setdefault(kernel.__name__, []).append(len(compiled.asm[binary]))
                    if compiled.metadata.shared > 1024 * SHARED[name]:
                        raise RuntimeError(f"{compiled.metadata.shared >> 10} KiB of shared memory, of {SHARED[name]}")
                except Exception as error:
                    failed = True
                    print(f"{path.stem}.{kernel.__name__} {name}: {error}")
            print(f"{path.stem} {name} at {time.monotonic() - started:.0f} s: bytes {sizes}", flush=True)
    sys.exit(failed)


main()
