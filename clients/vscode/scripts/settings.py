"""Writes the server's settings into package.json: run it when `midfill.settings` has changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from midfill import __version__
from midfill.settings import vscode_settings

MANIFEST = Path(__file__).parents[1] / "package.json"


def generated(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the server's settings and version as they are now."""
    result: dict[str, Any] = json.loads(json.dumps(manifest))
    result["version"] = __version__
    own, server = result["contributes"]["configuration"]
    server["properties"] = vscode_settings()
    # A folder that is not trusted sets nothing, what a window's settings may choose included.
    result["capabilities"]["untrustedWorkspaces"]["restrictedConfigurations"] = [
        *own["properties"],
        *server["properties"],
    ]
    return result


if __name__ == "__main__":
    before = MANIFEST.read_text(encoding="utf-8")
    after = json.dumps(generated(json.loads(before)), indent=2, ensure_ascii=False) + "\n"
    MANIFEST.write_text(after, encoding="utf-8")
    sys.stdout.write("package.json is as it was\n" if after == before else "package.json was changed\n")
