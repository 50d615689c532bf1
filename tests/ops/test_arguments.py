"""Wrong Python types, for every public function by its annotations; other default dtypes and devices; half tables."""

import inspect
import typing

import numpy as np
import pytest
import torch

from text3d_fast import nn, ops

FUNCTIONS = {name: getattr(ops, name) for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
PARAMETERS = [(name, p.name) for name, function in FUNCTIONS.items()
              for p in inspect.signature(function).parameters.values()]


def valid_arguments() -> dict[str, object]:
    """By name: no function has an argument of this name that means something else, but for shapes."""
    samples = ops.RaySamples(torch.zeros(2, dtype=torch.int32), torch.zeros(2), torch.ones(2),
                             torch.tensor([0, 2], dtype=torch.int32))
    spec = ops.HashGridSpec(levels=1, log2_table_size=4)
    return {"samples": samples, "spec": spec, "grid_spec": spec, "mlp_spec": ops.MLPSpec(inputs=2, outputs=4),
            "grid": ops.TetGrid.kuhn(1), "resolution": (4, 4),
            "occupancy": nn.OccupancyGrid([-1, -1, -1, 1, 1, 1], 2)}


@pytest.mark.parametrize("name, parameter", PARAMETERS)
def test_wrong_types_name_the_argument(name, parameter):
    function = FUNCTIONS[name]
    known, arguments = valid_arguments(), {}
    parameters = inspect.signature(function).parameters
    for p in parameters.values():
        if p.name == "spec" and p.annotation in (ops.FieldSpec, "FieldSpec"):
            arguments[p.name] = ops.FieldSpec(known["spec"], known["mlp_spec"])
        elif p.name == "spec" and p.annotation is not ops.HashGridSpec:
            arguments[p.name] = ops.MLPSpec(inputs=3, outputs=1)
        elif p.name in known:
            arguments[p.name] = known[p.name]
        elif p.default is p.empty:
            arguments[p.name] = torch.zeros(2)
    options = (parameters[parameter].annotation, *typing.get_args(parameters[parameter].annotation))
    wrong = [object(), {"a": 1}]
    wrong += [] if type(None) in options else [None]
    wrong += [] if str in options else ["text"]
    wrong += [np.zeros((2, 2))]
    for value in wrong:
        with pytest.raises(TypeError, match=rf"^{parameter}: expected "):
            function(**{**arguments, parameter: value})


def test_fields_are_looked_at_too():
    samples = valid_arguments()["samples"]
    samples.t_ends = None
    with pytest.raises(TypeError, match=r"samples.t_ends: expected a tensor, got None"):
        ops.composite(torch.zeros(2), torch.zeros(2, 1), samples)
    with pytest.raises(TypeError, match=r"mip\[0\]: expected a tensor, got 1"):
        ops.texture(torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 4), mip=[1])


def test_numbers():
    pos, tri = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"resolution\[0\]: expected an integer, got 8.0"):
        ops.rasterize(pos, tri, (8.0, 8.0))
    assert ops.rasterize(pos, tri, [np.int64(3), 2])[0].shape == (1, 3, 2, 4)
    with pytest.raises(TypeError, match="grad_db: expected True or False, got 1"):
        ops.rasterize(pos, tri, (8, 8), grad_db=1)
    samples = valid_arguments()["samples"]
    for value in (True, torch.tensor(0.1), "0.1"):
        with pytest.raises(TypeError, match="early_stop: expected a number"):
            ops.composite(torch.zeros(2), torch.zeros(2, 1), samples, value)
    assert ops.composite(torch.zeros(2), torch.zeros(2, 1), samples, np.float32(0.1)).opacity.shape == (1,)
    for value in (float("nan"), 2.0, -1.0):
        with pytest.raises(ValueError, match="early_stop: expected"):
            ops.composite(torch.zeros(2), torch.zeros(2, 1), samples, value)


def test_registered_ops_check_by_themselves():
    """What compiled and exported code calls."""
    ids, offsets = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    composite = torch.ops.text3d.composite
    good = [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2), torch.ones(2), ids, offsets, 1e-4, "native"]
    for at, value, message in [(0, torch.zeros(3), "sigma: expected shape"), (3, torch.ones(2).double(), "t_ends"),
                               (4, ids.to("meta"), "ray_ids: expected device"), (5, offsets[:0], "ray_offsets")]:
        with pytest.raises((ValueError, TypeError), match=message):
            composite(*good[:at], value, *good[at + 1 :])
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r"mip\[0\]: expected a batch of 1 or 3, got 2"):
            torch.ops.text3d.texture(
                [torch.zeros(3, 2, 2, 1, device=device), torch.zeros(2, 1, 1, 1, device=device)],
                torch.zeros(3, 1, 1, 2, device=device), None, torch.zeros(3, 1, 1, device=device), 3, 0, "native")


@pytest.fixture(params=["float64", "meta"])
def other_default(request):
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
    else:
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)


def test_modules_under_other_defaults(other_default):
    grid = nn.OccupancyGrid(torch.tensor([-1.0, -1, -1, 1, 1, 1], dtype=torch.float32, device="cpu"), (2, 3, 4), 2)
    generator = torch.Generator("cpu").manual_seed(0)
    for step in (0, 512):
        grid.update(step, lambda x: 1 - x.norm(dim=-1), generator)
    assert grid.occs.dtype == torch.float32 and grid.occs.device.type == "cpu" and (grid.occs > 0).any()
    for tets in (ops.TetGrid.kuhn(2, "cpu"), ops.TetGrid.a15(4, "cpu")):
        assert tets.positions.dtype == torch.float32
        sdf = (0.6 - tets.positions.norm(dim=-1)).requires_grad_()
        vertices, faces = ops.marching_tets(tets.positions, sdf, tets)
        assert len(tets.edges) and len(faces) and vertices.dtype == torch.float32
        vertices.sum().backward()
    deformable = nn.DeformableTetGrid(4, "kuhn", device="cpu")
    assert {p.dtype for p in deformable.parameters()} == {torch.float32}
    assert nn.HashGrid(levels=1, log2_table_size=4, device="cpu").params.dtype == torch.float32


def test_modules_are_made_on_the_default_device():
    with torch.device("meta"):
        grid = nn.OccupancyGrid([-1, -1, -1, 1, 1, 1], 4)
        assert {buffer.device.type for buffer in grid.buffers()} == {"meta"}
        assert ops.TetGrid.kuhn(2).device.type == "meta" and ops.TetGrid.a15(4).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_tables_are_never_stale(dtype, device, generator):
    grid = nn.HashGrid(levels=2, log2_table_size=5, compute_dtype=dtype, device=device, generator=generator)
    x = torch.rand(7, 3, generator=generator, device=device)
    before = grid(x).detach()
    grid.params.data.mul_(2)
    torch.testing.assert_close(grid(x), 2 * before)
    grid.params.data = torch.zeros_like(grid.params)
    assert grid(x).eq(0).all()
    with torch.no_grad():
        grid.params.fill_(1)
    torch.testing.assert_close(grid(x), torch.ones_like(before))
    moved = grid.to("meta")
    assert moved(x.to("meta")).device.type == "meta"


def test_to_after_forward(device, generator):
    grid = nn.HashGrid(levels=2, log2_table_size=5, compute_dtype=torch.float16, generator=torch.Generator())
    occupancy = nn.OccupancyGrid([-1, -1, -1, 1, 1, 1], 4)
    x = torch.rand(7, 3)
    before = grid(x)
    ops.march_rays(x, x, occupancy)
    grid.to(device), occupancy.to(device)
    torch.testing.assert_close(grid(x.to(device)).cpu(), before)
    assert ops.march_rays(x.to(device), x.to(device), occupancy).t_starts.device.type == device.type


def test_empty_inputs():
    grid = nn.HashGrid(levels=2, log2_table_size=5)
    value, slope = grid.value_and_grad(torch.zeros(0, 3))
    assert value.shape == (0, 4) and slope.shape == (0, 4, 3)
    assert grid.vjp(torch.zeros(0, 3), torch.zeros(0, 4)).shape == (0, 3)
    none = torch.zeros(0, 3)
    samples = ops.march_rays(none, none, nn.OccupancyGrid([-1, -1, -1, 1, 1, 1], 4), capacity=5)
    assert samples.num_rays == 0 and samples.num_samples == 5
    out = ops.composite(torch.zeros(5), torch.zeros(5, 3), samples)
    assert out.values.shape == (0, 3)
