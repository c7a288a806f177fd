"""Ask an engine in another process: one that others serve, or the one that all windows of a user share."""
