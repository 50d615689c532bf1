"""What a CUDA graph cannot capture must not appear in a step in capacity mode: a value read by the host, a shape that
depends on data, a copy from the host's memory. Traced on the meta device in a GPU's place, so no GPU is needed."""

import contextlib
import importlib
import inspect

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import Step
from text3d_fast import backends, native

antialias, composite, interpolate, march_rays, rasterize, texture = (
    importlib.import_module(f"text3d_fast.ops.{name}")
    for name in ("antialias", "composite", "interpolate", "march_rays", "rasterize", "texture")
)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "equal",
         "is_nonzero", "item", "bincount"}


class _Factories(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "meta":
            raise RuntimeError("torch.tensor on the device: a copy from the host's memory")
        return function(*args, **(kwargs or {}))


class _Calls(TorchDispatchMode):

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if name in READS:
            raise RuntimeError(f"{function}: the host reads a value, or a shape depends on one")
        result = function(*args, **(kwargs or {}))
        moves = name in ("_to_copy", "copy_", "_copy_from") and isinstance(result, torch.Tensor)
        if moves and result.device.type == "meta" and any(t.device.type == "cpu" for t in tensors):
            raise RuntimeError(f"{function}: a copy from the host's memory")
        return result


@contextlib.contextmanager
def capturable():
    """Raises at the first call that a graph cannot capture."""
    with _Factories(), _Calls():
        yield


@pytest.mark.parametrize("normals", [None, "analytic"])
def test_step_can_be_captured(normals):
    step = Step("meta", views=2, size=8, capacity=500, log2_table_size=12, levels=4, normals=normals)
    with capturable():
        loss = step.gradient()
    assert loss.device.type == "meta" and step.field.hidden.weight.grad is not None


@pytest.mark.parametrize("wrong", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.ones(3).to(x.device),
    lambda x: x + torch.tensor([1.0, 2, 3], device=x.device), lambda x: bool(x.any()), lambda x: x.tolist(),
])  # fmt: skip
def test_the_guard_sees(wrong):
    x = torch.ones(3, device="meta")
    with capturable(), pytest.raises((RuntimeError, NotImplementedError)):
        wrong(x)


def test_step_without_capacity_cannot():
    step = Step("meta", views=1, size=4, capacity=50, log2_table_size=12, levels=4)
    step.renderer.capacity = None
    with capturable(), pytest.raises(Exception):  # noqa: B017 - a size that is not known fails in several ways
        step.gradient()


FLOATS = dict(dtype=torch.float32, device="meta")


def _inputs():
    """(implementation, its arguments without the backend): what runs on a GPU beneath each op."""
    samples, rays, vertices = 40, 6, 9
    ids = torch.zeros(samples, dtype=torch.int32, device="meta")
    offsets = torch.zeros(rays + 1, dtype=torch.int32, device="meta")
    sigma, times, per_ray = (torch.zeros(n, **FLOATS) for n in (samples, samples, rays))
    values, points = torch.zeros(samples, 3, **FLOATS), torch.zeros(rays, 3, **FLOATS)
    binaries, aabb = torch.ones(1, 4, 4, 4, dtype=torch.bool, device="meta"), torch.zeros(6, **FLOATS)
    pos, tri = torch.zeros(2, vertices, 4, **FLOATS), torch.zeros(5, 3, dtype=torch.int32, device="meta")
    rast, color = torch.zeros(2, 4, 6, 4, **FLOATS), torch.zeros(2, 4, 6, 3, **FLOATS)
    attr, tex = torch.zeros(2, vertices, 5, **FLOATS), torch.zeros(1, 8, 8, 3, **FLOATS)
    uv, flags = torch.zeros(2, 4, 6, 2, **FLOATS), torch.zeros(0, dtype=torch.uint8, device="meta")
    return {
        "march_rays": (march_rays._march, (points, points, binaries, aabb, None, None, per_ray, 0.0, 9.0, 0.1, 0.0,
                                           40)),
        "composite": (composite._forward, (sigma, values, times, times, ids, offsets, 1e-3)),
        "composite_backward": (composite._backward, (points, per_ray, None, None, None, sigma, values, times, times,
                                                     offsets, per_ray, per_ray, per_ray, sigma, 1e-3, True)),
        "rasterize": (rasterize._forward, (pos, tri, None, None, 4, 6, True, False)),
        "rasterize_backward": (rasterize._backward, (rast, rast, pos, tri, rast)),
        "interpolate": (interpolate._forward, (attr, rast, tri, rast, [0, 1, 2, 3, 4])),
        "interpolate_backward": (interpolate._backward, (torch.zeros(2, 4, 6, 5, **FLOATS),
                                                         torch.zeros(2, 4, 6, 10, **FLOATS), attr, rast, tri, rast,
                                                         [0, 1, 2, 3, 4], True)),
        "texture": (texture._forward, ([tex], uv, None, None, 1, 0)),
        "texture_backward": (texture._backward, (color, [tex], uv, None, None, 1, 0, [True, False, False, True])),
        "antialias": (antialias._forward, (color, rast, pos, tri, tri, 1.0)),
        "antialias_backward": (antialias._backward, (color, color, rast, pos, tri, tri, flags, 1.0, [True, True])),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["march_rays", "composite", "composite_backward", "rasterize", "rasterize_backward",
                                  "interpolate", "interpolate_backward", "texture", "texture_backward", "antialias",
                                  "antialias_backward"])
def test_kernels_are_launched_without_a_synchronization(name, monkeypatch):
    """The host's side of each op, as it runs on a GPU: the kernels themselves are left out."""
    launched = []
    monkeypatch.setattr(backends, "call", lambda backend, entry, *fields: launched.append(entry))
    monkeypatch.setattr(native, "call", lambda entry, *fields: launched.append(entry))
    monkeypatch.setattr(native, "aligned", lambda x: x.contiguous())
    monkeypatch.setattr(native, "runs_cuda_source", lambda device: True)
    implementation, arguments = _inputs()[name]
    assert len(inspect.signature(implementation).parameters) in (1, len(arguments) + 1)
    with capturable():
        implementation(*arguments, "native")
    assert launched and all(entry.startswith(name.partition("_backward")[0]) for entry in launched)
