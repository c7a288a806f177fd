"""A real Helix with midfill beside a language's own server, on a terminal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from real_terminal import Terminal

# As tests/editors/install.sh names it.
VERSION = "25.07.1"
PROGRAM = (
    Path(os.environ.get("MIDFILL_TEST_EDITORS") or Path.home() / ".cache" / "midfill-tests")
    / f"helix-{VERSION}"
    / "hx"
)
# As the popup names the kinds of the items of both servers.
KINDS = ("keyword", "text")
LANGUAGE_SERVER = Path(__file__).with_name("language_server.py")


class Helix(Terminal):
    """One Helix with one file; see `Terminal` for the other arguments.

    Args:
        labels: the items of the language's own server.
        delay_s: how long that server takes for an answer.
        order: of the two servers, in languages.toml.
    """

    def __init__(
        self, folder, rules, *, labels=("return",), delay_s=0.0, order=("own", "midfill"), **options
    ):
        super().__init__(folder, rules, **options)
        config = folder / "config" / "helix"
        config.mkdir(parents=True)
        own = [sys.executable, str(LANGUAGE_SERVER), str(delay_s), *labels]
        lines = []
        for name, (program, *arguments) in (("own", own), ("midfill", self.command)):
            lines += [f"[language-server.{name}]", f"command = {json.dumps(program)}"]
            lines += [f"args = {json.dumps(arguments)}"]
        values = [f"{key} = {json.dumps(value)}" for key, value in self.settings.items()]
        lines += ["[language-server.midfill.config]", *values]
        lines += ["[[language]]", 'name = "python"', f"language-servers = {json.dumps(order)}"]
        (config / "languages.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def open(self):
        """Start Helix, and wait until midfill has its model."""
        config, cache = self.folder / "config", self.folder / "cache"
        self.start(
            [
                *("env", f"XDG_CONFIG_HOME={config}", f"XDG_CACHE_HOME={cache}"),
                *(str(PROGRAM), "-vv", "--log", str(self.folder / "helix.log"), str(self.file)),
            ]
        )
        self.until(self._is_loaded, "the model is loaded")
        self.until(lambda: "own <- " in self.messages, "the language's own server answers")

    @property
    def messages(self):
        """Helix's log, with every message of both servers."""
        log = self.folder / "helix.log"
        return log.read_text(encoding="utf-8") if log.exists() else ""

    def saves(self, text):
        """Save, in normal mode, and wait until the file has this text."""
        self.type(":w!")
        self.press("Enter")
        self.until(lambda: self.file.read_text(encoding="utf-8") == text, f"the text {text!r}")

    def escape(self):
        """Press Escape, and wait for normal mode."""
        self.press("Escape")
        self.until(lambda: any(line.startswith(" NOR ") for line in self.screen), "normal mode")

    def write(self, text):
        """Type at the end of the file's last line."""
        self.type("geA" + text)

    def popup(self, *labels):
        """Wait until these items, and no others, stand in the popup, from above."""

        def there():
            # Without the numbers of the lines, or what stands in their place below the text.
            words = [line.lstrip(" ~0123456789").split() for line in self.screen]
            shown = [" ".join(line[: line.index(kind)]) for line in words for kind in KINDS if kind in line]
            return tuple(shown) == labels

        self.until(there, f"the popup {labels!r}")

    def _is_loaded(self):
        for recording in self.folder.glob("session.jsonl*"):
            for line in recording.read_text(encoding="utf-8").splitlines():
                message = json.loads(line).get("message", {})
                value = message.get("params", {}).get("value", {}) if "params" in message else {}
                if message.get("method") == "$/progress" and value.get("kind") == "end":
                    return True
        return False
