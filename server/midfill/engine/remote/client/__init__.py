"""Use an engine in another process: a model server, or the process that all editors of a user share."""
