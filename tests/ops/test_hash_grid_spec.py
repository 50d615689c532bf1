"""HashGridSpec: sizes, scales and index rules of the two dialects."""

import math

import numpy as np
import pytest
import torch

from text3d_fast.ops import HashGridSpec


def test_the_published_sizes():
    # 16 levels, F=2, T=19, 16 -> 2048: what tiny-cuda-nn and torch-ngp allocate
    assert HashGridSpec.with_max_resolution(2048).num_params == 12_196_240
    assert HashGridSpec.with_max_resolution(2048, dialect="ngp").num_params == 2 * 6_119_864


@pytest.mark.parametrize("growth, scales", [(1.5, (15, 23, 35, 53, 80)), (2.0, (15, 31, 63, 127, 255)),
                                            (1.25, (15, 19, 24, 30.25, 38.0625))])
def test_integral_scales_stay_integral(growth, scales):
    spec = HashGridSpec(per_level_scale=growth, levels=5)
    assert spec.level_scales == scales
    assert spec.level_resolutions == tuple(math.ceil(s) + 1 for s in scales)


def test_levels_are_hashed_only_when_they_do_not_fit():
    spec = HashGridSpec(levels=4, log2_table_size=14, base_resolution=8)
    assert spec.level_resolutions == (8, 16, 32, 64)
    assert spec.level_offsets == (0, 512, 512 + 4096, 512 + 4096 + 16384, 512 + 4096 + 2 * 16384)
    assert spec.level_hashed == (False, False, True, True)
    dense = HashGridSpec(levels=4, log2_table_size=14, base_resolution=8, kind="dense")
    assert dense.level_offsets[-1] == 8**3 + 16**3 + 32**3 + 64**3 and not any(dense.level_hashed)
    tiled = HashGridSpec(levels=3, base_resolution=8, kind="tiled", dim=2)
    assert tiled.level_offsets == (0, 64, 128, 192) and tiled.level_strides[1:] == ((1, 16), (1, 32))
    assert tiled.output_dim == 6 and tiled.num_params == 384
    fine = HashGridSpec(levels=3, base_resolution=4, per_level_scale=16, kind="tiled", dim=4)
    assert fine.level_resolutions == (4, 64, 1024) and fine.level_strides[1:] == ((1, 64, 64**2, 64**3), (0,) * 4)
    assert HashGridSpec(levels=1, base_resolution=255, dim=4).level_hashed == (True,)


@pytest.mark.parametrize("spec", [HashGridSpec(), HashGridSpec(dim=2, features=8, per_level_scale=1.3819, kind="dense"),
                                  HashGridSpec(dialect="ngp", align_corners=True, interpolation="smoothstep")])
def test_key_round_trip(spec):
    assert HashGridSpec.parse(spec.key) == spec and hash(spec) == hash(HashGridSpec.parse(spec.key))


def test_other_scalars_are_taken_as_python_s():
    """numpy's and torch's numbers; align_corners=1, whose key once was read as False."""
    plain = HashGridSpec(levels=1, features=1, base_resolution=300, dialect="ngp", kind="dense", align_corners=True)
    for true in (1, np.True_, np.int64(1)):
        other = HashGridSpec(levels=1, features=1, base_resolution=300, dialect="ngp", kind="dense", align_corners=true)
        assert other == plain and other.key == plain.key and other.num_params == plain.num_params == 300**3
    growth = np.exp2(np.log2(2048 / 16) / 15)
    spec = HashGridSpec(dim=np.int64(3), levels=np.int32(16), base_resolution=torch.tensor(16), kind=np.str_("hash"),
                        per_level_scale=growth)
    assert spec == HashGridSpec(per_level_scale=float(growth)) == HashGridSpec.parse(spec.key)
    assert type(spec.dim) is int and type(spec.per_level_scale) is float and type(spec.kind) is str


@pytest.mark.parametrize("fields, message", [
    (dict(dim=5), "dim: expected one of 2, 3, 4, got 5"),
    (dict(features=True), "features: expected an integer, got True"),
    (dict(features=3), "features: expected one of 1, 2, 4, 8, got 3"),
    (dict(kind="octree"), "kind: expected one of hash"),
    (dict(interpolation="cubic"), "interpolation: expected one of linear"),
    (dict(dialect="x"), "dialect: expected one of tcnn, ngp"),
    (dict(levels=0), "levels: expected an integer from 1 to 32, got 0"),
    (dict(levels=2.0), "levels: expected an integer, got 2.0"),
    (dict(levels=9, per_level_scale=16.0), r"levels: level 7 would have 4.29497e\+09 vertices a side; at most 2\^31"),
    (dict(levels=32, per_level_scale=16, base_resolution=1024, kind="tiled", dim=2), "levels: level 6 would have"),
    (dict(per_level_scale="2"*400), "per_level_scale"),
    (dict(align_corners="1", dialect="ngp"), "align_corners: expected True or False, got '1'"),
    (dict(kind=3), "kind: expected a string, got 3"),
    (dict(log2_table_size=40), "log2_table_size: expected an integer"),
    (dict(per_level_scale=0.5), "per_level_scale: expected 1 to 16, got 0.5"),
    (dict(align_corners=True), "align_corners: expected False"),
    (dict(kind="dense"), "needs .* entries"),
])
def test_errors_name_the_argument(fields, message):
    with pytest.raises(ValueError, match=message):
        HashGridSpec(**fields)
    with pytest.raises(ValueError, match="max_resolution: expected at least"):
        HashGridSpec.with_max_resolution(8)
