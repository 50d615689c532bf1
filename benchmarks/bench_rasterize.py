"""Rasterization on a CPU: UV spheres, against DEODR and moderngl (llvmpipe). Checks each result, then times.

    pytest benchmarks/bench_rasterize.py --benchmark-only      each renderer, each case
    python benchmarks/bench_rasterize.py [--threads N]         ratios in one run, -> results/rasterize.csv
    python benchmarks/bench_rasterize.py --memory              peak memory, -> results/rasterize_memory.csv

Peers that are not installed are shown as missing. The second way interleaves the renderers of a case and keeps the
least wall time and the least CPU time of each, so that what else the machine does matters less.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import functools
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from meshes import perspective, uv_sphere

from text3d_fast import native, ops

CASES = [(100_000, 512), (1_000_000, 1024)]
RESULTS = Path(__file__).parent / "results"
torch.set_num_threads(2)


class Rasterized:
    """rast and rast_db, and their gradient to positions."""

    name = "rasterize"

    def __init__(self, triangles: int, size: int):
        self.vertices, self.tri = uv_sphere(triangles)
        self.size, self.pos = (size, size), perspective(self.vertices)[None].requires_grad_()
        self.attr = (self.vertices[None] * 0.5 + 0.5).requires_grad_()
        generator = torch.Generator().manual_seed(0)
        self.cotangents = [torch.randn(1, size, size, 4, generator=generator) for _ in range(2)]
        self.leaves = [self.pos]
        self.prepare()

    def prepare(self):
        pass

    def render(self) -> tuple[torch.Tensor, ...]:
        return ops.rasterize(self.pos, self.tri, self.size)

    def check(self):
        covered = self.forward()[0][0].abs().amax(-1) > 0
        assert (covered == disc(self.size[0])).float().mean() > 0.995
        for gradient in self.both():
            assert gradient.isfinite().all() and gradient.abs().max() > 0

    def forward(self):
        with torch.no_grad():
            return self.render()

    def both(self):
        return torch.autograd.grad(self.render(), self.leaves, self.cotangents)


class Interpolated(Rasterized):
    """A 3-channel image as DEODR renders it: rasterize + interpolate, and its gradient to positions and attributes."""

    name = "rasterize + interpolate"

    def prepare(self):
        self.leaves, self.cotangents = [self.pos, self.attr], self.cotangents[0][..., :3].contiguous()

    def render(self):
        rast, _ = ops.rasterize(self.pos, self.tri, self.size, grad_db=False)
        return ops.interpolate(self.attr, rast, self.tri)[:1]


class Antialiased(Interpolated):
    """The same with antialiased silhouettes; the topology is computed once for the mesh."""

    name = "rasterize + interpolate + antialias"

    def prepare(self):
        super().prepare()
        self.topology = ops.antialias_topology(self.tri)

    def render(self):
        rast, _ = ops.rasterize(self.pos, self.tri, self.size, grad_db=False)
        image = ops.interpolate(self.attr, rast, self.tri)[0]
        return (ops.antialias(image, rast, self.pos, self.tri, self.topology),)


def disc(size: int) -> torch.Tensor:
    """Where a unit sphere at distance 3.2 is seen with a field of view of 40 degrees."""
    centre = (2 * torch.arange(size) + 1) / size - 1
    radius = 1 / (np.tan(np.radians(20)) * np.sqrt(3.2**2 - 1))
    return centre[:, None] ** 2 + centre[None] ** 2 < radius**2


@functools.cache
def silhouette_finder(triangles: int):
    """DEODR's own: positions in pixels -> which edges of each face are on the silhouette."""
    from deodr.triangulated_mesh import TriMeshAdjacencies

    vertices, tri = uv_sphere(triangles)
    return TriMeshAdjacencies(tri.numpy().astype(np.uint32), nb_vertices=len(vertices)).edge_on_silhouette


class Deodr:
    """DEODR's renderer: interpolated vertex colours in double precision, without silhouettes (sigma 0).

    Its gradient demands culling and affine interpolation, so that is how forward + backward is timed; forward alone as
    ours, without culling and perspective-correct.
    """

    name, sigma = "DEODR 0.2.3", 0.0

    def __init__(self, triangles: int, size: int):
        renderer = pytest.importorskip("deodr.differentiable_renderer", reason="missing: pip install deodr")
        vertices, tri = uv_sphere(triangles)
        pos = perspective(vertices).double()
        ndc = pos[:, :2] / pos[:, 3:]
        count, faces = len(vertices), tri.numpy().astype(np.uint32)
        pixels = ((ndc + 1) / 2 * size - 0.5).numpy()
        self.edge_flags = silhouette_finder(triangles)
        flags = self.edge_flags(pixels) if self.sigma else np.zeros((len(faces), 3), bool)
        self.scene = renderer.Scene2DBase(
            faces=faces, faces_uv=faces, ij=np.ascontiguousarray(pixels), depths=pos[:, 3].numpy().copy(),
            textured=np.zeros(len(faces), bool), uv=np.zeros((count, 2)), shade=np.zeros(count),
            colors=np.ascontiguousarray((vertices * 0.5 + 0.5).double().numpy()), shaded=np.zeros(len(faces), bool),
            edgeflags=flags, height=size, width=size, nb_colors=3, texture=np.zeros((0, 0, 3)),
            background_color=np.zeros(3), backface_culling=False, perspective_correct=True,
        )  # fmt: skip
        self.culled = dataclasses.replace(self.scene, backface_culling=True, perspective_correct=False)
        for name in ("uv", "ij", "shade", "colors", "texture"):
            setattr(self.culled, f"{name}_b", np.zeros_like(getattr(self.scene, name)))
        self.renderer, self.image, self.depth = renderer, np.zeros((size, size, 3)), np.zeros((size, size))
        self.grad = np.random.default_rng(0).standard_normal(self.image.shape)

    def check(self):
        for scene in (self.scene, self.culled):
            self.render(scene)
            covered = torch.from_numpy(self.image).sum(-1) > 0
            assert (covered == disc(len(covered))).float().mean() > 0.99

    def render(self, scene):
        self.renderer.renderScene(scene, self.sigma, self.image, self.depth)

    def forward(self):
        self.render(self.scene)

    def both(self):
        self.render(self.culled)
        for name in ("uv", "ij", "shade", "colors", "texture"):
            getattr(self.culled, f"{name}_b").fill(0)
        self.renderer.renderSceneB(self.culled, self.sigma, self.image.copy(), self.depth, self.grad.copy())


class DeodrSilhouettes(Deodr):
    """With its silhouette antialiasing (sigma 1), the silhouette edges known beforehand."""

    name, sigma = "DEODR 0.2.3 with silhouettes", 1.0


class DeodrPipeline(DeodrSilhouettes):
    """The same as its Scene3D runs it: silhouette edges are found in every rendering."""

    name = "DEODR 0.2.3, finding silhouettes"

    def render(self, scene):
        scene.edgeflags = self.edge_flags(scene.ij)
        super().render(scene)


class ModernGl:
    """Mesa's llvmpipe through EGL: an id image and a depth buffer, read back; forward only."""

    name = "moderngl (llvmpipe)"

    def __init__(self, triangles: int, size: int):
        moderngl = pytest.importorskip("moderngl", reason="missing: pip install moderngl")
        try:
            context = moderngl.create_standalone_context(backend="egl")
        except Exception as error:
            pytest.skip(f"missing: an EGL context ({error}); apt-get install libegl1 libgl1-mesa-dri")
        vertices, tri = uv_sphere(triangles)
        program = context.program(
            vertex_shader="#version 330\nin vec4 p; void main() { gl_Position = p; }",
            fragment_shader="#version 330\nout int id; void main() { id = gl_PrimitiveID + 1; }",
        )
        self.context, self.size = context, size
        self.color = context.texture((size, size), 1, dtype="i4")
        self.depth = context.depth_texture((size, size))
        self.frame = context.framebuffer([self.color], self.depth)
        self.data = perspective(vertices).numpy().tobytes()
        self.positions = context.buffer(self.data)
        indices = context.buffer(tri.numpy().tobytes())
        self.mesh = context.vertex_array(program, [(self.positions, "4f", "p")], indices)
        self.forward()

    def check(self):
        ids = torch.from_numpy(np.frombuffer(self.ids, np.int32).reshape(self.size, self.size).copy())
        assert ((ids > 0) == disc(self.size)).float().mean() > 0.995

    def forward(self):
        self.positions.write(self.data)
        self.frame.use()
        self.frame.clear()
        self.context.enable(self.context.DEPTH_TEST)
        self.mesh.render()
        self.ids, _ = self.color.read(), self.depth.read()


# each peer beside what of ours does its work
COMPARED = {Rasterized: [ModernGl], Interpolated: [Deodr], Antialiased: [DeodrSilhouettes, DeodrPipeline]}
RENDERERS = [*COMPARED, *(peer for peers in COMPARED.values() for peer in peers)]
PASSES = {"forward": "forward", "both": "forward+backward"}


@pytest.mark.parametrize("triangles,size", CASES)
@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("passes", PASSES)
def test_render(passes, renderer, triangles, size, benchmark):
    if not hasattr(renderer, passes):
        pytest.skip("has no backward pass")
    candidate = renderer(triangles, size)
    candidate.check()
    benchmark(getattr(candidate, passes))


def timed(function) -> tuple[float, float]:
    """Milliseconds of wall time and of CPU time (all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def measure(candidates: list, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Least wall and CPU time of each (renderer, passes): all renderers by turns, each three times in a row."""
    best = {}
    for _ in range(repeats):
        for candidate in candidates:
            for passes in PASSES:
                if not hasattr(candidate, passes):
                    continue
                for _ in range(3):
                    times = timed(getattr(candidate, passes))
                    before = best.get((candidate.name, passes), times)
                    best[candidate.name, passes] = [min(*pair) for pair in zip(before, times)]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4, help="rounds over the renderers of a case")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    options = parser.parse_args()
    if options.memory:
        return memory_table()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("LP_NUM_THREADS", str(options.threads))  # llvmpipe's workers, while the caller waits
    rows = []
    for triangles, size in CASES:
        candidates = []
        for renderer in RENDERERS:
            try:
                candidates.append(renderer(triangles, size))
                candidates[-1].check()
            except pytest.skip.Exception as reason:
                print(f"{renderer.name}: {reason}")
        gc.collect(), gc.disable()
        best = measure(candidates, options.repeats)
        gc.enable()
        for ours, peers in COMPARED.items():
            for renderer in [ours, *peers]:
                for passes, label in PASSES.items():
                    if (renderer.name, passes) not in best:
                        continue
                    wall, cpu = best[renderer.name, passes]
                    ratio = wall / best[ours.name, passes][0]
                    rows.append([f"CPU {native.cpu_isa()}", options.threads, f"{triangles} @{size}^2", renderer.name,
                                 label, f"{wall:.2f}", f"{cpu:.2f}", f"{ratio:.2f}"])  # fmt: skip
                    print("  ".join(f"{cell:>{width}}" for cell, width in zip(rows[-1], (10, 1, 15, 36, 16, 8, 8, 6))))
    header = ["machine", "threads", "case", "renderer", "passes", "wall ms", "CPU ms", "wall / ours"]
    write(RESULTS / "rasterize.csv", header, rows)


def peak(triangles: int, size: int, name: str, passes: str) -> None:
    """In a process of its own: print the bytes of inputs and outputs and the peak beyond what was there before.

    Outputs are what the renderer hands out: every op's results and, in the backward pass, the gradients of all of them.
    """
    torch.set_num_threads(2)
    candidate = next(renderer for renderer in COMPARED if renderer.name == name)(triangles, size)
    small = type(candidate)(100, 16)
    small.both()  # what is loaded at first use is not the op's memory
    given = [*candidate.leaves, candidate.tri, getattr(candidate, "topology", None)]
    given += list(candidate.cotangents) if passes == "both" else []
    bytes_of = lambda tensors: sum(t.numel() * t.element_size() for t in tensors if t is not None)
    pixels = size * size * 4
    channels = {Rasterized: [8], Interpolated: [8, 3], Antialiased: [8, 3, 3]}[type(candidate)]
    handed_out = pixels * sum(channels)
    if passes == "both":  # gradients: of pixels but those of the last op, which are given, and of the leaves
        handed_out += pixels * sum({1: [], 2: [4], 3: [4, 3]}[len(channels)]) + bytes_of(candidate.leaves)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed before would hide what the op takes
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    result = getattr(candidate, passes)()
    print(bytes_of(given), handed_out, status("VmHWM") - before, len(result))


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def memory_table() -> None:
    rows = []
    for triangles, size in CASES:
        for renderer in COMPARED:
            for passes, label in PASSES.items():
                code = f"import bench_rasterize as b; b.peak({triangles}, {size}, {renderer.name!r}, {passes!r})"
                run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, text=True,
                                     capture_output=True)  # fmt: skip
                inputs, outputs, grown, _ = map(int, run.stdout.split())
                ratio = (inputs + grown) / (inputs + outputs)
                mib = [f"{count / 2**20:.1f}" for count in (inputs, outputs, grown)]
                rows.append([f"{triangles} @{size}^2", renderer.name, label, *mib, f"{ratio:.2f}"])
                print("  ".join(f"{cell:>{width}}" for cell, width in zip(rows[-1], (15, 36, 16, 8, 8, 8, 6))))
    header = ["case", "renderer", "passes", "inputs MiB", "outputs MiB", "peak growth MiB", "peak / (inputs + outputs)"]
    write(RESULTS / "rasterize_memory.csv", header, rows)


def write(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
