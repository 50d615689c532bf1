"""kaolin.utils.testing: what the tests of its conversions import."""

import torch

__all__ = ["check_allclose"]


def check_allclose(tensor: torch.Tensor, other: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-8,
                   equal_nan: bool = False) -> None:
    """Raises ValueError if the tensors differ by more than atol + rtol |other| anywhere."""
    different = ~torch.isclose(tensor, other, rtol, atol, equal_nan)
    if bool(different.any()):
        raise ValueError(f"Tensors are not close on indices {torch.where(different)}: "
                         f"{tensor[different][:10]} vs {other[different][:10]}")
