"""tiny-cuda-nn's networks by their configurations: fully connected, without biases, widths padded to 16."""

import math

import numpy as np
import torch
from torch.nn.functional import leaky_relu, linear, relu, silu, softplus

from text3d_fast import ops
from text3d_fast.compat.tinycudann.pcg32 import PCG32

ALIGNMENT = 16
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": relu,
    "leakyrelu": lambda x: leaky_relu(x, 0.01),
    "silu": silu,
    "exponential": torch.exp,
    "sine": torch.sin,
    "sigmoid": torch.sigmoid,
    "squareplus": lambda x: 0.5 * (x + (x * x + 0.04).sqrt()),
    "softplus": lambda x: softplus(x, 10.0),
    "tanh": torch.tanh,
}
_IN_KERNEL = {"none": "none", "relu": "relu", "silu": "silu", "exponential": "exp", "sigmoid": "sigmoid",
              "tanh": "tanh"}
_FUSED = ("fullyfusedmlp", "megakernelmlp")
_WIDTHS = (16, 32, 64, 128)


class MLP:
    """Weights of one layer after the other, each [outputs, inputs] row by row; the last has outputs up to a multiple of
    16, of which the first are used. FullyFusedMLP and CutlassMLP are one function; the former takes fewer widths."""

    def __init__(self, inputs: int, outputs: int, config: dict) -> None:
        name = str(config.get("otype", "MLP"))
        if name.lower() not in (*_FUSED, "mlp", "cutlassmlp"):
            raise ValueError(f"otype: expected FullyFusedMLP or CutlassMLP, got {name!r}")
        fused = name.lower() in _FUSED
        self.inputs, self.outputs = inputs, outputs
        self.neurons, self.hidden_layers = int(config.get("n_neurons", 128)), int(config.get("n_hidden_layers", 5))
        if fused and self.neurons not in _WIDTHS:
            raise ValueError(f"n_neurons: expected 16, 32, 64 or 128 for FullyFusedMLP, got {self.neurons}; "
                             "CutlassMLP takes others")
        if self.hidden_layers < fused:
            raise ValueError(f"n_hidden_layers: expected at least {int(fused)}, got {self.hidden_layers}")
        self.activation = _activation(config, "activation", "ReLU")
        self.output_activation = _activation(config, "output_activation", "None")
        widths = [inputs, *[self.neurons] * self.hidden_layers, -(-outputs // ALIGNMENT) * ALIGNMENT]
        self.shapes = list(zip(widths[1:], widths[:-1]))
        self.n_params = sum(rows * columns for rows, columns in self.shapes)
        self.spec = self._kernel_spec()
        self.hyperparams = {"otype": "FullyFusedMLP" if fused else "CutlassMLP", "activation": self.activation,
                            "output_activation": self.output_activation, "n_neurons": self.neurons,
                            "n_hidden_layers": self.hidden_layers}

    def initial_params(self, random: PCG32) -> np.ndarray:
        weights = []
        for layer, (rows, columns) in enumerate(self.shapes):
            if self.activation.lower() == "sine":  # as in Sitzmann et al. 2020
                scale = 30 / columns if layer == 0 else math.sqrt(6 / columns)
            else:
                scale = math.sqrt(6 / (rows + columns))
            weights.append((random.floats(rows * columns) * np.float32(2) - np.float32(1)) * np.float32(scale))
        return np.concatenate(weights)

    def __call__(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """x float32 [N, inputs], params [n_params] -> float32 [N, outputs]"""
        hidden, last = ACTIVATIONS[self.activation.lower()], ACTIVATIONS[self.output_activation.lower()]
        if self.spec is not None:
            y = ops.mlp(x, params[: self.spec.num_params], self.spec)
            return y if self.output_activation.lower() in _IN_KERNEL else last(y)
        sizes = [rows * columns for rows, columns in self.shapes]
        *layers, end = [w.view(shape) for w, shape in zip(params.split(sizes), self.shapes)]
        for weight in layers:
            x = hidden(linear(x, weight))
        return last(linear(x, end[: self.outputs]))

    def _kernel_spec(self) -> ops.MLPSpec | None:
        """What ops.mlp is to compute, whose layout this is but for the padding at the end; None if it cannot."""
        activation = _IN_KERNEL.get(self.activation.lower())
        try:
            return None if activation is None else ops.MLPSpec(
                self.inputs, self.outputs, self.neurons, self.hidden_layers, activation,
                _IN_KERNEL.get(self.output_activation.lower(), "none"), bias=False)
        except ValueError:  # too wide or too deep for the kernel
            return None


def _activation(config: dict, key: str, default: str) -> str:
    name = str(config.get(key, default))
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"{key}: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name
