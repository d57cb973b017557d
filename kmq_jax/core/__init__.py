"""What all packages build on: errors, files, locks, options, named trees, the mesh. Needs jax and numpy only."""
