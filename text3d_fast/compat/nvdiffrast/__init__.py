"""nvdiffrast's interface on text3d_fast.ops: `import text3d_fast.compat.nvdiffrast.torch as dr`."""
