"""Where a CPU kernel gets no memory there is an exception, on one thread or many, and the process lives."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource, sys
import torch
from text3d_fast import ops

torch.set_num_threads(2)
spec = ops.HashGridSpec(levels=8, features=8, log2_table_size=8)
params = torch.rand(spec.num_params, requires_grad=True)

def hash_grid(n):
    x = torch.rand(n, 3, requires_grad=True)
    ops.hash_grid(x, params, spec).sum().backward()

def rasterize(n):  # all triangles are thin and as high as the picture, and each of its bands lists them all
    tri = torch.arange(3 * n, dtype=torch.int32).view(-1, 3)
    pos = torch.tensor([[-1.0, -1, 0, 1], [-0.99, -1, 0, 1], [-1, 1, 0, 1]]).repeat(n, 1)[None]
    ops.rasterize(pos, tri, (1024, 2048))

run, small, large = {"hash_grid": (hash_grid, 20000, 60000), "rasterize": (rasterize, 100, 20000)}[sys.argv[1]]
run(small)  # threads and whatever is allocated once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
failed = done = 0
for more in range(200):
    resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), resource.RLIM_INFINITY))
    try:
        run(large)
        done += 1
    except (MemoryError, RuntimeError) as error:
        assert isinstance(error, MemoryError) or "memory" in str(error), error
        failed += isinstance(error, MemoryError)
    if done == 2:
        break
print("kernels without memory:", failed, "done:", done)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
@pytest.mark.parametrize("op", ["hash_grid", "rasterize"])
def test_no_memory_is_an_exception(op):
    command, root = [sys.executable, "-c", CHILD, op], Path(__file__).parents[2]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    assert int(child.stdout.split(":")[1].split()[0]) > 0, "no kernel ran out of memory: the limits miss it"
