"""Functions every floor uses: named trees, meshes, errors, files, command-line habits. Needs jax and numpy only."""
