"""The target of `midfill bench load`. Imports nothing, so that the command line can read it at once."""

SERVED = 0.8
"""The share of suggestions that users must see before their next key, relative to a single user.

A suggestion that comes too late is cancelled by that key: it is missing here and is never counted as late.
"""
