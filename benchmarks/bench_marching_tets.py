"""Marching tetrahedra against other isosurface extractors, on the same samples of a signed distance.

    pytest benchmarks/bench_marching_tets.py --benchmark-only      each extractor, each case
    python benchmarks/bench_marching_tets.py [--threads N]         ratios in one run, -> results/marching_tets.csv

Results are checked before they are timed. Marching cubes gives a third of the vertices; kaolin and the plain torch
reference give the same mesh. The second way interleaves the extractors and keeps the least wall time and the least CPU
time of each, so that what else the machine does matters less.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

from text3d_fast import native, ops
from text3d_fast.reference.marching_tets import marching_tets as reference_marching_tets

# vertices along an axis of a Kuhn grid, or the resolution of an A15 grid
CASES = ("ball kuhn 128", "noise kuhn 32", "ball a15 128", "ball kuhn 256")
EXTRACTORS = ("text3d_fast", "text3d_fast forward+backward", "torch reference", "scikit-image", "PyMCubes", "warp",
              "kaolin", "diso")  # fmt: skip
_MODULES = {"scikit-image": "skimage", "PyMCubes": "mcubes", "warp": "warp", "kaolin": "kaolin", "diso": "diso"}


class Missing(Exception):
    """An extractor that cannot run here, and why."""


class Case:
    def __init__(self, name: str, device: torch.device):
        shape, kind, size = name.split()
        self.name, self.kind, self.device, self.size = name, kind, device, int(size)
        grid = ops.TetGrid.kuhn(self.size - 1) if kind == "kuhn" else ops.TetGrid.a15(self.size)
        self.grid = grid.to(device)
        generator = torch.Generator().manual_seed(0)
        sdf = 0.8 - grid.positions.norm(dim=-1)
        if shape == "noise":
            sdf = torch.where((grid.positions.abs() == 1).any(-1), -1.0, torch.randn(sdf.shape, generator=generator))
        self.sdf = sdf.to(device)
        self.smooth = shape == "ball"

    @property
    def volume(self):
        """The samples as an array for extractors on cube lattices."""
        if self.kind != "kuhn":
            raise Missing("takes cube lattices only")
        return self.sdf.view((self.size,) * 3).cpu().numpy()


def extractor(name: str, case: Case) -> Callable[[], tuple]:
    """A function that extracts the case's surface: (vertices, faces). Raises Missing."""
    if name in _MODULES:
        try:
            module = importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise Missing("not installed") from error
    grid, sdf, size = case.grid, case.sdf, case.size
    if name == "text3d_fast":
        return lambda: ops.marching_tets(grid.positions, sdf, grid)
    if name == "text3d_fast forward+backward":
        leaves = [grid.positions.clone().requires_grad_(), sdf.clone().requires_grad_()]

        def both():
            vertices, faces = ops.marching_tets(*leaves, grid)
            torch.autograd.grad(vertices.sum(), leaves)
            return vertices, faces

        return both
    if name == "torch reference":
        if grid.num_vertices > 3_000_000:
            raise Missing("does not fit into the time of a benchmark")
        tets = grid.tets
        return lambda: reference_marching_tets(grid.positions, sdf, tets)
    if name == "scikit-image":
        from skimage.measure import marching_cubes

        volume = case.volume
        return lambda: marching_cubes(volume, 0.0)[:2]
    if name == "PyMCubes":
        volume = case.volume
        return lambda: module.marching_cubes(volume, 0.0)
    if name == "warp":
        module.init()
        cubes = module.MarchingCubes(size, size, size, 8_000_000, 8_000_000, device=str(case.device))
        volume = module.from_torch(sdf.view(size, size, size)) if case.kind == "kuhn" else case.volume

        def surface():
            cubes.surface(volume, 0.0)
            module.synchronize()
            return cubes.verts.numpy(), cubes.indices.numpy().reshape(-1, 3)

        return surface
    if case.device.type != "cuda":
        raise Missing("runs on CUDA only")
    if name == "kaolin":
        tets = grid.tets.long()

        def kaolin():
            vertices, faces = module.ops.conversions.marching_tetrahedra(grid.positions[None], tets, sdf[None])
            return vertices[0], faces[0]

        return kaolin
    if case.kind != "kuhn":
        raise Missing("takes cube lattices only")
    cubes = module.DiffMC(dtype=torch.float32).cuda()
    lattice = -sdf.view(size, size, size)
    return lambda: cubes(lattice, None)


def check(name: str, case: Case, result: tuple) -> None:
    """Ours, kaolin's and the reference's meshes are the same; the others' lie on the ball too."""
    vertices, faces = (x.cpu() if isinstance(x, torch.Tensor) else torch.from_numpy(x.copy()) for x in result)
    if name in ("text3d_fast", "kaolin") and case.grid.num_vertices < 3_000_000:
        expected, expected_faces = reference_marching_tets(case.grid.positions, case.sdf, case.grid.tets)
        assert torch.equal(faces.int(), expected_faces.cpu())
        torch.testing.assert_close(vertices, expected.cpu(), rtol=0, atol=1e-6)
    if case.smooth:
        assert len(faces) == 2 * len(vertices) - 4  # a closed sphere
    assert len(faces) > 0


def timed(run: Callable[[], tuple], device: torch.device) -> tuple[float, float]:
    """Wall and CPU milliseconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    times = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
    del result
    return times


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


try:
    import pytest

    @pytest.fixture(scope="module", params=CASES)
    def case(request):
        yield Case(request.param, device_here())
        gc.collect()

    @pytest.mark.parametrize("name", EXTRACTORS)
    def test_marching_tets(benchmark, case, name):
        try:
            run = extractor(name, case)
        except Missing as reason:
            pytest.skip(f"{name}: {reason}")
        check(name, case, run())
        benchmark.group = f"isosurface, {case.name}"
        benchmark.pedantic(lambda: timed(run, case.device), rounds=5, warmup_rounds=1)
except ImportError:  # as a script, pytest is not needed
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "marching_tets.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_here()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {native.cpu_isa()}"
    rows = []
    for case_name in CASES:
        case = Case(case_name, device)
        runs, best = {}, {}
        for name in EXTRACTORS:
            try:
                run = extractor(name, case)
                check(name, case, run())
                runs[name], best[name] = run, (float("inf"),) * 2
            except Missing as reason:
                print(f"{case_name:16} {name:30} missing: {reason}")
        for repeat in range(options.repeats):
            for name, run in runs.items():
                if name == "torch reference" and repeat >= 1:
                    continue
                best[name] = tuple(map(min, best[name], timed(run, device)))
        ours = best["text3d_fast"]
        for name, (wall, cpu) in best.items():
            vertices, faces = (len(x) for x in runs[name]())
            print(f"{case_name:16} {name:30} {wall:9.2f} ms wall {cpu:9.2f} ms CPU  {wall / ours[0]:7.1f} x ours wall "
                  f"{cpu / ours[1]:7.1f} x CPU  {vertices} vertices {faces} faces", flush=True)
            rows.append([machine, options.threads, case_name, name, f"{wall:.3f}", f"{cpu:.3f}",
                         f"{wall / ours[0]:.2f}", f"{cpu / ours[1]:.2f}", vertices, faces])
        del case, runs
        gc.collect()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["machine", "threads", "case", "extractor", "wall ms", "CPU ms", "wall / ours", "CPU / ours",
                        "vertices", "faces"])
        table.writerows(rows)


if __name__ == "__main__":
    main()
