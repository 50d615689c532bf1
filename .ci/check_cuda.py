"""Compile every .cu for sm_80, sm_90 and sm_100 with warnings as errors; print registers; fail on spills."""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
EXACT_OPS = {"rasterize"}  # as in setup.py


def compile_one(job):
    source, arch = job
    exact = ["-fmad=false"] if source.parent.name in EXACT_OPS else []
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-c", "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{CSRC}", "-DTEXT3D_ISA=cuda",
                   "-Xptxas", "-v", "-Werror", "all-warnings", *exact, str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    return source, arch, done.returncode, registers, spills, done.stderr


def main():
    jobs = [(source, arch) for source in sorted(CSRC.glob("*/*.cu")) for arch in (80, 90, 100)]
    failed = False
    with ThreadPoolExecutor(2) as pool:
        for source, arch, code, registers, spills, log in pool.map(compile_one, jobs):
            name = source.relative_to(CSRC)
            most = max(registers, default=0)
            print(f"{name} sm_{arch}: {len(registers)} kernels, at most {most} registers, {spills} bytes spilled")
            if code or spills:
                failed = True
                print(log)
    sys.exit(failed)


main()
