"""ops.render_field against its reference: values and all gradients in every mode, early stop, memory, errors."""

import dataclasses
import itertools

import pytest
import torch

from text3d_fast import native, ops, use_backend
from text3d_fast.ops import FieldSpec, HashGridSpec, MLPSpec, PointLights
from text3d_fast.reference.render_field import render_field as reference

MODES = ("albedo", "lambertian", "textureless")
on_a_cpu = pytest.mark.skipif(native.runs_cuda_source(torch.device("cpu")), reason="of the loops of a CPU")
GRID = HashGridSpec(levels=4, features=2, log2_table_size=9, base_resolution=4, per_level_scale=1.6,
                    interpolation="smoothstep")
FIELD = FieldSpec(GRID, MLPSpec(8, 4, 16), radius=1.2, sharpness=3.0, blob_scale=4.0)
FIELDS = [
    FIELD,
    dataclasses.replace(FIELD, mlp=MLPSpec(8, 4, 24, 2, "silu"), density="exp", blob="gaussian", blob_width=0.4),
    FieldSpec(dataclasses.replace(GRID, features=4, levels=3, interpolation="linear"), MLPSpec(12, 4, 32, bias=False)),
]


def make_inputs(spec, rays, generator, device, longest=70):
    """Rays from a sphere of radius 2 towards the middle; of every length, also none."""
    origins = torch.nn.functional.normalize(torch.randn(rays, 3, generator=generator, device=device), dim=-1) * 2
    target = torch.rand(rays, 3, generator=generator, device=device) - 0.5
    directions = torch.nn.functional.normalize(target - origins, dim=-1)
    counts = torch.randint(0, longest + 1, (rays,), generator=generator, device=device)
    offsets = torch.zeros(rays + 1, dtype=torch.int32, device=device)
    offsets[1:] = counts.cumsum(0)
    ids = torch.repeat_interleave(torch.arange(rays, device=device), counts).int()
    within = torch.arange(len(ids), device=device) - offsets[ids.long()]
    starts = 0.9 + within * 0.03 + 0.01 * torch.rand(len(ids), generator=generator, device=device)
    samples = ops.RaySamples(ids, starts, starts + 0.03, offsets)
    params = torch.randn(spec.grid.num_params, generator=generator, device=device) * 0.5
    weights = torch.randn(spec.mlp.num_params, generator=generator, device=device) * 0.5
    return origins, directions, params, weights, samples


def make_lights(views, generator, device):
    return PointLights(torch.randn(views, 3, generator=generator, device=device) * 2,
                       *(torch.rand(views, 3, generator=generator, device=device) for _ in range(2)))


def render(origins, directions, params, weights, samples, spec, cotangents=None, dtype=torch.float32, lights=None,
           **options):
    """Outputs, and the gradients of params and weights along the cotangents that are not None."""
    leaves = [t.to(dtype).requires_grad_() for t in (params, weights)]
    if lights is not None:
        lights = PointLights(*(light.to(dtype) for light in lights))
    samples = dataclasses.replace(samples, t_starts=samples.t_starts.to(dtype), t_ends=samples.t_ends.to(dtype))
    out = ops.render_field(origins.to(dtype), directions.to(dtype), *leaves, samples, spec, lights=lights, **options)
    if cotangents is None:
        cotangents = [torch.ones_like(t) for t in out if t is not None]
    used = [(o, c.to(dtype)) for o, c in zip(out, cotangents) if o is not None and c is not None]
    gradients = torch.autograd.grad([o for o, _ in used], leaves, [c for _, c in used])
    return [t.detach() for t in out if t is not None], gradients


def assert_same(got, want, tolerance=2e-4):
    for result, expected in zip((*got[0], *got[1]), (*want[0], *want[1])):
        scale = float(expected.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(result / scale, expected.float() / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("early_stop", [0.0, 1e-2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", FIELDS, ids=range(len(FIELDS)))
def test_matches_reference(spec, mode, early_stop, device, generator, poisoned_empty):
    """Float32 sums over up to 70 samples and 16 corners, and a suffix that is a difference: 2e-4 of the largest."""
    inputs = make_inputs(spec, 66, generator, device)
    options = {"mode": mode, "early_stop": early_stop, "normals": True, "active_levels": 3,
               "lights": None if mode == "albedo" else make_lights(3, generator, device)}
    cotangents = [torch.randn(s, generator=generator, device=device) for s in ((66, 6), *[(66,)] * 4)]
    got = render(*inputs, spec, cotangents, **options)
    with use_backend("reference"):
        want = render(*inputs, spec, cotangents, torch.float64, **options)
    assert_same(got, want)


@pytest.mark.parametrize("rays", [1, 1500])
def test_rounds(rays, device, generator):
    """More rays than are open at a time, and rays that take several blocks."""
    inputs = make_inputs(FIELD, rays, generator, device, longest=600 if rays == 1 else 40)
    got = render(*inputs, FIELD)
    with use_backend("reference"):
        want = render(*inputs, FIELD, dtype=torch.float64)
    assert_same(got, want)


@on_a_cpu
def test_threads_do_not_change_results():
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs(FIELD, 700, generator, "cpu")
    options = {"mode": "lambertian", "lights": make_lights(1, generator, "cpu")}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            outputs, gradients = render(*inputs, FIELD, **options)
            results.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("wanted", range(5))
def test_one_cotangent_at_a_time(wanted, device, generator, poisoned_empty):
    inputs = make_inputs(FIELD, 20, generator, device)
    cotangents = [None] * 5
    cotangents[wanted] = torch.ones((20, 6) if wanted == 0 else 20, device=device)
    options = {"mode": "lambertian", "lights": make_lights(2, generator, device)}
    got = render(*inputs, FIELD, cotangents, **options)
    with use_backend("reference"):
        want = render(*inputs, FIELD, cotangents, torch.float64, **options)
    assert_same(got, want)


def test_is_the_composition(device, generator):
    """The same as the ops one after the other, and the same as without normals."""
    origins, directions, params, weights, samples = make_inputs(FIELD, 40, generator, device)
    out = ops.render_field(origins, directions, params, weights, samples, FIELD)
    positions = samples.positions(origins, directions)
    network = ops.mlp(ops.hash_grid((positions + 1.2) / 2.4, params, GRID), weights, FIELD.mlp)
    sigma = 3 * torch.nn.functional.softplus(network[:, 0] + 4 * (1 - positions.norm(dim=-1) / 0.5))
    expected = ops.composite(sigma, torch.sigmoid(network[:, 1:]), samples)
    for got, want in zip(out, expected[:4]):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    more = ops.render_field(origins, directions, params, weights, samples, FIELD, normals=True)
    torch.testing.assert_close(more.values[:, :3], out.values)
    assert out.orientation is None and more.orientation.shape == (40,)


def test_reference_gradcheck():
    generator = torch.Generator().manual_seed(1)
    spec = FieldSpec(HashGridSpec(levels=2, features=1, log2_table_size=4, base_resolution=2, per_level_scale=1.5,
                                  interpolation="smoothstep"), MLPSpec(2, 4, 3, 1, "silu"), blob_scale=1.0)
    origins, directions, params, weights, samples = make_inputs(spec, 4, generator, "cpu", longest=4)
    lights = tuple(light.double() for light in make_lights(2, generator, "cpu"))
    fixed = (samples.t_starts.double(), samples.t_ends.double(), samples.ray_ids, samples.ray_offsets)

    def run(params, weights):  # without the weights' stopgrad, which no difference quotient sees
        return reference(origins.double(), directions.double(), params, weights, *fixed, lights, spec, 2, 0.0,
                         "lambertian", True)[:4]

    torch.autograd.gradcheck(run, (params.double().requires_grad_(), weights.double().requires_grad_()))


@pytest.mark.parametrize("network", [MLPSpec(8, 4, 128, 2, "softplus"), MLPSpec(8, 4, 5, 4, "tanh")],
                         ids=["wide", "deep"])
def test_other_networks(network, device, generator, poisoned_empty):
    """Wide ones have fewer warps to a CUDA block, and less to share."""
    spec = dataclasses.replace(FIELD, mlp=network)
    inputs = make_inputs(spec, 9, generator, device, longest=30)
    options = {"mode": "lambertian", "lights": make_lights(1, generator, device)}
    got = render(*inputs, spec, **options)
    with use_backend("reference"):
        want = render(*inputs, spec, dtype=torch.float64, **options)
    assert_same(got, want)


def test_wrong_offsets_stay_in_bounds(device, generator):
    """On a CPU they raise; CUDA gives some result, and reads and writes nothing else."""
    *inputs, samples = make_inputs(FIELD, 12, generator, device)
    for wrong in (samples.ray_offsets.flip(0), samples.ray_offsets * 3, samples.ray_offsets - 100):
        arguments = (*inputs, dataclasses.replace(samples, ray_offsets=wrong.contiguous()), FIELD)
        if native.runs_cuda_source(device):
            render(*arguments)
        else:
            with pytest.raises(ValueError, match="samples.ray_offsets: expected to rise"):
                render(*arguments)


@on_a_cpu
def test_positions_must_be_finite():
    origins, *inputs = make_inputs(FIELD, 12, torch.Generator().manual_seed(0), "cpu")
    origins[5, 1] = float("nan")
    with pytest.raises(ValueError, match="samples: expected finite positions"):
        ops.render_field(origins, *inputs, FIELD)


def test_deterministic_algorithms(device, generator):
    """On CUDA the gradient to params raises torch's alert, and scenes render by parts."""
    inputs = make_inputs(FIELD, 5, generator, device)
    try:
        torch.use_deterministic_algorithms(True)
        assert ops.renders_fused(device) is not native.runs_cuda_source(device)
        if native.runs_cuda_source(device):
            with pytest.raises(RuntimeError, match="render_field.*does not have a deterministic implementation"):
                render(*inputs, FIELD)
        torch.use_deterministic_algorithms(True, warn_only=True)
        render(*inputs, FIELD)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_to_render(device, generator):
    for rays, longest in ((0, 5), (5, 0)):
        inputs = make_inputs(FIELD, rays, generator, device, longest)
        outputs, gradients = render(*inputs, FIELD)
        assert all(t.eq(0).all() for t in (*outputs, *gradients)) and outputs[0].shape == (rays, 3)


def test_padding_belongs_to_no_ray(device, generator):
    *inputs, samples = make_inputs(FIELD, 12, generator, device)
    longer = ops.RaySamples(*(torch.cat([t, t.new_zeros(9)]) for t in (samples.ray_ids, samples.t_starts,
                                                                      samples.t_ends)), samples.ray_offsets)
    assert_same(render(*inputs, longer, FIELD), render(*inputs, samples, FIELD), 1e-6)


def test_opcheck(device, generator):
    origins, directions, params, weights, samples = make_inputs(FIELD, 6, generator, device)
    fixed = (samples.t_starts, samples.t_ends, samples.ray_ids, samples.ray_offsets)
    for mode, normals in itertools.product(("albedo", "lambertian"), (False, True)):
        lights = (None,) * 3 if mode == "albedo" else make_lights(1, generator, device)
        if mode == "albedo" or normals:
            arguments = (origins, directions, params.requires_grad_(), weights.requires_grad_(), *fixed, *lights,
                         FIELD.key, 4, 1e-4, mode, normals, "native")
            torch.library.opcheck(torch.ops.text3d.render_field.default, arguments)


def test_errors_name_the_argument(generator):
    origins, directions, params, weights, samples = make_inputs(FIELD, 6, torch.Generator().manual_seed(0), "cpu")
    arguments = (origins, directions, params, weights, samples, FIELD)
    with pytest.raises(ValueError, match="mode: expected one of albedo"):
        ops.render_field(*arguments, mode="phong")
    with pytest.raises(ValueError, match="lights: expected PointLights with mode 'lambertian', got None"):
        ops.render_field(*arguments, mode="lambertian")
    with pytest.raises(ValueError, match="lights.position: expected as many views"):
        ops.render_field(*arguments, mode="lambertian", lights=make_lights(4, torch.Generator(), "cpu"))
    with pytest.raises(ValueError, match=r"origins: expected shape \[6, 3\]"):
        ops.render_field(origins[1:], *arguments[1:])
    with pytest.raises(ValueError, match="directions: expected no gradient to be required"):
        ops.render_field(origins, directions.clone().requires_grad_(), *arguments[2:])
    with pytest.raises(ValueError, match="mlp.inputs: expected one of 8, got 9"):
        dataclasses.replace(FIELD, mlp=MLPSpec(9, 4, 16))
    assert FieldSpec.parse(FIELDS[1].key) == FIELDS[1]
