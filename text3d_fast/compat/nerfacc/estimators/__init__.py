"""What finds where along a ray to sample."""
