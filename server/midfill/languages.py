"""LSP language identifiers for files that no editor has named one for."""

from __future__ import annotations

from pathlib import PurePath

# Identifiers from the table in the LSP specification.
_BY_SUFFIX = {
    ".bash": "shellscript",
    ".c": "c",
    ".cc": "cpp",
    ".cpp": "cpp",
    ".cs": "csharp",
    ".css": "css",
    ".go": "go",
    ".h": "c",
    ".hpp": "cpp",
    ".html": "html",
    ".java": "java",
    ".js": "javascript",
    ".json": "json",
    ".jsx": "javascriptreact",
    ".kt": "kotlin",
    ".lua": "lua",
    ".md": "markdown",
    ".php": "php",
    ".py": "python",
    ".pyi": "python",
    ".rb": "ruby",
    ".rs": "rust",
    ".scala": "scala",
    ".sh": "shellscript",
    ".sql": "sql",
    ".swift": "swift",
    ".toml": "toml",
    ".ts": "typescript",
    ".tsx": "typescriptreact",
    ".yaml": "yaml",
    ".yml": "yaml",
}

SUFFIXES = tuple(_BY_SUFFIX)
"""The ends of file names that are known, with their dots."""


def language_id(name: str) -> str:
    """The identifier for a file name; "plaintext" where it is not known."""
    return _BY_SUFFIX.get(PurePath(name).suffix.lower(), "plaintext")
