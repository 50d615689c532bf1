"""Builds `text3d_fast._C`: writes a build.ninja for csrc/ and runs it.

No torch headers and no torch import, so build isolation works and one build serves every torch version.
CUDA objects are added when nvcc is found; otherwise the build is complete for CPUs and says so in one line.

Environment:
    TEXT3D_CUDA_ARCHS   CUDA targets, such as "80;90" or "90+PTX" (default: the local GPU, otherwise 80+PTX)
    TEXT3D_CUDA         0: leave CUDA out; 1: fail when nvcc is missing (default: use it when found)
    TEXT3D_EMULATE      1: build `_C_emulated`, the .cu files compiled for the host under csrc/common/emulate.h
    TEXT3D_WERROR       1: warnings are errors
    TEXT3D_SANITIZE     1: AddressSanitizer and UndefinedBehaviorSanitizer
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Visibility keys of the rasterizer must come out bit-identical on every machine: no contraction to fma there.
EXACT_OPS = {"rasterize"}

ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
               "-mprefer-vector-width=512"],
}


def flag(name):
    return os.environ.get(name, "") not in ("", "0")


def isas():
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def find_nvcc():
    """nvcc from PATH, CUDA_HOME, or the PyPI wheels of the extra `cuda-build`."""
    if os.environ.get("TEXT3D_CUDA") == "0":
        return None
    candidates = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    for packages in {sysconfig.get_path("purelib"), *sys.path}:
        candidates += sorted(map(str, Path(packages or ".").glob("nvidia/cu1[3-9]/bin/nvcc")))
    found = next((c for c in candidates if c and os.path.exists(c)), None)
    if found is None and os.environ.get("TEXT3D_CUDA") == "1":
        raise RuntimeError("TEXT3D_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME nor installed from PyPI")
    return found


def cuda_archs():
    archs = os.environ.get("TEXT3D_CUDA_ARCHS")
    if not archs:
        try:
            query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            seen = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
            archs = ";".join(sorted({cap.replace(".", "") for cap in seen}))
        except (OSError, subprocess.CalledProcessError):
            archs = ""
        archs = archs or "80+PTX"
    flags = []
    for arch in archs.replace(",", ";").replace(".", "").split(";"):
        number, _, ptx = arch.strip().partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    def build_extension(self, extension):
        import pybind11

        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which an editable install throws away: the next build compiles only what changed, and the
        # emulated one shares the objects.
        folder = ROOT / "build" / ("sanitized" if flag("TEXT3D_SANITIZE") else "objects")
        folder.mkdir(parents=True, exist_ok=True)
        emulate = extension.name.endswith("_emulated")
        nvcc = None if emulate else find_nvcc()

        cxx = os.environ.get("CXX", "c++")
        optimize = "-O1" if flag("TEXT3D_SANITIZE") else "-O3"  # with the sanitizers -O3 compiles 2.5 times as long
        common = ["-std=c++17", optimize, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                  "-Wall", "-Wextra", f"-I{CSRC}"]
        link = ["-shared"]
        if flag("TEXT3D_WERROR"):
            common.append("-Werror")
        if flag("TEXT3D_SANITIZE"):
            common += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
            link.append("-fsanitize=address,undefined")
        if sys.platform == "linux":
            common.append("-fopenmp")
            link.append("-fopenmp")
        else:
            link += ["-undefined", "dynamic_lookup"]
        module = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
                  f"-DTEXT3D_MODULE={extension.name.rpartition('.')[2]}", f"-DTEXT3D_ISA_COUNT={len(isas())}",
                  f"-DTEXT3D_WITH_CUDA={int(bool(nvcc) or emulate)}", f"-DTEXT3D_EMULATED={int(emulate)}"]

        edges, objects = [], []

        def compile_edge(rule, source, stem, flags):
            target = folder / f"{stem}.o"
            edges.append(f"build {target}: {rule} {source}\n  flags = {' '.join(flags)}\n")
            objects.append(str(target))

        compile_edge("cxx", CSRC / "module.cpp", f"module.{extension.name}", common + module)
        # Baseline first: the linker keeps the first copy of any inline function that several of them emit.
        for isa in isas():
            for source in sorted(CSRC.glob("*/*.cpp")):
                exact = ["-ffp-contract=off"] if source.parent.name in EXACT_OPS else []
                flags = [*common, *ISA_FLAGS[isa], *exact, f"-DTEXT3D_ISA={isa}"]
                compile_edge("cxx", source, f"{source.parent.name}.{source.stem}.{isa}", flags)
        for source in sorted(CSRC.glob("*/*.cu")):
            stem = f"{source.parent.name}.{source.stem}.cuda"
            if emulate:
                flags = ["-x c++", "-include common/emulate.h", *common, "-DTEXT3D_ISA=cuda", "-Wno-unknown-pragmas"]
                compile_edge("cxx", source, f"{stem}.emulated", [*flags, "-ffp-contract=off"])
            elif nvcc:
                exact = ["-fmad=false"] if source.parent.name in EXACT_OPS else []
                strict = ["-Werror", "all-warnings"] if flag("TEXT3D_WERROR") else []
                flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CSRC}", "-Xptxas", "-v",
                         "-DTEXT3D_ISA=cuda", *cuda_archs(), *exact, *strict]
                compile_edge("nvcc", source, stem, flags)

        linker = f"{nvcc} -shared -Xcompiler -fopenmp" if nvcc else f"{cxx} {' '.join(link)}"
        recipe = folder / f"{extension.name}.ninja"
        recipe.write_text(
            f"ninja_required_version = 1.5\n"
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule nvcc\n  command = {nvcc} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule link\n  command = {linker} $in -o $out\n\n" + "".join(edges)
            + f"build {output}: link {' '.join(objects)}\n"
        )
        if not nvcc and not emulate:
            print("text3d-fast: nvcc not found, building for CPUs only (docs/install.md says how to add CUDA)")
        subprocess.run([*ninja_command(), "-C", str(folder), "-f", recipe.name], check=True)


def ninja_command():
    try:
        import ninja

        return [os.path.join(ninja.BIN_DIR, "ninja")]
    except ImportError:
        return ["ninja"]


name = "text3d_fast._C_emulated" if flag("TEXT3D_EMULATE") else "text3d_fast._C"
packages = sorted({*find_packages(include=["text3d_fast*"]), "text3d_fast._triton"})  # the last from kernels/triton
setup(packages=packages, ext_modules=[Extension(name, sources=[])], cmdclass={"build_ext": NinjaBuild})
