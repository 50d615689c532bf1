"""The example that fits a mesh to pictures, at a size of seconds."""

from examples.fit_shape import fit, torus


def test_a_ball_moves_towards_a_torus():
    mesh, losses = fit(steps=40, resolution=16, size=48)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert mesh.is_closed() and torus(mesh.vertices).abs().mean() < 0.08  # 0.16 at the start
    assert 0 <= mesh.colors.min() and mesh.colors.max() <= 1
