"""A page on which a model is tried in a browser: its files, what runs the model there, and a server."""
