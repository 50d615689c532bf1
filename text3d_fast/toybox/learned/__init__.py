"""The learned prior of Toybox: its networks and weights in the diffusers format."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
