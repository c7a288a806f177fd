"""Bindings: which adapter is used in a workspace, for a language, or everywhere. A file of the user's data.

The most specific binding applies: that of the file's workspace, then that of its language, then the global
one. A workspace cannot bind anything itself: its file `.midfill.toml` may request an adapter by digest, and
the user's answer is kept here too. Every change can be undone. Works on digests; `registry` knows which
adapters exist. Runs on any thread.
"""

from __future__ import annotations

import json
import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from midfill.adapters.registry import locked
from midfill.errors import AdapterError
from midfill.system import text_files
from midfill.system.folders import data_folder
from midfill.system.json_files import read_json
from midfill.text.languages import normalise

_LOG = logging.getLogger(__name__)

OFF = "off"
"""Bound instead of a digest: no adapter here, whatever less specific bindings say."""

REQUEST_FILE = ".midfill.toml"

_FORMAT = 1
_MAX_HISTORY = 20
_MAX_REQUEST_BYTES = 4096
_ASKED = re.compile(r"sha256:([0-9a-f]{64})")
_BOUND = re.compile(r"[0-9a-f]{64}|off")


@dataclass(frozen=True, slots=True)
class Bound:
    """All bindings at one time: digests, or `OFF`.

    Attributes:
        everywhere: the global binding, or None.
        languages: bindings by language identifier, as `languages.normalise` gives it.
        workspaces: bindings by absolute path.
        refused: digests that the user has refused, by the workspace that requested them.
    """

    everywhere: str | None = None
    languages: Mapping[str, str] = field(default_factory=dict)
    workspaces: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, file: Path | None, language: str) -> str | None:
        """Return the digest of the adapter for a file, or None."""
        inside = [] if file is None else [path for path in self.workspaces if file.is_relative_to(path)]
        if inside:
            bound: str | None = self.workspaces[max(inside, key=len)]
        else:
            bound = self.languages.get(normalise(language), self.everywhere)
        return None if bound == OFF else bound

    def uses(self, digest: str) -> list[str]:
        """Return descriptions of all bindings of an adapter."""
        places = [f"workspace {path}" for path, bound in self.workspaces.items() if bound == digest]
        places += [f"language {name}" for name, bound in self.languages.items() if bound == digest]
        return places + (["everywhere"] if self.everywhere == digest else [])


class Bindings:
    """The file of bindings in a folder; by default that of the registry."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_folder() / "adapters"
        self.path = self.root / "bindings.json"

    def read(self) -> Bound:
        """Return the present bindings. Raises `AdapterError` if the file cannot be read."""
        return self._load()[0]

    def bind(
        self,
        bound: str | None,
        *,
        workspace: Path | None = None,
        language: str | None = None,
    ) -> Bound:
        """Bind an adapter (its digest) or `OFF` in a workspace, for a language, or else everywhere.

        None removes the binding, so that less specific ones apply. Returns the new bindings.
        """

        def change(before: Bound) -> Bound:
            if workspace is not None:
                return replace(before, workspaces=_with(before.workspaces, str(workspace.absolute()), bound))
            if language is not None:
                return replace(before, languages=_with(before.languages, normalise(language), bound))
            return replace(before, everywhere=bound)

        return self._change(change)

    def refuse(self, workspace: Path, digest: str) -> Bound:
        """Record that the user refuses the adapter that this workspace requests."""
        place = str(workspace.absolute())

        def change(before: Bound) -> Bound:
            refused = tuple(dict.fromkeys((*before.refused.get(place, ()), digest)))
            return replace(before, refused={**before.refused, place: refused})

        return self._change(change)

    def release(self, digest: str) -> Bound:
        """Remove every binding of an adapter."""

        def change(before: Bound) -> Bound:
            return replace(
                before,
                everywhere=None if before.everywhere == digest else before.everywhere,
                languages={key: bound for key, bound in before.languages.items() if bound != digest},
                workspaces={key: bound for key, bound in before.workspaces.items() if bound != digest},
            )

        return self._change(change)

    def rollback(self) -> Bound:
        """Undo the latest change. Raises `AdapterError` if there is none."""
        with locked(self.root):
            _, history = self._load()
            if not history:
                raise AdapterError("There is no change of bindings to undo.")
            self._write(history[-1], history[:-1])
        return history[-1]

    def _change(self, change: Any) -> Bound:
        with locked(self.root):
            before, history = self._load()
            after: Bound = change(before)
            if after != before:
                self._write(after, [*history, before][-_MAX_HISTORY:])
        return after

    def _load(self) -> tuple[Bound, list[Bound]]:
        try:
            content = read_json(self.path)
            if content["format"] != _FORMAT:
                raise AdapterError(
                    f"{self.path} was written by another version of midfill. Update midfill, or delete the "
                    "file."
                )
            return _bound(content["now"]), [_bound(values) for values in content["before"]]
        except FileNotFoundError:
            return Bound(), []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{self.path} cannot be read ({error!r}). Repair or delete it.") from error

    def _write(self, now: Bound, history: list[Bound]) -> None:
        content = {"format": _FORMAT, "now": asdict(now), "before": [asdict(bound) for bound in history]}
        text_files.replace(self.path, json.dumps(content, indent=1), private=True)


def asked_by(workspace: Path) -> str | None:
    """Return the digest of the adapter that a workspace requests; None without a valid request.

    A request has no effect until the user has agreed.
    """
    path = workspace / REQUEST_FILE
    try:
        if path.is_symlink() or not path.is_file():
            return None
        with path.open("rb") as stream:
            text = stream.read(_MAX_REQUEST_BYTES + 1)
        asked = (
            tomllib.loads(text_files.decode(text)).get("adapter") if len(text) <= _MAX_REQUEST_BYTES else None
        )
    except UnicodeError as error:
        _LOG.warning("%s is ignored: %s", path, error)
        return None
    except (OSError, ValueError, RecursionError):
        return None
    match = _ASKED.fullmatch(asked) if isinstance(asked, str) else None
    return match[1] if match else None


def _with(bindings: Mapping[str, str], key: str, bound: str | None) -> dict[str, str]:
    others = {other: value for other, value in bindings.items() if other != key}
    return others if bound is None else {**others, key: bound}


def _by_language(bindings: Mapping[str, str]) -> dict[str, str]:
    """Return bindings by our names of languages, which take precedence over older versions' editor names."""
    ours = {name: bound for name, bound in bindings.items() if normalise(name) == name}
    return {normalise(name): bound for name, bound in bindings.items()} | ours


def _bound(values: Mapping[str, Any]) -> Bound:
    found = Bound(
        values["everywhere"],
        _by_language(values["languages"]),
        dict(values["workspaces"]),
        {place: tuple(digests) for place, digests in values["refused"].items()},
    )
    everything = [*found.languages.values(), *found.workspaces.values()]
    everything += [] if found.everywhere is None else [found.everywhere]
    if not all(_BOUND.fullmatch(bound) for bound in everything):
        raise ValueError("a binding is not a digest")
    return found
