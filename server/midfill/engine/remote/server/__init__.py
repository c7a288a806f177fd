"""Serve the engine to other processes over HTTP: to one user's editors, or to a team."""
