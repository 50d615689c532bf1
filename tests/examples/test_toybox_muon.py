"""Muon against a singular value decomposition, and on a problem with a known answer."""

import pytest
import torch

from examples.train_toybox.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (8, 8)])
def test_singular_values_become_one_roughly(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalized(matrix)
    # after five rounds the quintic leaves singular values of at least 0.01 |matrix| between 0.68 and 1.14
    values = torch.einsum("mi,mn,in->i", u, result, v)
    keep = s > 0.01 * s.norm()
    assert bool(((values > 0.65) & (values < 1.2))[keep].all())
    rest = result - u @ torch.diag(values) @ v
    assert float(rest.abs().max()) < 1e-4  # the singular vectors stay: only rounding


def test_steps_have_the_size_of_adams_and_lead_to_the_minimum():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 3, 2, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(6, 3, 2))
    optimizer = Muon([weight], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        before = weight.detach().clone()
        weight.grad = weight.detach() - target
        optimizer.step()
        if step == 0:  # 0.2 lr, for an orthogonal [6, 6] matrix of scale 0.2 sqrt(6); the quintic is off by a fifth
            assert 0.013 < float((weight.detach() - before).square().mean().sqrt()) < 0.025
    torch.testing.assert_close(weight.detach(), target, atol=0.05, rtol=0)  # the last steps are that long


def test_weight_decay_alone_shrinks():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))
