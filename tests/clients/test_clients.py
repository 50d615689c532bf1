"""Real projects on the drop-ins: run, not copied.

    TEXT3D_CLIENTS=FOLDER python -m pytest -s tests/clients        # -k NAME for some

FOLDER holds checkouts under their repositories' names; what is absent is skipped. Each case runs in a process of its
own under `python -m text3d_fast.compat --device cpu --force`, so that hard-coded "cuda" is the CPU; its last line is
the figure of docs/dropins.md, where the table says what stands in for what. A case: cases/NAME.py CHECKOUT.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("TEXT3D_CLIENTS")
HERE = Path(__file__).resolve().parent

# name: (checkout, arguments of the runner); {checkout} is its folder
CASES = {
    "nerfacc_tests": ("nerfacc", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no",
                                  # their bound on proposals below the first edge differs from their kernel's
                                  "--deselect", "tests/test_pdf.py::test_pdf_loss",
                                  *(f"tests/test_{name}.py" for name in ("grid", "rendering", "pack", "scan", "pdf",
                                                                         "camera"))]),
    "kaolin_tests": ("kaolin", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "--noconftest",
                                "tests/python/kaolin/ops/conversions/test_tetmesh.py",
                                "tests/python/kaolin/ops/conversions/test_flexicubes.py"]),
    "tinycudann_bindings": ("tiny-cuda-nn", ["{checkout}/scripts/test_torch_bindings.py"]),
    "nvdiffrast_triangle": ("nvdiffrast", ["{checkout}/samples/torch/triangle.py"]),
    "nvdiffrast_cube": ("nvdiffrast", ["{checkout}/samples/torch/cube.py", "--resolution", "16", "--max-iter", "200",
                                       "--mp4save-interval", "0"]),
    "nvdiffrast_pose": ("nvdiffrast", ["{checkout}/samples/torch/pose.py", "--max-iter", "120", "--mp4save-interval",
                                       "0"]),
    "nvdiffrast_envphong": ("nvdiffrast", ["{checkout}/samples/torch/envphong.py", "--max-iter", "10",
                                           "--mp4save-interval", "0"]),
} | {
    name: (checkout, [str(HERE / "cases" / f"{name}.py"), "{checkout}"])
    for name, checkout in {
        "nerfacc_examples": "nerfacc",
        "threestudio_renderer": "threestudio",
        "threestudio_rasterizer": "threestudio",
        "nerfstudio_renderers": "nerfstudio",
        "large_steps": "large-steps-pytorch",
        "get3d": "GET3D",
        "nvdiffmodeling": "nvdiffmodeling",
        "nvdiffrec_dmtet": "nvdiffrec",
        "tinycudann_image": "tiny-cuda-nn",
    }.items()
}


@pytest.mark.skipif(FOLDER is None, reason="TEXT3D_CLIENTS names no folder of checkouts")
@pytest.mark.parametrize("name", CASES)
def test_client(name, tmp_path):
    folder, arguments = CASES[name]
    checkout = Path(FOLDER or "").resolve() / folder
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout}")
    root = str(HERE.parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "text3d_fast.compat", "--device", "cpu", "--force"]
    command += [argument.format(checkout=checkout) for argument in arguments]
    where = checkout if "-m" in arguments else tmp_path
    done = subprocess.run(command, capture_output=True, text=True, cwd=where, env=environment, timeout=280)
    print(f"\n{name}: " + (done.stdout.strip().splitlines() or ["no output"])[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
