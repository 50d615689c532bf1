"""The host emulation of CUDA blocks (csrc/common/emulate.h) finds what it is there to find."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_emulated_blocks(tmp_path):
    program = tmp_path / "emulation"
    command = ["g++", "-std=c++17", "-x", "c++", "-include", "common/emulate.h", "-DTEXT3D_ISA=cuda", f"-I{ROOT}/csrc"]
    subprocess.run([*command, str(ROOT / "tests/emulation.cu"), "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["sum 8128"] * 3 + ["missing barrier noticed 1", "votes 55555555 ff00", "divergence 1"]
