"""Text to 3D, with and without a GPU."""
