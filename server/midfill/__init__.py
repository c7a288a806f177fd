"""midfill: a language server for fill-in-the-middle code completion."""

from importlib.metadata import version

__version__ = version("midfill")
