"""The common part of estimators."""

import torch


class AbstractEstimator(torch.nn.Module):
    """Finds where along rays to sample; `device` follows the module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._dummy.device

    def sampling(self, *args, **kwargs):
        raise NotImplementedError

    def update_every_n_steps(self, *args, **kwargs):
        raise NotImplementedError
