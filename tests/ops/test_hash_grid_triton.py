"""The Triton twin of hash_grid in Triton's interpreter, against the reference. Runs in a process of its own:
TRITON_INTERPRET must be set before Triton is imported."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from test_hash_grid import SPECS, assert_close, derivatives, inputs, name
from text3d_fast import ops, use_backend

generator = torch.Generator().manual_seed(0)
for spec in (SPECS[1], SPECS[11], SPECS[17], SPECS[22], SPECS[25]):
    x, params = inputs(spec, 130, generator, low=-0.1, high=1.1)
    shapes = (130, spec.output_dim), x.shape, params.shape
    cotangents = [torch.randn(s, generator=generator) for s in shapes]
    outer = torch.randn(130, spec.output_dim, spec.dim, generator=generator)

    def run(x, params, cotangents, outer, **options):
        results = derivatives(x, params, spec, cotangents, active_levels=min(3, spec.levels), **options)
        leaves = x.clone().requires_grad_(), params.clone().requires_grad_()
        outputs = ops.hash_grid_grad(*leaves, spec, spec.levels - 1, **options)
        return *results, *outputs, *torch.autograd.grad(outputs, leaves, (cotangents[0], outer))

    with use_backend("reference"):
        table = params.half() if spec is SPECS[1] else params
        expected = run(x.double(), table.double(), [c.double() for c in cotangents], outer.double())
    with use_backend("triton"):
        got = run(x, params, cotangents, outer, compute_dtype=torch.float16 if spec is SPECS[1] else None)
        assert ops.hash_grid(x[:0], params, spec).shape == (0, spec.output_dim)
    assert_close(got, expected, name(spec))
    print("same", name(spec))
"""


def test_interpreted_twin_matches_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 5
