"""Original names find the drop-ins, and only where there is no original; the runner's CPU in place of "cuda"."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from text3d_fast import compat

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(compat.__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)


def runner(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "text3d_fast.compat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)


def test_every_package_and_its_modules_under_the_original_names():
    done = run("""
import sys, text3d_fast.compat as compat
print(compat.install())
print(compat.install("nvdiffrast"))
for name in compat.PACKAGES:
    module = __import__(name)
    assert module is sys.modules[f"text3d_fast.compat.{name}"], name
import nvdiffrast.torch
assert nvdiffrast.torch is sys.modules["text3d_fast.compat.nvdiffrast.torch"]
""")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == str(dict.fromkeys(compat.PACKAGES, "drop-in")) and second == "{'nvdiffrast': 'drop-in'}"
    assert "nvdiffrast: drop-in" in done.stderr


def test_an_original_stays_unless_forced(tmp_path):
    original = tmp_path / "nvdiffrast"
    original.mkdir()
    (original / "__init__.py").write_text("original = True\n")
    code = "import text3d_fast.compat as c; d = c.install('nvdiffrast'{}); import nvdiffrast; print(d, nvdiffrast)"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    kept = run(path + code.format(""))
    assert f"original at {original}" in kept.stdout and "from '" + str(original) in kept.stdout
    forced = run(path + code.format(", force=True"))
    assert "drop-in" in forced.stdout and "compat/nvdiffrast" in forced.stdout
    late = run(path + "import nvdiffrast; " + code.format(", force=True"))
    assert "RuntimeError: nvdiffrast is already imported" in late.stderr


def test_unknown_package():
    with pytest.raises(ValueError, match="nvdiffrast.*got 'numpy'"):
        compat.install("numpy")


SCRIPT = '''
import sys
import torch
import nvdiffrast.torch as dr

assert __name__ == "__main__" and sys.argv[1:] == ["--size", "3"], sys.argv
import beside  # the script's folder is on the path
device = torch.device("cuda:0")
x = torch.rand(3, device="cuda", pin_memory=True)
tensors = [x, x.cuda(), x.to("cuda"), x.to(device), x.to(0), torch.zeros(2, device=0), x.new_zeros(2, device="cuda"),
           torch.cuda.FloatTensor([1.0]), torch.tensor([1], device=device), x.pin_memory(),
           torch.nn.Linear(2, 2).cuda().weight]
generator = torch.Generator("cuda").manual_seed(0)
tensors.append(torch.rand(2, generator=generator, device="cuda"))
with torch.device("cuda"):
    tensors.append(torch.rand(2))
torch.set_default_device("cuda")
tensors.append(torch.rand(2))
torch.set_default_device(None)
torch.save(x, "x.pt")
tensors.append(torch.load("x.pt", map_location="cuda"))
assert all(t.device.type == "cpu" for t in tensors), tensors
assert isinstance(device, torch.device) and isinstance(generator, torch.Generator) and x.device == torch.device("cuda")
begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
begin.record(), end.record(), torch.cuda.synchronize()
assert begin.elapsed_time(end) >= 0
with torch.cuda.stream(torch.cuda.Stream()):
    torch.optim.Adam([x.requires_grad_()])
assert not torch.cuda.is_available() and not x.is_cuda
print("ran on", dr.RasterizeCudaContext(device="cuda").device)
'''


def test_runner_puts_cuda_on_the_cpu(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("")
    done = runner("--device", "cpu", "script.py", "--size", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran on cuda\n"
    assert "nvdiffrast: drop-in" in done.stderr and '"cuda" is on the CPU' in done.stderr


def test_runner_runs_modules_and_names_a_missing_file(tmp_path):
    (tmp_path / "module.py").write_text("import sys, nvdiffrast.torch; print(sys.argv[1:], nvdiffrast.torch.__name__)")
    done = runner("-m", "module", "-x", cwd=tmp_path)
    assert done.stdout == "['-x'] text3d_fast.compat.nvdiffrast.torch\n", done.stderr
    assert "no such file: nothing.py" in runner("nothing.py", cwd=tmp_path).stderr
