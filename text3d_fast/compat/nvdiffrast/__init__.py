"""nvdiffrast's interface on text3d_fast.ops: `import text3d_fast.compat.nvdiffrast.torch as dr`."""

__version__ = "0.3.3"  # of the original, whose interface this is
