"""The operating system: files, folders, programs, streams, memory. Knows no models and no editors."""
