"""ops.mlp against its reference: values, gradients of first and second order, odd sizes, every activation, errors."""

import dataclasses
import itertools

import pytest
import torch

from text3d_fast import native, nn, ops, use_backend
from text3d_fast.ops import MLPSpec
from text3d_fast.reference.mlp import ACTIVATIONS

SPECS = [
    MLPSpec(32, 4, 64, 1), MLPSpec(3, 1, 16, 2, "silu"), MLPSpec(5, 7, 33, 3, "softplus", "sigmoid"),
    MLPSpec(1, 1, 1, 1, "tanh", "exp"), MLPSpec(17, 16, 128, 2, bias=False), MLPSpec(8, 3, 24, 4, "silu", "tanh"),
    MLPSpec(130, 5, 12, 1, "none", "softplus", bias=False),
]


def name(spec):
    return "-".join(map(str, dataclasses.astuple(spec)[:-1]))


def inputs(spec, count, generator, dtype=torch.float32, device="cpu"):
    """x and weights that keep activations at order 1."""
    weights = torch.randn(spec.num_params, generator=generator, dtype=torch.float64, device=device)
    begin = 0
    for out, into in spec.layer_shapes:
        weights[begin : begin + out * into] /= into**0.5
        begin += out * (into + spec.bias)
    x = torch.randn(count, spec.inputs, generator=generator, dtype=torch.float64, device=device)
    return x.float().to(dtype), weights.float().to(dtype)


def derivatives(x, weights, spec, cotangents):
    """y, first-order gradients, and the gradients of those along cotangents of both, and of each alone."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    grad_y, toward_x, toward_weights = (c.clone().requires_grad_() for c in cotangents)
    y = ops.mlp(x, weights, spec)
    first = torch.autograd.grad(y, (x, weights), grad_y, create_graph=True)
    leaves = (grad_y, x, weights)
    rest = {"retain_graph": True, "materialize_grads": True}
    both = torch.autograd.grad(first, leaves, (toward_x, toward_weights), **rest)
    by_x = torch.autograd.grad(first[0], leaves, toward_x, **rest)
    by_weights = torch.autograd.grad(first[1], leaves, toward_weights, **rest)
    return y, *first, *both, *by_x, *by_weights


@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_matches_reference(spec, count, device, generator, poisoned_empty):
    x, weights = inputs(spec, count, generator, device=device)
    cotangents = [torch.randn(s, generator=generator, device=device)
                  for s in ((count, spec.outputs), x.shape, weights.shape)]
    got = derivatives(x, weights, spec, cotangents)
    with use_backend("reference"):
        want = derivatives(x.double(), weights.double(), spec, [c.double() for c in cotangents])
    for result, expected in zip(got, want):
        # float32 sums of up to 130 products of order 1 in each layer, three times over: 1e-5 of the largest
        scale = float(expected.detach().abs().max().clamp(min=1))
        torch.testing.assert_close(result / scale, expected.float() / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, device):
    """Values, slopes and curvatures to both sides, far and near, through a network that passes its input on."""
    spec = MLPSpec(1, 1, 1, 1, activation, bias=False)
    x = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-60.0, -1e-3, 1e-3, 60.0])]).to(device)[:, None]
    results = []
    for backend, dtype in ((None, torch.float32), ("reference", torch.float64)):
        with use_backend(backend):
            leaf = x.to(dtype).requires_grad_()
            y = ops.mlp(leaf, torch.ones(2, dtype=dtype, device=device), spec)
            (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), leaf) if slope.requires_grad else (torch.zeros_like(x),)
            results.append([t.detach() for t in (y, slope, bend)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=1e-6)


def test_only_what_is_wanted(device, generator, poisoned_empty):
    spec = MLPSpec(9, 2, 16, 2, "silu")
    x, weights = inputs(spec, 70, generator, device=device)
    full = derivatives(x, weights, spec, [torch.ones(70, 2, device=device), x, weights])
    for wanted in (0, 1):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weights))]
        y = ops.mlp(*leaves, spec)
        (gradient,) = torch.autograd.grad(y, leaves[wanted], torch.ones_like(y))
        torch.testing.assert_close(gradient, full[1 + wanted])


@pytest.mark.skipif(native.emulated(), reason="threads of a CPU")
def test_weights_do_not_depend_on_threads(generator):
    spec = MLPSpec(32, 4, 64)
    x, weights = inputs(spec, 5000, torch.Generator().manual_seed(0))
    weights.requires_grad_()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(torch.autograd.grad(ops.mlp(x, weights, spec).square().sum(), weights)[0])
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("spec", [MLPSpec(2, 2, 3, 2, "silu"), MLPSpec(3, 1, 4, 1, "softplus", "sigmoid", bias=False),
                                  MLPSpec(2, 3, 4, 1, "tanh", "exp")], ids=name)
def test_reference_gradcheck(spec):
    x, weights = inputs(spec, 3, torch.Generator().manual_seed(2), torch.float64)
    leaves = (x.requires_grad_(), weights.requires_grad_())
    with use_backend("reference"):
        torch.autograd.gradcheck(lambda *t: ops.mlp(*t, spec), leaves)
        torch.autograd.gradgradcheck(lambda *t: ops.mlp(*t, spec), leaves)


def test_shapes_views_and_nothing(device, generator):
    spec = MLPSpec(6, 3, 16)
    x, weights = inputs(spec, 24, generator, device=device)
    flat = ops.mlp(x, weights, spec)
    torch.testing.assert_close(ops.mlp(x.view(2, 3, 4, 6), weights, spec), flat.view(2, 3, 4, 3))
    torch.testing.assert_close(ops.mlp(x.t().contiguous().t(), weights, spec), flat)
    odd = torch.cat([weights.new_zeros(1), weights])[1:]  # a storage offset of 4 bytes
    torch.testing.assert_close(ops.mlp(x, odd, spec), flat)
    empty, leaf = x[:0].clone().requires_grad_(), weights.clone().requires_grad_()
    y = ops.mlp(empty, leaf, spec)
    assert y.shape == (0, 3)
    grads = torch.autograd.grad(y.sum(), (empty, leaf))
    assert grads[0].shape == (0, 6) and grads[1].eq(0).all()


def test_module(device, generator):
    """Equal to a chain of torch.nn.Linear with the same weights, in whose range they start."""
    spec = MLPSpec(10, 4, 32, 2)
    module = nn.MLP(spec, generator=generator, device=device)
    linears = []
    for weight, bias in module.layers():
        linears += [torch.nn.Linear(weight.shape[1], weight.shape[0], device=device), torch.nn.ReLU()]
        linears[-2].weight.data.copy_(weight), linears[-2].bias.data.copy_(bias)
        assert weight.abs().max() <= weight.shape[1] ** -0.5 and weight.abs().max() > 0.9 * weight.shape[1] ** -0.5
    x = torch.randn(50, 10, generator=generator, device=device)
    torch.testing.assert_close(module(x), torch.nn.Sequential(*linears[:-1])(x), rtol=1e-5, atol=1e-5)
    again = nn.MLP(inputs=10, outputs=4, width=32, hidden_layers=2, generator=generator.manual_seed(0), device=device)
    assert torch.equal(again.weights, nn.MLP(spec, generator=generator.manual_seed(0), device=device).weights)


def test_opcheck(device, generator):
    spec = MLPSpec(5, 3, 16, 2, "silu")
    x, weights = inputs(spec, 9, generator, device=device)
    leaves = x.requires_grad_(), weights.requires_grad_()
    torch.library.opcheck(torch.ops.text3d.mlp.default, (*leaves, spec.key, torch.float32, "native"))
    grad_y = torch.randn(9, 3, generator=generator, device=device).requires_grad_()
    for needs in itertools.product((False, True), repeat=2):
        arguments = (grad_y, *leaves, spec.key, torch.float32, *needs, "native")
        torch.library.opcheck(torch.ops.text3d.mlp_backward.default, arguments)


def test_compiles_whole(device, generator):
    spec = MLPSpec(5, 3, 16)
    x, weights = inputs(spec, 40, generator, device=device)
    weights.requires_grad_()

    def loss(weights):
        return ops.mlp(x, weights.tanh(), spec).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(weights), weights)
    torch.testing.assert_close(torch.autograd.grad(compiled(weights), weights), expected)


def test_third_order_is_refused(generator):
    spec = MLPSpec(2, 1, 4, 1, "silu")
    x, weights = inputs(spec, 3, torch.Generator().manual_seed(0))
    x.requires_grad_()
    (first,) = torch.autograd.grad(ops.mlp(x, weights, spec).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="higher order"):
        second.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS[:3], ids=name)
def test_rounded_products(spec, dtype, device, generator, poisoned_empty):
    """Factors of 11 or 8 bits, sums of float32: the error of a layer is about that of one factor, three times over."""
    x, weights = inputs(spec, 40, generator, device=device)
    grad_y = torch.randn(40, spec.outputs, generator=generator, device=device)
    results = []
    for kind in (dtype, None):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        y = ops.mlp(*leaves, spec, compute_dtype=kind)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad_y)])
    bits = 2.0 ** (-11 if dtype == torch.float16 else -8)
    for got, want in zip(*results):
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        # one ReLU in a thousand changes sides, and passes a whole gradient or none
        assert error < 20 * bits


def test_errors_name_the_argument():
    spec = MLPSpec(5, 3)
    x, weights = inputs(spec, 4, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 5\], got \[4, 4\]"):
        ops.mlp(x[:, :4], weights, spec)
    with pytest.raises(ValueError, match=rf"weights: expected shape \[{spec.num_params}\]"):
        ops.mlp(x, weights[:-1], spec)
    with pytest.raises(TypeError, match="weights: expected torch.float32, got torch.float64"):
        ops.mlp(x, weights.double(), spec)
    with pytest.raises(TypeError, match="spec: expected a MLPSpec, got 3"):
        ops.mlp(x, weights, 3)
    for field, value in {"width": 129, "inputs": 0, "hidden_layers": 1.0, "activation": "gelu"}.items():
        with pytest.raises(ValueError, match=f"{field}: expected"):
            dataclasses.replace(spec, **{field: value})
    assert MLPSpec.parse(spec.key) == spec
