"""One step of a fine stage: grid -> mesh -> 512 x 512 picture with a colour field, forward and backward, by part.

    pytest benchmarks/bench_mesh_step.py --benchmark-only      the whole step, each case
    python benchmarks/bench_mesh_step.py [--threads N]         every part and peak memory, -> results/mesh_step.csv

Parts are timed on their own, on the same tensors as in the whole step; "whole" is what `nn.DeformableTetGrid.mesh` and
`scene.mesh_renderer.render_meshes` take. The picture is checked against the ball's equation before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from text3d_fast import ops
from text3d_fast.geometry import Mesh, vertex_normals
from text3d_fast.nn import DeformableTetGrid
from text3d_fast.scene import ColorField, laplacian_loss, normal_consistency, sdf_sign_loss
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import headlights
from text3d_fast.scene.mesh_renderer import clip_positions, render_meshes

RESULTS = Path(__file__).parent / "results"
CASES = {"kuhn 128": ("kuhn", 128, 0.53), "a15 128": ("a15", 128, 0.8), "a15 256": ("a15", 256, 0.8)}


class Case:
    """A ball on a grid of 128 or 256 and a colour field of 12 levels, seen by one camera."""

    def __init__(self, name: str, size: int = 512):
        lattice, resolution, radius = CASES[name]
        self.name, self.radius = name, radius
        self.grid = DeformableTetGrid(resolution, lattice)
        with torch.no_grad():
            self.grid.sdf.copy_(radius - self.grid.rest_positions().norm(dim=-1))
        spec = ops.HashGridSpec.with_max_resolution(512, levels=12, log2_table_size=16, base_resolution=8)
        self.color = ColorField(spec)
        self.cameras = Cameras.orbit(0.3, 0.5, 2.6 * radius / 0.53, 0.7, size)
        self.background = torch.full((1, 3), 0.5)

    def render(self):
        vertices, faces = self.grid.mesh()
        mesh = Mesh(vertices, faces, vertex_normals(vertices, faces, "area"))
        return render_meshes([mesh], self.cameras, self.background, headlights(self.cameras), material=self.color)

    def both(self):
        out = self.render()
        self.grid.zero_grad()
        self.color.zero_grad()
        (out.color.square().mean() + out.mask.mean()).backward()

    def check(self) -> None:
        origins, directions = self.cameras.rays()
        gap = self.radius**2 - origins.square().sum(-1) + (origins * directions).sum(-1).square()
        wrong = (self.render().mask > 0.5) != (gap > 0)
        assert wrong.float().mean() < 0.002, "the picture is not that of a ball"

    def parts(self):
        """(name, function of leaves, leaves), each with the values that the step itself has there."""
        with torch.no_grad():
            positions, sdf = self.grid.positions(), self.grid.distances()
            vertices, faces = ops.marching_tets(positions, sdf, self.grid.grid)
            normals = vertex_normals(vertices, faces, "area")
            clip = clip_positions(vertices, self.cameras).contiguous()
            size = (self.cameras.height, self.cameras.width)
            rast, _ = ops.rasterize(clip, faces, size, grad_db=False)
            attributes = torch.cat([vertices, normals], 1)[None]
            seen = ops.interpolate(attributes, rast, faces)[0].view(-1, 6)[rast[..., 3].view(-1) > 0]
            picture = torch.rand(1, *size, 4)
            topology = ops.antialias_topology(faces)
            edges = self.grid.crossing_edges()
        yield "offsets of the grid", lambda d: self.grid.half_side * d.tanh() + positions, [self.grid.deformation]
        yield "marching_tets", lambda p, s: ops.marching_tets(p, s, self.grid.grid)[0], [positions, sdf]
        yield "vertex normals", lambda v: vertex_normals(v, faces, "area"), [vertices]
        yield "clip positions", lambda v: clip_positions(v, self.cameras), [vertices]
        yield "rasterize", lambda p: ops.rasterize(p, faces, size, grad_db=False)[0], [clip]
        yield "interpolate", lambda a, r: ops.interpolate(a, r, faces)[0], [attributes, rast]
        yield "colour field", lambda x, *_: self.color(x), [seen[:, :3].contiguous(), *self.color.parameters()]
        yield "antialias topology", lambda: ops.antialias_topology(faces), []
        yield "antialias", lambda c, p: ops.antialias(c, rast, p, faces, topology), [picture, clip]
        yield "normal consistency", lambda n: normal_consistency(n, faces), [normals]
        yield "Laplacian", lambda v: laplacian_loss(v, faces), [vertices]
        yield "edges the surface crosses", lambda: self.grid.crossing_edges(), []
        yield "sign loss", lambda s: sdf_sign_loss(s, edges), [sdf]


def milliseconds(function, rounds: int) -> torch.Tensor:
    """[2]: the least wall time and the least CPU time of a few. The latter is of all threads, busy machine or not."""
    times = []
    for _ in range(rounds):
        start, spent = time.perf_counter(), time.process_time()
        function()
        times.append([time.perf_counter() - start, time.process_time() - spent])
    return 1000 * torch.tensor(times).amin(0)


def rows_of(name: str, rounds: int) -> list[list]:
    case = Case(name)
    case.check()
    case.both()
    vertices = len(case.grid.mesh()[0])
    rows = []
    for part, function, values in case.parts():
        color = part == "colour field"
        leaves = [v if color and i else v.detach().clone().requires_grad_() for i, v in enumerate(values)]
        out = function(*leaves)
        forward = milliseconds(lambda f=function, x=leaves: f(*x), rounds)
        backward = torch.zeros(2)
        if leaves:
            cotangent = torch.ones_like(out)
            given = (out, leaves, cotangent)
            backward = milliseconds(lambda g=given: torch.autograd.grad(*g, retain_graph=True), rounds)
        rows.append([name, vertices, part, *row_of(forward, backward)])
    forward, both = milliseconds(case.render, rounds), milliseconds(case.both, rounds)
    rows.append([name, vertices, "whole", *row_of(forward, both - forward)])
    return rows


def row_of(forward: torch.Tensor, backward: torch.Tensor) -> list[str]:
    return [f"{value:.1f}" for value in (forward[0], backward[0], *(forward + backward))]


def peak(name: str) -> None:
    """In a process of its own: print the MiB that a step takes beyond its parameters and what was loaded before."""
    warm = Case("a15 128", 64)
    warm.both()
    case = Case(name)
    if case.grid.lattice == "a15":
        _ = case.grid.grid.incidence  # connectivity stays, it is not the step's
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    case.both()
    status = Path("/proc/self/status").read_text()
    high = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print((high - before) / 2**20)


@pytest.mark.parametrize("name", CASES)
def test_mesh_step(benchmark, name):
    case = Case(name)
    case.check()
    benchmark(case.both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.cases:
        rows += rows_of(name, options.rounds)
        code = f"import torch, bench_mesh_step as b; torch.set_num_threads({options.threads}); b.peak({name!r})"
        run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
                             check=True)
        rows.append([name, rows[-1][1], "peak MiB of the whole", "", "", f"{float(run.stdout):.0f}", ""])
    header = ["case", "vertices", "part", "forward ms", "backward ms", "both ms", "both CPU ms"]
    for row in [header, *rows]:
        print("  ".join(f"{value!s:>10}" for value in row[:2]), f"{row[2]:<28}",
              "  ".join(f"{value:>12}" for value in row[3:]))
    with open(RESULTS / "mesh_step.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["threads", *header], *[[options.threads, *row] for row in rows]])


if __name__ == "__main__":
    main()
