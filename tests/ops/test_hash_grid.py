"""ops.hash_grid and hash_grid_grad: known values, gradients of first and second order, dialects, errors.

Runs against the CPU kernels, CUDA where there is a GPU, and the CUDA sources on the host under TEXT3D_EMULATE=1.
"""

import itertools

import pytest
import torch

from text3d_fast import backends, native, nn, ops, use_backend
from text3d_fast.ops import HashGridSpec
from text3d_fast.reference import hash_grid as reference

needs_native = pytest.mark.skipif(native.reason_against("cpu") is not None, reason="needs the compiled extension")


def name(spec):
    return f"{spec.dim}d-f{spec.features}-{spec.dialect}-{spec.kind}-{spec.interpolation}"


def small(**fields):
    """A grid with dense and hashed levels, tables of odd and even size, awkward scales."""
    return HashGridSpec(**{"levels": 5, "log2_table_size": 8, "base_resolution": 3, "per_level_scale": 1.7, **fields})


SPECS = [
    *(small(dim=dim, features=features) for dim, features in itertools.product((2, 3), (1, 2, 4, 8))),
    *(small(dim=dim, interpolation="smoothstep", dialect=dialect) for dim in (2, 3) for dialect in ("tcnn", "ngp")),
    small(dialect="ngp", features=4), small(dialect="ngp", align_corners=True), small(dialect="ngp", kind="tiled"),
    small(kind="dense", levels=3), small(kind="tiled", levels=4, features=1), small(kind="tiled", dim=2, features=2),
    *(small(dim=4, levels=4, features=features) for features in (1, 2, 4, 8)),
    small(dim=4, levels=3, interpolation="smoothstep", features=1), small(dim=4, levels=3, kind="tiled", dialect="ngp"),
    *(small(dim=dim, features=features, interpolation="nearest") for dim, features in ((2, 1), (3, 2), (4, 8))),
    small(interpolation="nearest", dialect="ngp", kind="tiled", features=4),
]
TINY = [
    HashGridSpec(dim=3, levels=2, features=2, log2_table_size=4, base_resolution=2, per_level_scale=1.7),
    HashGridSpec(dim=2, levels=2, features=1, log2_table_size=4, base_resolution=3, interpolation="smoothstep"),
    HashGridSpec(dim=2, levels=1, features=2, log2_table_size=4, base_resolution=3, dialect="ngp"),
    HashGridSpec(dim=4, levels=1, features=1, log2_table_size=4, base_resolution=2),
    HashGridSpec(dim=2, levels=2, features=1, log2_table_size=4, base_resolution=3, interpolation="nearest"),
]


def inputs(spec, count, generator, dtype=torch.float32, device="cpu", low=0.0, high=1.0):
    """Points off the faces of all cells, where float32 and float64 could choose different cells."""
    x = torch.rand(max(3 * count, 64), spec.dim, generator=generator, dtype=torch.float64, device=device)
    x = (x * (high - low) + low).float()
    position = x[:, None].double() * torch.tensor(spec.level_scales, device=device)[:, None] + spec.offset
    x = x[((position - position.round()).abs() > 1e-4).all(2).all(1)][:count]
    assert len(x) == count
    return x.to(dtype), torch.randn(spec.num_params, generator=generator, dtype=dtype, device=device)


def derivatives(x, params, spec, cotangents, **options):
    """y, first-order gradients, and the gradients of those along cotangents of both."""
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    grad_y, toward_x, toward_params = (c.clone().requires_grad_() for c in cotangents)
    y = ops.hash_grid(x, params, spec, **options)
    first = torch.autograd.grad(y, (x, params), grad_y, create_graph=True)
    both = torch.autograd.grad(first, (grad_y, x, params), (toward_x, toward_params), retain_graph=True)
    by_x = torch.autograd.grad(first[0], (grad_y, x, params), toward_x, retain_graph=True, materialize_grads=True)
    by_params = torch.autograd.grad(first[1], (grad_y, x), toward_params)
    return y, *first, *both, *by_x, *by_params


def assert_close(got, expected, what, tolerance=2e-4):
    """fp32 sums of order-1 products; derivatives carry the scale, so the tolerance is relative to the largest value."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, f"{what} {i}"
        bound = tolerance * max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0)
        torch.testing.assert_close(a, b.float(), rtol=0, atol=bound, msg=lambda m, i=i: f"{what} {i}: {m}")


def test_a_dense_grid_interpolates_its_vertices(device):
    spec = HashGridSpec(dim=2, levels=1, features=1, base_resolution=4, kind="dense")  # scale 3, 4 x 4 vertices
    params = torch.arange(16.0, device=device)
    x = torch.tensor([[0.5 / 3, 0.5 / 3], [1 / 3, 0.5 / 3], [0.5, 0.5]], device=device)  # x * 3 + 0.5
    expected = torch.tensor([5.0, 5.5, 10.0], device=device)  # vertex (1, 1), halfway to (2, 1), vertex (2, 2)
    torch.testing.assert_close(ops.hash_grid(x, params, spec)[:, 0], expected)


def test_tiny_cuda_nn_s_recorded_values(device):
    """What its CUDA kernels gave, as published in Dr.Jit's tests. Its table was float32, its positions fused."""
    spec = HashGridSpec(log2_table_size=16)
    params = torch.linspace(0, 1000, 1908736, device=device)
    assert spec.num_params == params.numel()
    x = torch.tensor([[0.10837865, 0.90696, 0.40669227], [0.5339087, 0.32577336, 0.78337693],
                      [0.00684452, 0.4792912, 0.46507752], [0.6235827, 0.6818198, 0.30147946]], device=device)
    recorded = {0: (2.0091782, 3.3853433, 2.1349537, 1.5373236), 2: (19.319187, 31.258121, 20.813356, 15.602333),
                5: (82.21078, 91.74728, 82.84027, 78.82066), 7: (153.39879, 154.8094, 152.28017, 118.11051)}
    y = ops.hash_grid(x, params, spec)
    for feature, values in recorded.items():
        torch.testing.assert_close(y[:, feature], torch.tensor(values, device=device), rtol=1e-6, atol=0)


def test_the_nearest_vertex_is_read_alone(device):
    """Its neighbours may hold anything; in tiny-cuda-nn it is the cell's lowest corner."""
    spec = HashGridSpec(dim=2, levels=1, features=1, base_resolution=4, kind="dense", interpolation="nearest")
    params = torch.full((16,), float("nan"), device=device)
    params[1 + 2 * 4] = 3.0
    x = torch.tensor([[0.49, 0.51], [0.17, 0.83]], device=device).requires_grad_()  # x * 3 + 0.5 in [1, 2) x [2, 3)
    y = ops.hash_grid(x, params.requires_grad_(), spec)
    assert y.tolist() == [[3.0], [3.0]]
    grad_x, grad_params = torch.autograd.grad(y.sum(), (x, params))
    assert grad_x.eq(0).all() and grad_params.nonzero().tolist() == [[9]] and float(grad_params[9]) == 2


def test_tiles_wrap_as_in_tiny_cuda_nn(device):
    """The index is x + y res modulo the table, which is no row of tiles where res is no multiple of its size."""
    spec = HashGridSpec(dim=2, levels=2, features=1, base_resolution=3, per_level_scale=1.7, kind="tiled")
    side, table = spec.level_resolutions[1], slice(*spec.level_offsets[1:3])
    assert side == 6 and table.stop - table.start == 9
    vertex = torch.tensor([[4.0, 3.0]], device=device)
    params = torch.zeros(spec.num_params, device=device)
    params[table][(4 + 3 * side) % 9] = 1
    assert float(ops.hash_grid((vertex - 0.5) / spec.level_scales[1], params, spec)[0, 1]) == pytest.approx(1, abs=1e-5)


def test_a_hashed_vertex_is_where_the_paper_puts_it(device):
    spec = HashGridSpec(dim=3, levels=1, features=1, log2_table_size=10, base_resolution=101)  # scale 100
    vertex = (7, 30, 91)
    x = (torch.tensor([vertex], device=device) - 0.5) / 100
    entry = (7 ^ 30 * 2654435761 ^ 91 * 805459861) % 2**32 % 1024
    params = torch.zeros(1024, device=device)
    params[entry] = 1
    assert float(ops.hash_grid(x, params, spec)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("spec", TINY, ids=name)
def test_reference_gradients(spec):
    x, params = inputs(spec, 2, torch.Generator().manual_seed(2), torch.float64)
    x.requires_grad_(), params.requires_grad_()

    def run(x, params):
        return reference.hash_grid(x, params, spec, spec.levels)

    torch.autograd.gradcheck(run, (x, params))
    torch.autograd.gradgradcheck(run, (x, params))


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_all_derivatives_match_the_reference(spec, device, generator, poisoned_empty):
    count = 53
    x, params = inputs(spec, count, generator, device=device, low=-0.2, high=1.2)
    options = {"active_levels": spec.levels - 1}
    cotangents = [torch.randn(shape, generator=generator, device=device)
                  for shape in ((count, spec.output_dim), x.shape, params.shape)]
    got = derivatives(x, params, spec, cotangents, **options)
    with use_backend("reference"):
        expected = derivatives(x.double(), params.double(), spec, [c.double() for c in cotangents], **options)
    assert_close(got, expected, name(spec))


@needs_native
@pytest.mark.parametrize("spec", SPECS[::3], ids=name)
def test_value_and_jacobian_match_the_reference(spec, device, generator, poisoned_empty):
    x, params = inputs(spec, 35, generator, device=device)
    shape = (35, spec.output_dim)
    cotangents = [torch.randn(s, generator=generator, device=device) for s in (shape, (*shape, spec.dim))]

    def run(x, params, cotangents):
        leaves = x.clone().requires_grad_(), params.clone().requires_grad_()
        outputs = ops.hash_grid_grad(*leaves, spec, spec.levels - 1)
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    got = run(x, params, cotangents)
    with use_backend("reference"):
        expected = run(x.double(), params.double(), [c.double() for c in cotangents])
    assert_close(got, expected, name(spec))


@needs_native
@pytest.mark.parametrize("with_x", [False, True], ids=["x fixed", "x free"])
@pytest.mark.parametrize("spec", SPECS[::3], ids=name)
def test_vjp_matches_the_reference(spec, with_x, device, generator, poisoned_empty):
    x, params = inputs(spec, 35, generator, device=device)
    cotangent = torch.randn(35, spec.output_dim, generator=generator, device=device)
    outer = torch.randn(x.shape, generator=generator, device=device)

    def run(x, params, cotangent, outer):
        x, params, cotangent = (v.clone().requires_grad_() for v in (x, params, cotangent))
        given = x if with_x else x.detach()
        slope = ops.hash_grid_vjp(given, params, cotangent, spec, spec.levels - 1)
        leaves = (x, params, cotangent) if with_x else (params, cotangent)
        with torch.no_grad():
            assert torch.equal(ops.hash_grid_vjp(given, params, cotangent, spec, spec.levels - 1), slope)
        return slope, *torch.autograd.grad(slope, leaves, outer)

    got = run(x, params, cotangent, outer)
    with use_backend("reference"):
        expected = run(*(v.double() for v in (x, params, cotangent, outer)))
    assert_close(got, expected, name(spec))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [*SPECS[:8], SPECS[-2]], ids=name)
def test_rounded_tables(spec, dtype, device, generator):
    x, params = inputs(spec, 29, generator, device=device)
    params[3::7] *= 1e-6  # subnormal in float16
    shapes = (29, spec.output_dim), x.shape, params.shape
    cotangents = [torch.randn(s, generator=generator, device=device) for s in shapes]
    got = derivatives(x, params, spec, cotangents, compute_dtype=dtype)
    with use_backend("reference"):
        expected = derivatives(x.double(), params.to(dtype).double(), spec, [c.double() for c in cotangents])
    assert_close(got, expected, name(spec))


@needs_native
def test_the_rounded_table_follows_the_parameters(device, generator):
    spec = small()
    x, params = inputs(spec, 9, generator, device=device)
    before = ops.hash_grid(x, params, spec, compute_dtype=torch.float16)
    with torch.no_grad():
        params.mul_(2)
    torch.testing.assert_close(ops.hash_grid(x, params, spec, compute_dtype=torch.float16), 2 * before)
    with torch.inference_mode():
        fresh = params * 2
        ops.hash_grid(x, fresh, spec, compute_dtype=torch.float16)
        fresh.mul_(2)  # without a version to tell
        torch.testing.assert_close(ops.hash_grid(x, fresh, spec, compute_dtype=torch.float16), 8 * before)


@needs_native
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 257])
def test_odd_sizes_and_strides(count, device, generator, poisoned_empty):
    spec = small()
    wide = torch.rand(count, 6, generator=generator, device=device)
    x = wide[:, ::2].requires_grad_()
    params = torch.randn(spec.num_params, generator=generator, device=device).requires_grad_()
    y = ops.hash_grid(x, params, spec)
    grads = torch.autograd.grad(y.sum(), (x, params))  # a cotangent of stride 0
    with use_backend("reference"):
        expected = ops.hash_grid(x, params, spec)
        expected_grads = torch.autograd.grad(expected.sum(), (x, params), materialize_grads=True)
    assert_close((y, *grads), (expected, *expected_grads), "count", 1e-3)


@needs_native
def test_points_far_outside_are_defined(device):
    spec = small(dim=2)
    params = torch.randn(spec.num_params, device=device)
    x = torch.tensor([[-1e9, 0.5], [1e30, -1e30], [3e38, 0.1], [-7.3, 12.9]], device=device)
    y = ops.hash_grid(x, params, spec)
    with use_backend("reference"):
        assert_close((y,), (ops.hash_grid(x, params, spec),), "far", 1e-3)
    clipped = small(dim=2, dialect="ngp")
    params = torch.randn(clipped.num_params, device=device)
    assert ops.hash_grid(x, params, clipped).eq(0).all()


@needs_native
@pytest.mark.parametrize("features", [1, 2, 8])
def test_points_along_rays(features, device, generator):
    """Neighbours share cells, which CUDA sums within a warp before it adds to the table."""
    spec = small(features=features)
    origins = torch.rand(3, 1, 3, generator=generator, device=device) * 0.5
    x = (origins + torch.linspace(0, 0.4, 47, device=device)[:, None]).reshape(-1, 3)
    params = torch.randn(spec.num_params, generator=generator, device=device).requires_grad_()
    cotangent = torch.randn(len(x), spec.output_dim, generator=generator, device=device)
    got = torch.autograd.grad(ops.hash_grid(x, params, spec), params, cotangent)
    with use_backend("reference"):
        assert_close(got, torch.autograd.grad(ops.hash_grid(x, params, spec), params, cotangent), "rays")


@needs_native
@pytest.mark.skipif(native.emulated(), reason="atomic sums of CUDA")
def test_sums_do_not_depend_on_the_threads(device, generator):
    spec = HashGridSpec(levels=3, log2_table_size=9, base_resolution=8)
    x = torch.rand(70_000, 3, generator=generator, device=device)  # more than one batch of the kernel
    params = torch.randn(spec.num_params, generator=generator, device=device).requires_grad_()
    cotangent = torch.randn(70_000, spec.output_dim, generator=generator, device=device)
    threads, grads = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grads.append(torch.autograd.grad(ops.hash_grid(x, params, spec), params, cotangent)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    with use_backend("reference"):
        expected = torch.autograd.grad(ops.hash_grid(x, params, spec), params, cotangent)
    assert_close(grads[:1], expected, "many points")


@needs_native
def test_deterministic_sums(device, generator, monkeypatch):
    """Fixed point on CUDA: the same gradients, first and second order."""
    spec = small()
    x, params = inputs(spec, 300, generator, device=device)
    cotangents = [torch.randn(s, generator=generator, device=device) * 1e-5 for s in ((300, spec.output_dim), x.shape)]

    def run():
        leaf, table = x.clone().requires_grad_(), params.clone().requires_grad_()
        value, slope = ops.hash_grid_grad(leaf, table, spec)
        first = torch.autograd.grad(ops.hash_grid(leaf, table, spec), (leaf, table), cotangents[0], create_graph=True)
        return (first[1], torch.autograd.grad(first[0], table, cotangents[1], retain_graph=True)[0],
                torch.autograd.grad(value.square().sum() + slope.sum(), table)[0])

    usual = run()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    fixed, again = run(), run()
    for a, b, c in zip(usual, fixed, again):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))
        assert torch.equal(b, c)


def test_third_order_is_refused(device, generator):
    if native.reason_against(device.type):
        pytest.skip("the reference has every order")
    spec = small(interpolation="smoothstep")
    x, params = inputs(spec, 4, generator, device=device)
    x.requires_grad_()
    (first,) = torch.autograd.grad(ops.hash_grid(x, params, spec).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="hash_grid_second: derivatives of a higher order"):
        torch.autograd.grad(second.sum() + x.sum(), x)
    value, slope = ops.hash_grid_grad(x, params, spec)
    (first,) = torch.autograd.grad((value.sum() + slope.sum()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="hash_grid_grad_backward: derivatives of a higher order"):
        torch.autograd.grad(first.sum() + x.sum(), x)


@needs_native
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float16])
def test_opcheck(compute_dtype, device, generator):
    spec = small()
    x, params = inputs(spec, 5, generator, device=device)
    x.requires_grad_(), params.requires_grad_()
    table = None if compute_dtype == torch.float32 else params.detach().to(compute_dtype)
    rest = (table, spec.key, spec.levels)
    backend = backends.choose("hash_grid", device)
    grad_y = torch.randn(5, spec.output_dim, device=device, requires_grad=True)
    jacobian = torch.randn(5, spec.output_dim, 3, device=device)
    library = torch.ops.text3d
    torch.library.opcheck(library.hash_grid.default, (x, params, *rest, backend))
    torch.library.opcheck(library.hash_grid_grad.default, (x, params, *rest, backend))
    plain = grad_y.detach(), x.detach(), params.detach(), *rest, True, True, backend
    torch.library.opcheck(library.hash_grid_backward.default, (grad_y, x, params, *rest, True, True, backend))
    torch.library.opcheck(library.hash_grid_backward.default, (*plain[:-2], False, backend))
    torch.library.opcheck(library.hash_grid_second.default, (x.detach(), None, *plain))
    torch.library.opcheck(library.hash_grid_grad_backward.default, (plain[0], jacobian, *plain[1:]))


@needs_native
def test_compiles_whole(device, generator):
    """All three ops in one graph, as a field with analytic normals uses them; active_levels may change."""
    grid = nn.HashGrid(small(), device=device, generator=generator, compute_dtype=torch.float16)
    x, _ = inputs(grid.spec, 13, generator, device=device)

    def loss(x):
        value, slope = grid.value_and_grad(x)
        along = ops.hash_grid_vjp(x, grid.params, value, grid.spec, grid.active_levels, grid.compute_dtype)
        return (grid(x) * value).sum() + slope.square().sum() * 1e3 + along.sum() * 1e6

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grid.active_levels in (None, 2, 3):
        results = []
        for run in (loss, compiled):
            leaf = x.clone().requires_grad_()
            value = run(leaf)
            results.append((value, *torch.autograd.grad(value, (leaf, grid.params))))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_module(device):
    grid = nn.HashGrid(levels=4, features=2, log2_table_size=8, device=device,
                       generator=torch.Generator(device).manual_seed(0))
    assert grid.params.shape == (grid.spec.num_params,) and 9e-5 < grid.params.abs().max() <= 1e-4
    x = torch.rand(5, 7, 3, device=device)
    y = grid(x)
    assert y.shape == (5, 7, 8) == (*x.shape[:-1], grid.output_dim)
    grid.active_levels = 2
    coarse = grid(x)
    assert coarse[..., 4:].eq(0).all() and torch.equal(coarse[..., :4], y[..., :4])
    value, slope = grid.value_and_grad(x)
    torch.testing.assert_close(value, coarse)
    assert slope.shape == (5, 7, 8, 3) and slope[..., 4:, :].eq(0).all()
    grid.active_levels = 0
    assert grid(x).eq(0).all()
    (grad,) = torch.autograd.grad(grid(x).sum(), grid.params)
    assert grad.eq(0).all()
    with pytest.raises(TypeError, match="spec: expected either"):
        nn.HashGrid(HashGridSpec(), levels=3)


@needs_native
def test_errors_name_the_argument():
    spec = small()
    x, params = torch.rand(4, 3), torch.zeros(spec.num_params)
    with pytest.raises(ValueError, match=r"x: expected shape \[points, 3\], got \[4, 2\]"):
        ops.hash_grid(x[:, :2], params, spec)
    with pytest.raises(ValueError, match=r"params: expected shape \["):
        ops.hash_grid(x, params[1:], spec)
    with pytest.raises(TypeError, match=r"x: expected torch.float32, got torch.float64"):
        ops.hash_grid(x.double(), params, spec)
    with pytest.raises(TypeError, match=r"params: expected torch.float32, got torch.float16"):
        ops.hash_grid(x, params.half(), spec)
    with pytest.raises(ValueError, match="active_levels: expected 0 to 5, got 6"):
        ops.hash_grid(x, params, spec, active_levels=6)
    with pytest.raises(TypeError, match="compute_dtype: expected one of torch.float32"):
        ops.hash_grid_grad(x, params, spec, compute_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"cotangent: expected shape \[4, \d+\], got \[3, \d+\]"):
        ops.hash_grid_vjp(x, params, torch.zeros(3, spec.output_dim), spec)
    with pytest.raises(TypeError, match="spec: expected a HashGridSpec, got str"):
        ops.hash_grid(x, params, spec.key)
    if not native.emulated():
        x[2, 1] = float("nan")
        with pytest.raises(ValueError, match=r"x: expected finite values, got \(.*nan.*\) at point 2"):
            ops.hash_grid(x, params, spec)
        x[2, 1] = float("inf")
        with pytest.raises(ValueError, match="x: expected finite values"):
            ops.hash_grid_grad(x, params, spec)


def test_no_points_have_values_and_gradients(device):
    grid = nn.HashGrid(dim=3, levels=2, features=2, log2_table_size=8, base_resolution=4, device=device)
    for shape in ((0, 3), (4, 0, 3)):
        value, gradient = grid.value_and_grad(torch.zeros(shape, device=device))
        assert value.shape == (*shape[:-1], 4) and gradient.shape == (*shape[:-1], 4, 3)
