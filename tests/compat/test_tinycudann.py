"""The tinycudann drop-in: encodings by their formulae, layout and initial values of params, networks, second order.

The recorded values of the original's hash grid are in tests/ops/test_hash_grid.py; here a module reads them too.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from text3d_fast import ops, use_backend
from text3d_fast.compat import tinycudann as tcnn
from text3d_fast.compat.tinycudann.network import ACTIVATIONS
from text3d_fast.compat.tinycudann.pcg32 import PCG32

FUSED = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_neurons": 16,
         "n_hidden_layers": 2}
SMALL = {"otype": "HashGrid", "n_levels": 3, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}


def encode(x, **config):
    x = torch.as_tensor(x, dtype=torch.float32).reshape(len(x), -1)
    return tcnn.Encoding(x.shape[1], config, dtype=torch.float32)(x)


def test_the_generator_s_published_numbers():
    """From the demonstration program of the PCG library, whose stream is 54."""
    random = PCG32(42, 54)
    assert [hex(n) for n in random.bits(4)] == ["0xa15c02b7", "0x7b47f409", "0xba1d3330", "0x83d2f293"]
    assert random.bits(0).size == 0 and [hex(n) for n in random.bits(2)] == ["0xbfa4784b", "0xcbed606e"]
    parts, whole = PCG32(1337), PCG32(1337)
    assert np.array_equal(np.concatenate([parts.floats(5), parts.floats(20)]), whole.floats(25))


def test_initial_values_are_the_original_s():
    """A network's weights in the order of the stream, within Xavier's bounds; a grid's four by thread."""
    net = tcnn.Network(3, 3, FUSED, seed=7)
    assert net.params.shape == (3 * 16 * 16,) and net.params.dtype == torch.float32
    stream = PCG32(7).floats(16 * 16)
    bound = math.sqrt(6 / 32)
    torch.testing.assert_close(net.params[:256].detach().cpu(), torch.from_numpy(stream * 2 * bound - bound))
    grid = tcnn.Encoding(2, {**SMALL, "n_levels": 1, "n_features_per_level": 1, "base_resolution": 30}, seed=7)
    assert len(grid.params) == 256
    stream = PCG32(7).floats(512)
    expected = [stream[4 * (i % 128) + i // 128] * 2e-4 - 1e-4 for i in (0, 1, 127, 128, 255)]
    assert grid.params[[0, 1, 127, 128, 255]].tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.equal(tcnn.Network(3, 3, FUSED, seed=7).params, net.params)
    assert not torch.equal(tcnn.Network(3, 3, FUSED, seed=8).params, net.params)
    sine = tcnn.Network(3, 1, {**FUSED, "activation": "Sine"}).params.detach().abs()
    assert 1.7 < float(sine[:256].max()) <= 30 / 16 and float(sine[256:].max()) <= math.sqrt(6 / 16)


def test_params_are_the_network_then_the_grid(device):
    """Row by row, inputs and outputs padded to 16: y by hand."""
    model = tcnn.NetworkWithInputEncoding(3, 5, {"otype": "Identity"}, {**FUSED, "n_neurons": 32}).to(device)
    assert model.params.numel() == 32 * 16 + 32 * 32 + 16 * 32
    first, second, last = (w.view(shape) for w, shape in zip(
        model.params.detach().split([32 * 16, 32 * 32, 16 * 32]), ((32, 16), (32, 32), (16, 32))))
    x = torch.rand(7, 3, device=device)
    padded = torch.cat((x, torch.ones(7, 13, device=device)), 1)  # with ones
    expected = ((padded @ first.T).relu() @ second.T).relu() @ last[:5].T
    y = model(x)
    assert y.dtype == model.dtype == torch.float16 and model.loss_scale == 128
    torch.testing.assert_close(y, expected.half())
    (grad,) = torch.autograd.grad(y.float().sum(), model.params)
    assert grad[-11 * 32 :].eq(0).all() and grad[: -11 * 32].ne(0).any()

    both = tcnn.NetworkWithInputEncoding(3, 5, SMALL, FUSED).to(device)
    network, grid = tcnn.Network(16, 5, FUSED).to(device), tcnn.Encoding(3, SMALL).to(device)
    assert both.params.numel() == network.params.numel() + grid.params.numel() and grid.n_output_dims == 6
    with torch.no_grad():
        both.params.copy_(torch.cat((network.params, grid.params * 1e3)))
        grid.params.mul_(1e3)
    features = torch.nn.functional.pad(grid(x).float(), (0, 10))  # grids are padded with zeros
    torch.testing.assert_close(both(x), network(features), atol=2e-3, rtol=1e-3)


def test_checkpoints_load_both_ways():
    """The state is one tensor named params; a published configuration has the original's size."""
    model = tcnn.Encoding(3, {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 19,
                              "base_resolution": 16, "per_level_scale": np.exp2(np.log2(2048 / 16) / 15)})
    assert list(model.state_dict()) == ["params"] and model.params.shape == (12_196_240,)
    recorded = tcnn.Encoding(3, {"otype": "Grid", "type": "Hash", "log2_hashmap_size": 16}, dtype=torch.float32)
    recorded.load_state_dict({"params": torch.linspace(0, 1000, 1908736)})
    y = recorded(torch.tensor([[0.10837865, 0.90696, 0.40669227], [0.5339087, 0.32577336, 0.78337693]]).to(
        recorded.params.device))
    assert y[:, 2].tolist() == pytest.approx([19.319187, 31.258121], rel=1e-6)
    small = tcnn.NetworkWithInputEncoding(3, 2, SMALL, FUSED)
    for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(other.params, small.params) and other.n_output_dims == 2


@pytest.mark.parametrize("level, resolution, offset, hashed", [(0, 4, 0, False), (1, 6, 64, False), (2, 9, 280, True)])
def test_where_a_grid_keeps_its_entries(level, resolution, offset, hashed):
    """Scale base^level - 1, half a cell aside; x first up to 2^T entries, otherwise the xor of primes times x, y, z."""
    model = tcnn.Encoding(3, SMALL, dtype=torch.float32)
    assert model.params.shape == (2 * (64 + 216 + 256),)  # levels rounded up to 8 entries, two features side by side
    with torch.no_grad():
        model.params.copy_(torch.arange(len(model.params)))
    for p in ((1, 2, 3), (3, 1, 0), (resolution - 1, 2, 1)):
        entry = sum(x * resolution**d for d, x in enumerate(p))
        if hashed:
            entry = (p[0] ^ p[1] * 2654435761 ^ p[2] * 805459861) % 2**32 % 256
        x = (torch.tensor([p]) - 0.5) / (4 * 1.5**level - 1)
        y = model(x.to(model.params.device))[0, 2 * level : 2 * level + 2]
        assert y.tolist() == pytest.approx([2 * (offset + entry), 2 * (offset + entry) + 1], abs=1e-2)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_dtypes_are_the_original_s(dtype, device):
    """Half out of encodings, unless float32 is asked for, and out of networks; params and their gradients float32; the
    gradient by x in the dtype of x. The same on either device."""
    modules = {tcnn.Encoding(3, SMALL, dtype=dtype): dtype or torch.float16, tcnn.Network(3, 2, FUSED): torch.float16,
               tcnn.NetworkWithInputEncoding(3, 2, SMALL, FUSED): torch.float16}
    for module, out in modules.items():
        assert module.dtype == out and module.loss_scale == (128 if out == torch.float16 else 1)
        module.to(device)
        for kind in (torch.float32, torch.float16):
            x = torch.rand(7, 3, device=device).to(kind).requires_grad_()
            y = module(x)
            assert y.dtype == out and y.shape == (7, module.n_output_dims) and y.device == x.device
            gradients = torch.autograd.grad(y.float().sum(), (x, module.params))
            assert [g.dtype for g in gradients] == [kind, torch.float32]


def test_frequency():
    y = encode([[0.25, 1.0]], otype="Frequency", n_frequencies=2)
    root = math.sqrt(0.5)
    assert y[0].tolist() == pytest.approx([root, root, 1, 0, 0, -1, 0, 1], abs=1e-6)


def test_triangle_wave():
    x = torch.linspace(-1, 1, 9)
    y = encode(x, otype="TriangleWave", n_frequencies=2)
    assert y[:, 0].tolist() == pytest.approx([1 - 2 * abs(v) if abs(v) <= 1 else 0 for v in x.tolist()])
    assert y[:, 1].tolist() == pytest.approx([0, -1, 0, 1, 0, -1, 0, 1, 0])  # half the period, a quarter on


def test_one_blob():
    y = encode([0.0, 0.3, 0.5, 1.0], otype="OneBlob", n_bins=4)
    assert y.sum(1).tolist() == pytest.approx([1] * 4)
    assert torch.equal(y[0], y[3])  # wraps
    assert y[2].tolist() == pytest.approx([0, 0.5, 0.5, 0], abs=1e-6)
    at = torch.tensor([0.2, 0.9], dtype=torch.float64).requires_grad_()
    kernel = tcnn.Encoding(1, {"otype": "OneBlob", "n_bins": 4}).native_tcnn_module.encoding
    torch.autograd.gradcheck(lambda x: kernel(x[:, None], None, None), at)


@pytest.mark.parametrize("degree", [1, 4, 8])
def test_spherical_harmonics_are_orthonormal(degree):
    """By quadrature exact for degree 15: Gauss-Legendre in z, uniform around it; signs by their first three."""
    z, weight = np.polynomial.legendre.leggauss(16)
    turn = np.arange(32) * 2 * np.pi / 32
    radius = np.sqrt(1 - z**2)
    directions = np.stack([radius[:, None] * np.cos(turn), radius[:, None] * np.sin(turn), z[:, None] + 0 * turn], -1)
    y = encode(directions.reshape(-1, 3) / 2 + 0.5, otype="SphericalHarmonics", degree=degree).double().cpu().numpy()
    gram = np.einsum("na,nb,n->ab", y, y, np.repeat(weight, 32) * 2 * np.pi / 32)
    np.testing.assert_allclose(gram, np.eye(degree**2), atol=2e-6)
    if degree > 1:
        point = directions.reshape(-1, 3)[77]
        constant = math.sqrt(3 / (4 * math.pi))
        np.testing.assert_allclose(y[77, :4], [0.2820948, -constant * point[1], constant * point[2],
                                               -constant * point[0]], atol=1e-6)


def test_harmonics_are_padded_in_front():
    model = tcnn.NetworkWithInputEncoding(3, 1, {"otype": "SphericalHarmonics", "degree": 3}, FUSED)
    encoding = model.native_tcnn_module.encoding
    y = encoding(torch.rand(2, 3), None, None)
    assert y.shape == (2, 16) and y[:, :7].eq(1).all() and y[0, 7] == pytest.approx(0.2820948)


def test_composite():
    """Nested encodings in their order; what precedes a grid is padded to its features; sums and products."""
    nested = [{"otype": "Identity", "n_dims_to_encode": 1, "scale": 2.0, "offset": 1.0},
              {**SMALL, "n_dims_to_encode": 3}, {"otype": "OneBlob", "n_bins": 4}]
    model = tcnn.Encoding(5, {"otype": "Composite", "nested": nested}, dtype=torch.float32)
    assert model.n_output_dims == 2 + 6 + 4
    x = torch.rand(3, 5).to(model.params.device)
    y = model(x)
    grid = tcnn.Encoding(3, SMALL, dtype=torch.float32)
    assert torch.equal(grid.params, model.params)
    torch.testing.assert_close(y[:, :2], torch.stack((2 * x[:, 0] + 1, torch.ones(3)), 1))
    torch.testing.assert_close(y[:, 2:8], grid(x[:, 1:4]))
    torch.testing.assert_close(y[:, 8:], encode(x[:, 4], otype="OneBlob", n_bins=4))
    same = [{"otype": "Identity", "n_dims_to_encode": 2, "dims_to_encode_begin": 0},
            {"otype": "Identity", "n_dims_to_encode": 2, "dims_to_encode_begin": 1}]
    for reduction, op in (("Sum", torch.add), ("Product", torch.mul)):
        z = tcnn.Encoding(3, {"otype": "Composite", "nested": same, "reduction": reduction}, dtype=torch.float32)
        torch.testing.assert_close(z(x[:, :3]), op(x[:, :2], x[:, 1:3]))
    assert tcnn.Encoding(9, {"otype": "NRC"}).n_output_dims == 36 + 20 + 1


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("kind", ["HashGrid", "DenseGrid", "TiledGrid"])
def test_grids(dims, kind):
    config = {**SMALL, "otype": kind, "n_levels": 2, "interpolation": "Smoothstep"}
    model = tcnn.Encoding(dims, config, dtype=torch.float32)
    spec = ops.HashGridSpec(dim=dims, levels=2, log2_table_size=8, base_resolution=4, per_level_scale=1.5,
                            kind=kind.removesuffix("Grid").lower(), interpolation="smoothstep")
    x = torch.rand(5, dims).to(model.params.device)
    assert torch.equal(model(x), ops.hash_grid(x, model.params, spec)) and model.n_output_dims == 4


def test_the_dense_default_ends_at_256():
    model = tcnn.Encoding(2, {"otype": "DenseGrid", "n_levels": 5})
    assert model.native_tcnn_module.encoding.spec.level_resolutions == (16, 32, 64, 128, 256)


@pytest.mark.parametrize("name", ["None", *list(ACTIVATIONS)[1:]])
def test_activations(name):
    x = np.linspace(-3, 3, 13)
    expected = {"none": x, "relu": np.maximum(x, 0), "leakyrelu": np.where(x > 0, x, 0.01 * x),
                "silu": x / (1 + np.exp(-x)), "exponential": np.exp(x), "sine": np.sin(x),
                "sigmoid": 1 / (1 + np.exp(-x)), "squareplus": (10 * x + np.sqrt(100 * x * x + 4)) / 20,
                "softplus": np.log(np.exp(10 * x) + 1) / 10, "tanh": np.tanh(x)}[name.lower()]
    net = tcnn.Network(1, 1, {"otype": "CutlassMLP", "n_hidden_layers": 0, "output_activation": name})
    with torch.no_grad():
        net.params.zero_()[0] = 1
    y = net(torch.from_numpy(x)[:, None].to(net.params.device))
    np.testing.assert_allclose(y[:, 0].detach().cpu().numpy(), expected, rtol=1e-3, atol=1e-3)
    assert (net.n_output_dims, net.params.numel()) == (1, 256)


def test_second_order_through_grid_and_network():
    """The original's own network has none: a loss of the slope by x, differentiated by params and x."""
    model = tcnn.NetworkWithInputEncoding(3, 1, {**SMALL, "interpolation": "Smoothstep"},
                                          {**FUSED, "activation": "Softplus"})
    with torch.no_grad():
        model.params[-model.native_tcnn_module.encoding.n_params :].mul_(1e3)
    x = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)).to(model.params.device).requires_grad_()

    def run():
        (slope,) = torch.autograd.grad(model(x).float().sum(), x, create_graph=True)
        return slope, *torch.autograd.grad((slope.norm(dim=1) - 1).square().sum(), (x, model.params))

    got = run()
    with use_backend("reference"):
        for a, b in zip(got, run()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))
    assert got[2][:768].ne(0).any() and got[2][768:].ne(0).any()


def test_twice_forward_once_backward_and_empty_batches():
    net = tcnn.Network(3, 3, FUSED)
    a, b = torch.rand(2, 8, 3).to(net.params.device)
    (net(a) + net(b)).float().sum().backward()
    assert net.params.grad.isfinite().all() and net.params.grad.ne(0).any()
    assert net(a[:0]).shape == (0, 3) and net(a.double()).shape == (8, 3)
    with torch.autocast(a.device.type, torch.bfloat16):
        assert torch.equal(net(a), net(a).clone()) and net(a).dtype == torch.float16


def test_what_else_clients_touch(tmp_path):
    net = tcnn.NetworkWithInputEncoding(n_input_dims=3, n_output_dims=2, encoding_config=SMALL, network_config=FUSED)
    net.jit_fusion = tcnn.supports_jit_fusion()
    assert net.jit_fusion is False
    tcnn.free_temporary_memory()
    tcnn.rtc_set_cache_dir(tmp_path)
    with pytest.raises(OSError, match="Missing RTC cache directory"):
        tcnn.rtc_set_cache_dir(tmp_path / "none")
    assert "n_output_dims=2" in repr(net) and "'n_neurons': 16" in repr(net)
    assert tcnn.modules.Module.__subclasses__() and net.native_tcnn_module.n_output_dims() == 16


@pytest.mark.parametrize("dims, config, message", [
    (3, {"otype": "Wavelet"}, "otype: expected an encoding .*, got 'Wavelet'"),
    (5, {"otype": "HashGrid"}, "dim: expected one of 2, 3, 4, got 5"),
    (3, {"otype": "HashGrid", "hash": "Rng"}, "hash: expected CoherentPrime"),
    (3, {"otype": "HashGrid", "n_features": 32, "n_levels": 4}, "n_features: expected either"),
    (3, {"otype": "HashGrid", "interpolation": "Cubic"}, "interpolation: expected one of"),
    (2, {"otype": "SphericalHarmonics"}, "SphericalHarmonics: expected 3 inputs, got 2"),
    (3, {"otype": "SphericalHarmonics", "degree": 9}, "degree: expected 1 to 8, got 9"),
    (1, {"otype": "OneBlob", "n_bins": 6}, "n_bins: expected a power of 2, got 6"),
    (3, {"otype": "Composite"}, "nested: expected a list"),
    (3, {"otype": "Composite", "nested": [{"otype": "Identity", "n_dims_to_encode": 4}]}, "nested: expected at most 3"),
])
def test_errors_of_encodings_name_the_key(dims, config, message):
    with pytest.raises(ValueError, match=message):
        tcnn.Encoding(dims, config)


def test_errors_of_networks_name_the_key():
    with pytest.raises(ValueError, match="n_neurons: expected 16, 32, 64 or 128 for FullyFusedMLP, got 24"):
        tcnn.Network(3, 3, {**FUSED, "n_neurons": 24})
    with pytest.raises(ValueError, match="n_hidden_layers: expected at least 1, got 0"):
        tcnn.Network(3, 3, {**FUSED, "n_hidden_layers": 0})
    with pytest.raises(ValueError, match="activation: expected one of none, relu"):
        tcnn.Network(3, 3, {**FUSED, "activation": "GELU"})
    with pytest.raises(ValueError, match="dtype: expected torch.float16"):
        tcnn.Encoding(3, SMALL, dtype=torch.float64)
    net = tcnn.Network(3, 3, FUSED)
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 3\], got \[4, 2\]"):
        net(torch.rand(4, 2))
