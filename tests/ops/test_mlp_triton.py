"""The Triton twin of ops.mlp on the cases of test_mlp.py, and what is made of it: in the interpreter, or on a GPU."""

import pytest
import test_hash_mlp as on_a_grid
import test_mlp as cases
import test_render_field as rendering
import torch

from text3d_fast import use_backend

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("spec", [*cases.SPECS[1:4], *cases.SPECS[5:]], ids=cases.name)
def test_matches_reference(spec, device, generator, poisoned_empty):
    cases.test_matches_reference(spec, 33, device, generator, poisoned_empty)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_activations(activation, device):
    cases.test_activations(activation, device)


@pytest.mark.parametrize("dtype", [torch.float16])  # the interpreter has no bfloat16
def test_rounded_products(dtype, device, generator, poisoned_empty):
    cases.test_rounded_products(cases.SPECS[1], dtype, device, generator, poisoned_empty)


test_only_what_is_wanted = cases.test_only_what_is_wanted
test_shapes_views_and_nothing = cases.test_shapes_views_and_nothing


def test_hash_mlp_is_the_composition(device, generator, poisoned_empty):
    on_a_grid.test_is_the_composition(on_a_grid.CASES[0], None, device, generator, poisoned_empty)


@pytest.mark.parametrize("mode", ["albedo", "lambertian"])
def test_render_field(mode, device, generator, poisoned_empty):
    """By parts, with second-order derivatives through the twins of hash_grid and mlp."""
    spec = rendering.FIELD
    inputs = rendering.make_inputs(spec, 5, generator, device, longest=9)
    lights = None if mode == "albedo" else rendering.make_lights(1, generator, device)
    got = rendering.render(*inputs, spec, mode=mode, lights=lights)
    with use_backend("reference"):
        want = rendering.render(*inputs, spec, dtype=torch.float64, mode=mode, lights=lights)
    rendering.assert_same(got, want)
