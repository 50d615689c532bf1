"""Rasterization on a CPU: UV spheres, against DEODR and moderngl (llvmpipe). Checks each result, then times.

    pytest benchmarks/bench_rasterize.py --benchmark-only          wall time
    python benchmarks/bench_rasterize.py [REPEATS] [THREADS]       table of CPU time and wall time side by side

Peers that are not installed are shown as missing (skipped with the reason). On a machine that others use as well,
compare CPU times with THREADS = 1: waiting threads spin, and wall times measure the others.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from meshes import perspective, uv_sphere

from text3d_fast import ops

CASES = [(100_000, 512), (1_000_000, 1024)]
torch.set_num_threads(2)


class Ours:
    """rast and rast_db, and their gradient to positions."""

    name = "text3d_fast"

    def __init__(self, triangles, size):
        self.vertices, self.tri = uv_sphere(triangles)
        self.size, self.pos = (size, size), perspective(self.vertices)[None].requires_grad_()
        generator = torch.Generator().manual_seed(0)
        self.cotangents = [torch.randn(1, size, size, 4, generator=generator) for _ in range(2)]
        self.outputs = ops.rasterize(self.pos, self.tri, self.size)

    def check(self):
        self.covered = (self.outputs[0][0, ..., 3] > 0).detach()
        expected = disc(self.size[0])
        assert (self.covered == expected).float().mean() > 0.998
        for gradient in torch.autograd.grad(self.outputs, self.pos, self.cotangents, retain_graph=True):
            assert gradient.isfinite().all()

    def forward(self):
        with torch.no_grad():
            return ops.rasterize(self.pos, self.tri, self.size)

    def backward(self):
        return torch.autograd.grad(self.outputs, self.pos, self.cotangents, retain_graph=True)


class Interpolated(Ours):
    """A 3-channel image as DEODR renders it: rasterize + interpolate, and the gradient to positions and attributes."""

    name = "text3d_fast image"

    def __init__(self, triangles, size):
        super().__init__(triangles, size)
        self.attr = (self.vertices[None] * 0.5 + 0.5).requires_grad_()
        self.image = ops.interpolate(self.attr, self.outputs[0], self.tri)[0]
        self.grad_image = self.cotangents[0][..., :3].contiguous()

    def forward(self):
        with torch.no_grad():
            return ops.interpolate(self.attr, ops.rasterize(self.pos, self.tri, self.size)[0], self.tri)[0]

    def backward(self):
        return torch.autograd.grad(self.image, (self.pos, self.attr), self.grad_image, retain_graph=True)


def disc(size: int) -> torch.Tensor:
    """Where a unit sphere at distance 3.2 is seen with a field of view of 40 degrees."""
    centre = (2 * torch.arange(size) + 1) / size - 1
    radius = 1 / (np.tan(np.radians(20)) * np.sqrt(3.2**2 - 1))
    return centre[:, None] ** 2 + centre[None] ** 2 < radius**2


class Deodr:
    """DEODR's renderer: interpolated vertex colours, without (sigma 0) its silhouette antialiasing.

    Forward as ours: no culling, perspective-correct. Its gradient demands culling and affine interpolation, so its
    backward pass has less to do than ours.
    """

    name = "DEODR 0.2.3"

    def __init__(self, triangles, size):
        renderer = pytest.importorskip("deodr.differentiable_renderer", reason="missing: pip install deodr")
        vertices, tri = uv_sphere(triangles)
        pos = perspective(vertices).double()
        ndc = pos[:, :2] / pos[:, 3:]
        count, faces = len(vertices), tri.numpy().astype(np.uint32)
        pixels = ((ndc + 1) / 2 * size - 0.5).numpy()
        self.scene = renderer.Scene2DBase(
            faces=faces, faces_uv=faces, ij=np.ascontiguousarray(pixels), depths=pos[:, 3].numpy().copy(),
            textured=np.zeros(len(faces), bool), uv=np.zeros((count, 2)), shade=np.zeros(count),
            colors=np.ascontiguousarray((vertices * 0.5 + 0.5).double().numpy()), shaded=np.zeros(len(faces), bool),
            edgeflags=np.zeros((len(faces), 3), bool), height=size, width=size, nb_colors=3,
            texture=np.zeros((0, 0, 3)), background_color=np.zeros(3), backface_culling=False, perspective_correct=True,
        )
        self.renderer, self.image, self.depth = renderer, np.zeros((size, size, 3)), np.zeros((size, size))
        self.grad = np.random.default_rng(0).standard_normal(self.image.shape)
        self.forward()

    def check(self):
        covered = torch.from_numpy(self.image).sum(-1) > 0
        assert (covered == disc(len(covered))).float().mean() > 0.995

    def forward(self):
        self.renderer.renderScene(self.scene, 0.0, self.image, self.depth)

    def backward(self):
        scene = dataclasses.replace(self.scene, backface_culling=True, perspective_correct=False)
        for name in ("uv", "ij", "shade", "colors", "texture"):
            setattr(scene, f"{name}_b", np.zeros_like(getattr(scene, name)))
        self.renderer.renderSceneB(scene, 0.0, self.image, self.depth, self.grad.copy())


class ModernGl:
    """Mesa's llvmpipe through EGL: an id image and a depth buffer, read back; forward only."""

    name = "moderngl (llvmpipe)"

    def __init__(self, triangles, size):
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


CANDIDATES = {"ours": Ours, "image": Interpolated, "deodr": Deodr, "moderngl": ModernGl}


@pytest.mark.parametrize("triangles,size", CASES)
@pytest.mark.parametrize("which", CANDIDATES)
def test_forward(which, triangles, size, benchmark):
    candidate = CANDIDATES[which](triangles, size)
    candidate.check()
    benchmark(candidate.forward)


@pytest.mark.parametrize("triangles,size", CASES)
@pytest.mark.parametrize("which", ["ours", "image", "deodr"])
def test_backward(which, triangles, size, benchmark):
    candidate = CANDIDATES[which](triangles, size)
    candidate.check()
    benchmark(candidate.backward)


def measure(function, repeats: int) -> tuple[float, float]:
    """Milliseconds of CPU (all threads) and of wall time, each the minimum."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        best = [min(best[0], time.process_time() - cpu), min(best[1], time.perf_counter() - wall)]
    return best[0] * 1e3, best[1] * 1e3


def table(repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ.setdefault("LP_NUM_THREADS", str(threads - 1))  # llvmpipe: worker threads, 0 draws in the caller
    print(f"{'case':22s} {'candidate':22s} {'forward cpu':>12s} {'wall':>8s} {'backward cpu':>13s} {'wall':>8s}   ms")
    for triangles, size in CASES:
        for candidate_class in CANDIDATES.values():
            case = f"{triangles} @{size}^2"
            try:
                candidate = candidate_class(triangles, size)
            except pytest.skip.Exception as reason:
                print(f"{case:22s} {candidate_class.name:22s} {reason}")
                continue
            candidate.check()
            forward = measure(candidate.forward, repeats)
            line = f"{case:22s} {candidate.name:22s} {forward[0]:12.1f} {forward[1]:8.1f}"
            if hasattr(candidate, "backward"):
                backward = measure(candidate.backward, repeats)
                line += f" {backward[0]:13.1f} {backward[1]:8.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    table(*[int(argument) for argument in [*sys.argv[1:], *("10", "2")[len(sys.argv) - 1 :]]])
