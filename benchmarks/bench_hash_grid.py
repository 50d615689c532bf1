"""Hash-grid encoding against plain torch, torch.compile of it, and Dr.Jit's LLVM hash grid.

    pytest benchmarks/bench_hash_grid.py --benchmark-only --benchmark-group-by=group [-k "forward and L16F2"]

Every contender is checked against the reference on a part of the points before it is timed. Forward alone runs without
autograd; forward+backward gives the gradient by the parameters. TEXT3D_BENCH_POINTS sets the number of points.
"""

import os

import pytest
import torch

from text3d_fast import ops, use_backend

POINTS = int(os.environ.get("TEXT3D_BENCH_POINTS", 1 << 17))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = int(os.environ.get("TEXT3D_BENCH_ROUNDS", 7))
GRIDS = {
    "L16F2T19": ops.HashGridSpec.with_max_resolution(2048, levels=16, features=2, log2_table_size=19),
    "L8F4T19": ops.HashGridSpec.with_max_resolution(2048, levels=8, features=4, log2_table_size=19),
}


def make_points(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform":
        return torch.rand(POINTS, 3, generator=generator).to(DEVICE)
    # 128 samples along each ray through the unit cube
    start, end = (torch.rand(POINTS // 128, 1, 3, generator=generator) for _ in range(2))
    return (start + (end - start) * torch.linspace(0, 1, 128)[:, None]).reshape(-1, 3).to(DEVICE)


class Torch:
    """One way to run ops.hash_grid: its backend, or the compiled reference."""

    def __init__(self, spec, x, params, cotangent, backend=None, compiled=False, dtype=None):
        self.x, self.cotangent, self.backend = x, cotangent, backend
        self.leaf = params.clone().requires_grad_()

        def run(x, params):
            return ops.hash_grid(x, params, spec, compute_dtype=dtype)

        self.run = torch.compile(run, dynamic=False) if compiled else run

    def forward(self):
        with use_backend(self.backend), torch.no_grad():
            y = self.run(self.x, self.leaf)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return y

    def both(self):
        with use_backend(self.backend):
            (grad,) = torch.autograd.grad(self.run(self.x, self.leaf), self.leaf, self.cotangent)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return grad


class DrJit:
    """Its levels are a few entries shorter (rounded up to the features, not to 8): parameters are copied by level."""

    def __init__(self, spec, x, params, cotangent):
        drjit = pytest.importorskip("drjit", reason="Dr.Jit is not installed")
        from drjit.hashgrid import HashGridEncoding

        variant = pytest.importorskip("drjit.cuda.ad" if DEVICE.type == "cuda" else "drjit.llvm.ad",
                                      reason="Dr.Jit has no backend here (on a CPU it needs libLLVM)")
        drjit.set_thread_count(torch.get_num_threads())
        self.drjit, self.spec, self.variant = drjit, spec, variant
        self.grid = HashGridEncoding(variant.Float, 3, n_levels=spec.levels, n_features_per_level=spec.features,
                                     hashmap_size=1 << spec.log2_table_size, base_resolution=spec.base_resolution,
                                     per_level_scale=spec.per_level_scale)
        self.offsets = [self.grid.level_offset(l) * spec.features for l in range(spec.levels + 1)]
        ours = [o * spec.features for o in spec.level_offsets]
        parts = [params[a : a + e - b] for a, b, e in zip(ours, self.offsets, self.offsets[1:])]
        self.grid.data = variant.Float(torch.cat(parts).cpu().numpy())
        self.x = [variant.Float(c.contiguous().cpu().numpy()) for c in x.unbind(1)]
        self.cotangent = [variant.Float(c.contiguous().cpu().numpy()) for c in cotangent.unbind(1)]
        drjit.eval(self.grid.data, self.x, self.cotangent)
        self.ours = ours

    def _encode(self):
        return self.grid(self.variant.ArrayXf(*self.x))

    def forward(self):
        y = self._encode()
        self.drjit.eval(y)
        self.drjit.sync_thread()
        return _Lazy(lambda: torch.stack([torch.from_numpy(c.numpy()) for c in y], 1))

    def both(self):
        drjit = self.drjit
        drjit.enable_grad(self.grid.data)
        drjit.set_grad(self.grid.data, 0)
        drjit.backward(drjit.sum(self._encode() * self.variant.ArrayXf(*self.cotangent), axis=0))
        grad = drjit.grad(self.grid.data)
        drjit.eval(grad)
        drjit.sync_thread()

        def result():
            flat, out = torch.from_numpy(grad.numpy()), torch.zeros(self.spec.num_params)
            for a, b, e in zip(self.ours, self.offsets, self.offsets[1:]):
                out[a : a + e - b] = flat[b:e]
            return out

        return _Lazy(result)


class _Lazy:
    """A result that is converted to torch only when it is checked, outside the timing."""

    def __init__(self, convert):
        self.convert = convert


CONTENDERS = {
    "ours": Torch,
    "ours-fp16": lambda *a: Torch(*a, dtype=torch.float16),
    "plain-torch": lambda *a: Torch(*a, backend="reference"),
    "torch-compile": lambda *a: Torch(*a, backend="reference", compiled=True),
    "drjit": DrJit,
}


@pytest.fixture(scope="module")
def expected():
    """Reference results, once per grid and kind of points."""
    cache = {}

    def get(grid, kind):
        if (grid, kind) not in cache:
            cache.clear()
            spec, x = GRIDS[grid], make_points(kind)
            generator = torch.Generator().manual_seed(1)
            params = (torch.rand(spec.num_params, generator=generator) - 0.5).to(DEVICE)
            cotangent = torch.randn(len(x), spec.output_dim, generator=generator).to(DEVICE)
            reference = Torch(spec, x, params, cotangent, backend="reference")
            cache[grid, kind] = spec, x, params, cotangent, reference.forward(), reference.both()
        return cache[grid, kind]

    return get


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("kind", ["uniform", "rays"])
@pytest.mark.parametrize("grid", GRIDS)
def test_hash_grid(benchmark, expected, grid, kind, direction, contender):
    spec, x, params, cotangent, y, grad = expected(grid, kind)
    subject = CONTENDERS[contender](spec, x, params, cotangent)
    run = getattr(subject, direction)
    result = run()
    result = result.convert().to(DEVICE) if isinstance(result, _Lazy) else result
    # x * 2047 + 0.5 in float32 is off by up to 1e-4 of a cell; fp16 rounds parameters of at most 0.5 by 2.4e-4.
    # Dr.Jit rounds scales in another way, which moves positions by up to 2e-3 of a cell.
    error = (result - (y if direction == "forward" else grad)).abs()
    assert float(error.max()) < (5e-3 if direction == "forward" else 2e-2)
    benchmark.group = f"{grid} {kind} {direction}, {POINTS} points, {DEVICE.type}"
    slow = contender in ("plain-torch", "torch-compile")
    benchmark.pedantic(run, rounds=min(ROUNDS, 3) if slow else ROUNDS, warmup_rounds=1)
