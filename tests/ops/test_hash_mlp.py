"""ops.hash_mlp against the two ops that it is: values, gradients of both orders, every dimension, chunks, errors."""

import pytest
import torch
from test_mlp import inputs

from text3d_fast import native, ops, use_backend
from text3d_fast.ops import HashGridSpec, MLPSpec

CASES = [
    (HashGridSpec(levels=3, log2_table_size=8, base_resolution=4, interpolation="smoothstep"),
     MLPSpec(6, 3, 16, 2, "silu")),
    (HashGridSpec(dim=2, levels=5, features=1, log2_table_size=5, base_resolution=2), MLPSpec(5, 7, 33, 1, bias=False)),
    (HashGridSpec(dim=4, levels=2, features=8, log2_table_size=6, base_resolution=2, dialect="ngp"),
     MLPSpec(16, 1, 5, 3, "softplus", "sigmoid")),
    (HashGridSpec(levels=3, features=4, base_resolution=3, kind="dense", interpolation="nearest"),
     MLPSpec(12, 2, 24, 1, "tanh")),
]


def make_inputs(grid, spec, count, generator, device):
    x = torch.rand(count, grid.dim, generator=generator, device=device) * 1.2 - 0.1
    params = torch.randn(grid.num_params, generator=generator, device=device)
    return x, params, inputs(spec, 1, generator, device=device)[1]


def derivatives(function, leaves, cotangents):
    leaves = [t.clone().requires_grad_() for t in leaves]
    y = function(*leaves)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return y, *first, *torch.autograd.grad(first, leaves, cotangents)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("active_levels", [None, 1])
def test_is_the_composition(case, active_levels, device, generator, poisoned_empty):
    grid, spec = case
    leaves = make_inputs(grid, spec, 50, generator, device)
    cotangents = [torch.randn(t.shape, generator=generator, device=device) for t in leaves]
    got = derivatives(lambda *t: ops.hash_mlp(*t, grid, spec, active_levels), leaves, cotangents)
    with use_backend("reference"):
        want = derivatives(lambda x, p, weights: ops.mlp(ops.hash_grid(x, p, grid, active_levels), weights, spec),
                           [t.double() for t in leaves], [c.double() for c in cotangents])
    for result, expected in zip(got, want):  # float32 sums through up to four layers, three times over
        scale = float(expected.detach().abs().max().clamp(min=1))
        torch.testing.assert_close(result / scale, expected.float() / scale, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_wanted(wanted, device, generator, poisoned_empty):
    grid, spec = CASES[0]
    leaves = make_inputs(grid, spec, 40, generator, device)
    full = derivatives(lambda *t: ops.hash_mlp(*t, grid, spec), leaves, leaves)
    own = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
    (gradient,) = torch.autograd.grad(ops.hash_mlp(*own, grid, spec).square().sum(), own[wanted])
    torch.testing.assert_close(gradient, full[1 + wanted], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.emulated(), reason="chunks of a CPU")
def test_chunks(generator):
    """More points than a CPU encodes at a time."""
    grid, spec = CASES[1]
    leaves = make_inputs(grid, spec, 66000, torch.Generator().manual_seed(0), "cpu")
    results = []
    for function in (lambda *t: ops.hash_mlp(*t, grid, spec),
                     lambda x, params, weights: ops.mlp(ops.hash_grid(x, params, grid), weights, spec)):
        own = [t.clone().requires_grad_() for t in leaves]
        y = function(*own)
        results.append([y, *torch.autograd.grad(y.square().sum(), own)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


def test_no_points(device, generator):
    grid, spec = CASES[0]
    own = [t.requires_grad_() for t in make_inputs(grid, spec, 0, generator, device)]
    y = ops.hash_mlp(*own, grid, spec)
    assert y.shape == (0, 3)
    assert all(g.eq(0).all() and g.shape == t.shape for g, t in zip(torch.autograd.grad(y.sum(), own), own))


def test_deterministic_algorithms(device, generator, monkeypatch):
    grid, spec = CASES[0]
    leaves = make_inputs(grid, spec, 70, generator, device)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    once, again = (derivatives(lambda *t: ops.hash_mlp(*t, grid, spec), leaves, leaves)[1:4] for _ in range(2))
    for a, b in zip(once, again):
        assert torch.equal(a, b)


def test_errors_name_the_argument(generator):
    grid, spec = CASES[0]
    x, params, weights = make_inputs(grid, spec, 4, torch.Generator().manual_seed(0), "cpu")
    with pytest.raises(ValueError, match="mlp_spec.inputs: expected 6"):
        ops.hash_mlp(x, params, weights, grid, MLPSpec(7, 3))
    with pytest.raises(ValueError, match=r"weights: expected shape \[\d+\]"):
        ops.hash_mlp(x, params, weights[1:], grid, spec)
    with pytest.raises(ValueError, match="weights: expected device cpu like x, got meta"):
        ops.hash_mlp(x, params, weights.to("meta"), grid, spec)
