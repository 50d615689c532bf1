"""The choice of a backend: once a call, kept for its backward pass, a thread's own."""

import threading

import pytest
import torch
from cases import CASES

from text3d_fast import backends, native, ops, use_backend

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native.reason_against("cpu") is not None, reason="not built")


def in_thread(function):
    """What function() returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture
def served(monkeypatch):
    """Names of the native entry points, as they are called."""
    names, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *fields: names.append(name) or call(name, *fields))
    return names


@needs_native
def test_default_order(monkeypatch):
    assert backends.choose("composite", CPU) == "native"
    with monkeypatch.context() as patch:
        patch.setattr(native, "reason_against", lambda device_type: "not built")
        assert backends.choose("composite", CPU) == "reference"
        patch.setattr(backends, "_warned", set())
        patch.setitem(backends._has_triton_twin, "rasterize", False)  # where Triton is installed it would serve
        with pytest.warns(backends.BackendWarning, match="rasterize runs as its slow torch reference: not built"):
            assert backends.choose("rasterize", torch.device("cuda")) == "reference"
        assert backends.choose("rasterize", torch.device("cuda")) == "reference"  # said once


def test_what_cannot_serve_says_why():
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot serve .* on cpu: "):
        backends.choose("marching_tets", CPU)
    with pytest.raises(ValueError, match="backend: expected one of native, triton, reference or None, got 'cuda'"):
        use_backend("cuda")


def test_with_restores():
    before = backends.requested()
    with use_backend("reference"):
        with use_backend("native"):
            assert backends.requested() == "native"
        assert backends.requested() == "reference"
    assert backends.requested() == before


def test_threads_do_not_see_each_other():
    with use_backend("reference"):
        assert in_thread(backends.requested) is None
        in_thread(lambda: use_backend("native"))
        assert backends.requested() == "reference"


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_forward_decides_for_backward(name, generator, device, served):
    """Round the forward alone, in either direction; the backward pass in another thread too."""
    function, leaves = CASES[name](device, generator)
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    served.clear()
    with use_backend("reference"):
        value = function(*tracked)
    torch.autograd.grad(value.sum(), tracked, retain_graph=True)
    in_thread(lambda: torch.autograd.grad(value.sum(), tracked))
    assert not served
    value = function(*tracked)
    assert served
    served.clear()
    with use_backend("reference"):
        torch.autograd.grad(value.sum(), tracked, retain_graph=True)
        assert served
        served.clear()
        in_thread(lambda: torch.autograd.grad(value.sum(), tracked))
    assert served


@needs_native
def test_layers_of_one_peeler_come_from_one_backend(served):
    pos = torch.tensor([[[-1.0, -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]]])
    peeler = ops.DepthPeeler(pos, torch.tensor([[0, 1, 2]], dtype=torch.int32), (4, 4))
    with use_backend("reference"), peeler:
        peeler.rasterize_next_layer()
    assert served


@needs_native
def test_compiled_code_follows_the_request(device, generator, served):
    function, leaves = CASES["hash_grid"](device, generator)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    expected = function(*leaves)
    served.clear()
    torch.testing.assert_close(compiled(*leaves), expected)
    assert served
    served.clear()
    with use_backend("reference"):
        torch.testing.assert_close(compiled(*leaves), expected)
    assert not served
    torch.testing.assert_close(compiled(*leaves), expected)
    assert served
