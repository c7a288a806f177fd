"""Engines in other processes: `client` asks one, `server` is one (`midfill engine serve`)."""
