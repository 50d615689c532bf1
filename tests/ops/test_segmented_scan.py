"""ops.segmented_scan against its reference and against scans of each segment on its own."""

import itertools
import math

import pytest
import torch

from text3d_fast import backends, native, ops, use_backend

# segments' lengths: around the 16, 32 and 64 that kernels take at once, empty ones, none
CASES = {"odd": (3, 0, 1, 33, 0, 65, 32, 2), "one": (1,), "empty": (0, 0), "none": (), "long": (700,)}
KINDS = list(itertools.product(("sum", "product"), (False, True), (False, True)))  # op, exclusive, reverse


@pytest.fixture(params=[None, "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("runs_triton")
    with use_backend(request.param):
        yield request.param


def make(lengths, generator, device, zeros=0.0):
    """values around 1 with either sign, so that products stay of order 1; offsets."""
    count = sum(lengths)
    values = torch.randn(count, generator=generator, device=device).mul(0.1).exp()
    values *= torch.randint(0, 2, (count,), generator=generator, device=device) * 2 - 1
    values[torch.rand(count, generator=generator, device=device) < zeros] = 0
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return values, offsets


def row_by_row(values, lengths, op, exclusive, reverse):
    """The definition, in torch's own scans."""
    out = []
    for row in values.split(list(lengths)) if len(lengths) else ():
        row = row.flip(0) if reverse else row
        if exclusive and len(row):
            row = torch.cat([torch.full_like(row[:1], float(op == "product")), row[:-1]])
        scanned = row.cumsum(0) if op == "sum" else row.cumprod(0)
        out.append(scanned.flip(0) if reverse else scanned)
    return torch.cat(out) if out else values


@pytest.mark.parametrize("zeros", [0.0, 0.1])
@pytest.mark.parametrize("op, exclusive, reverse", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_is_the_scan_of_each_segment(case, op, exclusive, reverse, zeros, backend, device, generator, poisoned_empty):
    lengths = CASES[case]
    if backend == "triton" and device.type == "cpu" and case == "long":
        lengths = (70,)
    values, offsets = make(lengths, generator, device, zeros)
    cotangent = torch.randn(values.shape, generator=generator, device=device)
    values.requires_grad_()
    got = ops.segmented_scan(values, offsets, op, exclusive, reverse)
    (gradient,) = torch.autograd.grad(got, values, cotangent)
    exact = values.detach().double().requires_grad_()
    want = row_by_row(exact, lengths, op, exclusive, reverse)
    (wanted,) = torch.autograd.grad(want, exact, cotangent.double())
    with use_backend("reference"):
        own = ops.segmented_scan(exact, offsets, op, exclusive, reverse)
        (own_gradient,) = torch.autograd.grad(own, exact, cotangent.double())
    torch.testing.assert_close(own, want)
    torch.testing.assert_close(own_gradient, wanted)
    # fp32 sums of 700 terms of order 1, products of 700 roundings
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0)
    torch.testing.assert_close(got, want.float(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(gradient, wanted.float(), rtol=2e-4, atol=2e-4 * scale)


@pytest.mark.parametrize("op", ["sum", "product"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_segment_keeps_what_it_has(op, value, backend, device, generator):
    """The others are the same to the bit, and so are their gradients."""
    lengths = CASES["odd"]
    values, offsets = make(lengths, generator, device)
    inside = torch.arange(len(values), device=device).sub(4).abs() > 0
    results = []
    for wrong in (values, torch.where(inside, values, value)):
        leaf = wrong.clone().requires_grad_()
        out = ops.segmented_scan(leaf, offsets, op)
        results.append((out.detach(), torch.autograd.grad(out.sum(), leaf)[0]))
    others = torch.cat([torch.full((n,), i != 3) for i, n in enumerate(lengths)]).to(device)
    for a, b in zip(*results):
        assert torch.equal(a[others], b[others])
    assert not torch.equal(results[0][0][~others], results[1][0][~others])


def test_zero_times_infinity(backend, device):
    """As the factors say, one after the other: no quotient is taken anywhere."""
    values = torch.tensor([0.0, 3.0, math.inf, 2.0], device=device)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    assert ops.segmented_scan(values, offsets, "product").tolist() == [0, 0, math.inf, math.inf]
    leaf = torch.tensor([2.0, 0.0, 3.0, 0.0], device=device, requires_grad=True)
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    ops.segmented_scan(leaf, offsets, "product").sum().backward()
    assert leaf.grad.tolist() == [1, 8, 0, 0]  # 1 + 0 + ..., 2 (1 + 3 + 0), 2 0 (1 + 0), 2 0 3


def test_beyond_the_last_offset_is_nothing(backend, device, generator, poisoned_empty):
    values, offsets = make(CASES["odd"], generator, device)
    longer = torch.cat([values, values.new_full((11,), math.nan)])
    for op in ("sum", "product"):
        leaf = longer.clone().requires_grad_()
        out = ops.segmented_scan(leaf, offsets, op, True)
        assert torch.equal(out[: len(values)], ops.segmented_scan(values, offsets, op, True))
        assert out[len(values) :].eq(0).all()
        (gradient,) = torch.autograd.grad(out[: len(values)].square().sum(), leaf)
        assert gradient.isfinite().all() and gradient[len(values) :].eq(0).all()


def test_views_of_odd_offsets(device, generator):
    values, offsets = make(CASES["odd"], generator, device)
    table = torch.stack([torch.zeros_like(values), values], 1)
    torch.testing.assert_close(ops.segmented_scan(table[:, 1], offsets), ops.segmented_scan(values, offsets))


@pytest.mark.parametrize("op", ["sum", "product"])
def test_reference_gradcheck(op, generator, device):
    values, offsets = make((3, 0, 4), generator, device, 0.3)
    leaf = values.double().requires_grad_()
    with use_backend("reference"):
        run = lambda x: ops.segmented_scan(x, offsets, op, True)
        assert torch.autograd.gradcheck(run, leaf) and torch.autograd.gradgradcheck(run, leaf)


def test_second_order(device, generator):
    """A sum has any; a product's is refused in words."""
    values, offsets = make(CASES["odd"], generator, device)
    leaf = values.clone().requires_grad_()
    gradients = []
    for backend in (None, "reference"):
        with use_backend(backend):
            (first,) = torch.autograd.grad(ops.segmented_scan(leaf, offsets).pow(3).sum(), leaf, create_graph=True)
            gradients.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))
    (first,) = torch.autograd.grad(ops.segmented_scan(leaf, offsets, "product").sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="segmented_scan_backward: derivatives of a higher order"):
        first.sum().backward()


@pytest.mark.parametrize("op", ["sum", "product"])
def test_opcheck_compile_and_autocast(op, device, generator):
    values, offsets = make(CASES["odd"], generator, device)
    leaf = values.clone().requires_grad_()
    backend = backends.choose("segmented_scan", device)
    torch.library.opcheck(torch.ops.text3d.segmented_scan.default, (leaf, offsets, op, True, False, backend))
    run = lambda x: ops.segmented_scan(x, offsets, op, True).square().sum()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf), torch.autograd.grad(run(leaf), leaf))
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.segmented_scan(values.bfloat16(), offsets, op).dtype == torch.float32


@pytest.mark.parametrize("change, error, message", [
    ({"op": "max"}, ValueError, "op: expected 'sum' or 'product', got 'max'"),
    ({"values": torch.zeros(3, 1)}, ValueError, r"values: expected shape \[values\], got \[3, 1\]"),
    ({"values": torch.zeros(3, dtype=torch.float64)}, TypeError, "values: expected torch.float32, got torch.float64"),
    ({"offsets": torch.tensor([0, 3])}, TypeError, "offsets: expected torch.int32, got torch.int64"),
    ({"offsets": torch.zeros(0, dtype=torch.int32)}, ValueError, "offsets: expected shape .*, at least one entry"),
    ({"offsets": torch.tensor([0, 2, 1], dtype=torch.int32)}, ValueError, "offsets: expected to rise from 0"),
    ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "offsets: expected to rise .* number of values"),
])
def test_errors_name_the_argument(change, error, message):
    if native.emulated() and "rise" in message:
        pytest.skip("a GPU's kernels do not raise for values")
    arguments = {"values": torch.zeros(3), "offsets": torch.tensor([0, 3], dtype=torch.int32)}
    with pytest.raises(error, match=message):
        ops.segmented_scan(**(arguments | change))
