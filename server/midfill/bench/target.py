"""The target of `midfill bench load`. Imports nothing, so that the command line can import it quickly."""

SERVED = 0.8
"""Minimum share of suggestions shown before the next key, relative to a single user.

A suggestion that comes too late is cancelled by that key, so late suggestions lower this share.
"""
