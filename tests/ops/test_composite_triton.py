"""The Triton twin of ops.composite on the cases of test_composite.py: in the interpreter, or on a GPU."""

import pytest
import test_composite as cases

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("early_stop", [0.0, 1e-2])
@pytest.mark.parametrize("case", cases.CASES[:4])
def test_matches_reference(case, early_stop, device, generator, poisoned_empty):
    cases.test_matches_reference(case, early_stop, device, generator, poisoned_empty)


@pytest.mark.parametrize("wanted", [0, 2, 4])
def test_one_cotangent_at_a_time(wanted, device, generator, poisoned_empty):
    cases.test_one_cotangent_at_a_time(wanted, device, generator, poisoned_empty)


def test_many_channels(device, generator, poisoned_empty):
    cases.test_matches_reference((3, 20, 70), 0.0, device, generator, poisoned_empty)


test_padding = cases.test_padding_beyond_the_last_offset_weighs_nothing
test_thin_and_thick_samples = cases.test_thin_and_thick_samples
test_nan_stays_on_its_ray = cases.test_nan_stays_on_its_ray
