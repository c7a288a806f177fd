"""Engines in other processes: those that others serve, and the one that all windows of a user share.

`remote` asks them, with `fallback` and `sharing` around it; `service`, `host`, `hosting` are the other side.
"""
