"""Diffusion models from folders, files and hub ids as priors: any of the class, none by name."""
