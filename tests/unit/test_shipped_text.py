"""What is shipped says nothing that only a release would make true."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "clients", ROOT / "server"]
KINDS = {".el", ".json", ".lua", ".md", ".mjs", ".py", ".toml", ".ts", ".txt", ".vim"}
# What tools make, and what others have written.
FOREIGN = {"dist", "node_modules", "package-lock.json"}
# An extra of what is installed already is another matter: pip takes the installed one.
RELEASED = re.compile(r"pip3?\s+install\s+(?:-[-\w=.]+\s+)*[\"'`]?midfill(?![\w\[./-])")


def shipped():
    yield from (path for path in ROOT.iterdir() if path.suffix in KINDS)
    for folder in FOLDERS:
        for path in folder.rglob("*"):
            if path.suffix in KINDS and not FOREIGN & set(path.relative_to(ROOT).parts):
                yield path


def test_the_pattern_finds_what_it_is_to_find():
    for text in (
        "pip install midfill",
        "pip install 'midfill'",
        "pip3 install -U midfill,",
        "pip install\nmidfill\n",
    ):
        assert RELEASED.search(text)
    for text in (
        "pip install .",
        "pip install 'midfill[bench]'",
        "pip install midfill-0.1.0-py3-none-any.whl",
    ):
        assert not RELEASED.search(text)


def test_nobody_is_told_to_install_what_is_not_released():
    """Whoever registers the name would be installed. What works is `pip install` of a checkout or a wheel."""
    texts = {path: path.read_text(encoding="utf-8") for path in shipped()}
    assert {"health.lua", "server.vim", "midfill-server.el", "README.md", "package.json"} <= {
        path.name for path in texts
    }
    assert [str(path) for path, text in texts.items() if RELEASED.search(text)] == []
