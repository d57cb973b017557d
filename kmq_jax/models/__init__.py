"""Speaker-embedding networks and their registry."""
