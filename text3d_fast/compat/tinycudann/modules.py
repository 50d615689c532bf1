"""The modules of tiny-cuda-nn's PyTorch interface."""

import os
import tempfile
import warnings

import numpy as np
import torch

from text3d_fast.compat.tinycudann import _C
from text3d_fast.compat.tinycudann._C import free_temporary_memory, supports_jit_fusion
from text3d_fast.compat.tinycudann.encodings import create_encoding
from text3d_fast.compat.tinycudann.network import ALIGNMENT, MLP
from text3d_fast.compat.tinycudann.pcg32 import PCG32

__all__ = ["Encoding", "Module", "Network", "NetworkWithInputEncoding", "free_temporary_memory", "rtc_set_cache_dir",
           "supports_jit_fusion"]


def rtc_set_cache_dir(dir: str | os.PathLike) -> None:
    """Checks the folder as the original does; nothing is compiled at run time, so nothing is kept in it."""
    if not dir:
        return
    if not os.path.isdir(dir):
        raise OSError(f"Missing RTC cache directory {dir}")
    with tempfile.TemporaryFile(dir=dir):
        pass


class _Model:
    """An encoding, a network, or both: what the original's extension module holds for a Module."""

    def __init__(self, encoding, network, precision: _C.Precision) -> None:
        self.encoding, self.network, self.precision = encoding, network, precision
        self.jit_fusion = False

    def n_input_dims(self) -> int:
        return self.encoding.dims

    def n_output_dims(self) -> int:
        """With the padding to 16 of a network."""
        return self.network.shapes[-1][0] if self.network else self.encoding.width

    def n_params(self) -> int:
        return self.encoding.n_params + (self.network.n_params if self.network else 0)

    def param_precision(self) -> _C.Precision:
        return self.precision

    def output_precision(self) -> _C.Precision:
        return self.precision

    def name(self) -> str:
        return "NetworkWithInputEncoding" if self.network else self.encoding.hyperparams["otype"]

    def hyperparams(self) -> dict:
        if not self.network:
            return self.encoding.hyperparams
        return {"otype": self.name(), "encoding": self.encoding.hyperparams, "network": self.network.hyperparams}

    def initial_params(self, seed: int) -> torch.Tensor:
        random = PCG32(seed)
        parts = [self.network.initial_params(random)] if self.network else []
        return torch.from_numpy(np.concatenate([*parts, self.encoding.initial_params(random)]))

    def __call__(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        dtype = self.precision.value
        if not self.network:
            return self.encoding(x, params, dtype).to(dtype)
        weights, table = params.split([self.network.n_params, self.encoding.n_params])
        return self.network(self.encoding(x, table, dtype), weights).to(dtype)


class Module(torch.nn.Module):
    """params: float32 [n], the weights of the network, then the parameters of the encoding: as in the original, so that
    checkpoints load both ways. They start with the original's values for the seed, on the GPU if there is one.

    dtype: of the output, and what a grid's entries are rounded to when read; everything between is float32.
    Differentiable twice by inputs and parameters.
    """

    def __init__(self, seed: int = 1337) -> None:
        super().__init__()
        self.native_tcnn_module = self._native_tcnn_module()
        self.dtype = self.native_tcnn_module.param_precision().value
        self.seed = seed
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.params = torch.nn.Parameter(self.native_tcnn_module.initial_params(seed).to(device))
        self.loss_scale = _C.default_loss_scale(self.native_tcnn_module.param_precision())

    def _native_tcnn_module(self) -> _Model:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, n_input_dims] of any real dtype -> [N, n_output_dims] of self.dtype"""
        if x.dim() != 2 or x.shape[1] != self.n_input_dims:
            raise ValueError(f"x: expected shape [N, {self.n_input_dims}], got {list(x.shape)}")
        if x.device != self.params.device:
            warnings.warn(f"x: moved from {x.device} to {self.params.device}, where the parameters are", stacklevel=2)
            x = x.to(self.params.device)
        with torch.autocast(x.device.type, enabled=False):
            return self.native_tcnn_module(x.float(), self.params.float())

    def extra_repr(self) -> str:
        return (f"n_input_dims={self.n_input_dims}, n_output_dims={self.n_output_dims}, seed={self.seed}, "
                f"dtype={self.dtype}, hyperparams={self.native_tcnn_module.hyperparams()}")

    @property
    def jit_fusion(self) -> bool:
        """Kept for those who set it; it changes nothing here."""
        return self.native_tcnn_module.jit_fusion

    @jit_fusion.setter
    def jit_fusion(self, value: bool) -> None:
        self.native_tcnn_module.jit_fusion = bool(value)


class NetworkWithInputEncoding(Module):
    """An encoding followed by a network, n_input_dims -> n_output_dims."""

    def __init__(self, n_input_dims: int, n_output_dims: int, encoding_config: dict, network_config: dict,
                 seed: int = 1337) -> None:
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.encoding_config, self.network_config = encoding_config, network_config
        super().__init__(seed)

    def _native_tcnn_module(self) -> _Model:
        encoding = create_encoding(self.n_input_dims, self.encoding_config, ALIGNMENT)
        network = MLP(encoding.width, self.n_output_dims, self.network_config)
        return _Model(encoding, network, _C.preferred_precision())


class Network(Module):
    """A network, n_input_dims -> n_output_dims. Its inputs are padded with ones to a multiple of 16."""

    def __init__(self, n_input_dims: int, n_output_dims: int, network_config: dict, seed: int = 1337) -> None:
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.network_config = network_config
        super().__init__(seed)

    def _native_tcnn_module(self) -> _Model:
        encoding = create_encoding(self.n_input_dims, {"otype": "Identity"}, ALIGNMENT)
        return _Model(encoding, MLP(encoding.width, self.n_output_dims, self.network_config), _C.preferred_precision())


class Encoding(Module):
    """An encoding, n_input_dims -> n_output_dims, which the configuration determines.

    dtype: torch.float16 (None) or torch.float32.
    """

    def __init__(self, n_input_dims: int, encoding_config: dict, seed: int = 1337,
                 dtype: torch.dtype | None = None) -> None:
        self.n_input_dims, self.encoding_config = n_input_dims, encoding_config
        if dtype not in (None, torch.float16, torch.float32):
            raise ValueError(f"dtype: expected torch.float16, torch.float32 or None, got {dtype}")
        self.precision = _C.preferred_precision() if dtype is None else _C.Precision(dtype)
        super().__init__(seed)
        self.n_output_dims = self.native_tcnn_module.n_output_dims()

    def _native_tcnn_module(self) -> _Model:
        return _Model(create_encoding(self.n_input_dims, self.encoding_config), None, self.precision)
