"""What must hold of every op: opcheck with meta tensors, outputs that are all written, odd storage offsets."""

import pytest
import torch
from cases import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from text3d_fast import native


class Calls(TorchDispatchMode):
    """The registered ops that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "text3d":
            self.made.append((function, args))
        return function(*args, **(kwargs or {}))


def results(function, leaves):
    tracked = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*tracked)
    return value.detach(), *torch.autograd.grad(value.square().sum(), tracked)


@pytest.fixture(params=CASES)
def case(request, device, generator):
    return CASES[request.param](device, generator)


def test_opcheck(case):
    """Of all that a value and its gradient call, with what they call it with."""
    with Calls() as calls:
        results(*case)
    assert len({function for function, _ in calls.made}) >= 2
    for function, args in calls.made:
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_autograd_registration",
                                                          "test_faketensor"))


def test_every_output_is_written(case, poisoned_empty):
    for result in results(*case):
        assert result.isfinite().all()


def test_odd_storage_offsets(case):
    function, leaves = case
    shifted = []
    for leaf in leaves:
        storage = leaf.new_zeros(leaf.numel() + 1)
        shifted.append(storage[1:].view(leaf.shape).copy_(leaf))
        assert shifted[-1].data_ptr() % native.ALIGNMENT
    for got, expected in zip(results(function, shifted), results(function, leaves)):
        torch.testing.assert_close(got, expected)


def test_twice_the_same(case):
    """Sums have a fixed order on a CPU, and where deterministic algorithms are asked for."""
    function, leaves = case
    if native.runs_cuda_source(leaves[0].device):
        pytest.skip("atomics; each op says what it does under torch.use_deterministic_algorithms")
    for got, again in zip(results(function, leaves), results(function, leaves)):
        assert torch.equal(got, again)
