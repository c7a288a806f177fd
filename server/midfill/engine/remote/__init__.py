"""Engines in other processes: a client for model servers, and our own server (`midfill engine serve`)."""
