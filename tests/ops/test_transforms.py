"""What torch does to functions, done to every op: right or refused in words, never zeros."""

import pytest
import torch
from cases import CASES, TWICE
from torch.autograd import forward_ad

from text3d_fast import ops, use_backend

pytestmark = pytest.mark.filterwarnings("error:.*batching rule")


@pytest.fixture(params=CASES)
def case(request, device, generator):
    return CASES[request.param](device, generator)


def loss_of(function):
    return lambda *leaves: function(*leaves).square().sum()


def test_functional_gradients_are_those_of_autograd(case):
    function, leaves = case
    loss, numbers = loss_of(function), tuple(range(len(leaves)))
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(loss(*tracked), tracked)
    assert any(g.ne(0).any() for g in expected)
    torch.testing.assert_close(torch.func.grad(loss, numbers)(*leaves), expected)
    value, vjp = torch.func.vjp(function, *leaves)
    torch.testing.assert_close(vjp(2 * value), expected)


def test_forward_mode_is_refused(case):
    function, leaves = case
    tangents = tuple(torch.ones_like(leaf) for leaf in leaves)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(function, tuple(leaves), tangents)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        function(*map(forward_ad.make_dual, leaves, tangents))
    with forward_ad.dual_level():  # no tangents, no refusal
        assert torch.equal(function(*leaves), function(*leaves))


def test_forward_mode_of_a_backward_pass_is_refused(case):
    function, leaves = case
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(*tracked)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="(backward|second): no forward-mode derivatives"):
        cotangent = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        torch.autograd.grad(value, tracked, cotangent)


def test_vmap_is_refused(case):
    function, leaves = case
    with pytest.raises(RuntimeError, match=r"torch.func.vmap is not supported"):
        torch.func.vmap(function)(*(torch.stack([leaf, leaf]) for leaf in leaves))
    with pytest.raises(RuntimeError, match=r"torch.func.vmap is not supported"):
        torch.func.jacrev(function)(*leaves)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right_or_refused(name, device, generator):
    """With a constant cotangent as with one that depends on the inputs; also a penalty among other terms."""
    function, leaves = CASES[name](device, generator)
    for outer in (lambda y: y.sum(), lambda y: y.square().sum()):
        tracked = [leaf.clone().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(outer(function(*tracked)), tracked, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        total = penalty + sum(leaf.sum() for leaf in tracked)
        if name in TWICE:
            got = torch.autograd.grad(total, tracked)
            with use_backend("reference"):
                again = CASES[name](device, torch.Generator(device).manual_seed(0))[0]
                first = torch.autograd.grad(outer(again(*tracked)), tracked, create_graph=True)
                expected = torch.autograd.grad(
                    sum(g.square().sum() for g in first) + sum(leaf.sum() for leaf in tracked), tracked)
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-3)  # float32 sums of squares near 1e3
        else:
            with pytest.raises(RuntimeError, match="derivatives of a higher order"):
                torch.autograd.grad(total, tracked)


def test_nested_functional_gradients(case, request):
    function, leaves = case
    name = request.node.callspec.params["case"]
    loss = loss_of(function)
    nested = torch.func.grad(lambda first: torch.func.grad(loss)(first, *leaves[1:]).square().sum())
    if name not in TWICE:
        with pytest.raises(RuntimeError, match="derivatives of a higher order"):
            nested(leaves[0])
        return
    tracked = leaves[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(tracked, *leaves[1:]), tracked, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), tracked)
    assert expected.ne(0).any()
    torch.testing.assert_close(nested(leaves[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_to_float32(case, dtype):
    function, leaves = case
    halves = [leaf.to(dtype) for leaf in leaves]
    expected = function(*(half.float() for half in halves))
    with torch.autocast(leaves[0].device.type, dtype):
        got = function(*halves)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    tracked = [half.clone().requires_grad_() for half in halves]
    with torch.autocast(leaves[0].device.type, dtype):
        value = function(*tracked)
    gradients = torch.autograd.grad(value.sum(), tracked)
    assert all(g.dtype == dtype for g in gradients)
    with pytest.raises(TypeError, match=r"expected torch.float32, got torch.(bfloat16|float16)"):
        function(*halves)


def test_autocast_does_not_reach_the_reference(device, generator):
    function, leaves = CASES["interpolate"](device, generator)
    with use_backend("reference"):
        expected = function(*leaves)
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(function(*leaves), expected)


def test_gradients_stop_at_march_rays(device):
    occupancy = type("Grid", (), {"aabb": torch.tensor([-1.0] * 3 + [1.0] * 3, device=device),
                                  "binaries": torch.ones(1, 4, 4, 4, dtype=torch.bool, device=device)})()
    origins = torch.tensor([[0.0, 0.0, -2.0]], device=device, requires_grad=True)
    directions = torch.tensor([[0.0, 0.0, 1.0]], device=device)
    samples = ops.march_rays(origins, directions, occupancy, step=0.1)
    assert not samples.t_starts.requires_grad
    with pytest.raises(RuntimeError, match="march_rays: no forward-mode derivatives"):
        torch.func.jvp(lambda o: ops.march_rays(o, directions, occupancy, step=0.1).t_starts,
                       (origins.detach(),), (torch.ones_like(origins),))
    with pytest.raises(RuntimeError, match="march_rays: torch.func.vmap"):
        torch.func.vmap(lambda o: ops.march_rays(o, directions, occupancy, step=0.1, capacity=8).t_starts)(
            origins.detach()[None])
