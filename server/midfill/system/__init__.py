"""The operating system: files, folders, programs, streams, memory. No models, no editors."""
