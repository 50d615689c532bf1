"""Modules that own parameters or state; the ops do their work."""

from text3d_fast.nn.hash_grid import HashGrid
from text3d_fast.nn.mlp import MLP
from text3d_fast.nn.occupancy import OccupancyGrid
from text3d_fast.nn.tet_grid import DeformableTetGrid

__all__ = ["MLP", "DeformableTetGrid", "HashGrid", "OccupancyGrid"]
