"""Adapter routing: decide which adapter serves which document, and follow changes while the server runs.

Bindings and registry are the user's files, which commands change. They are checked when a document is opened,
saved or edited, at most once a second: a change takes effect at the next edit, without polling. The engine
loads new adapters in the background and serves the old ones until then. Knows nothing of LSP. Runs on the
event loop; files are read in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from midfill.adapters.bindings import OFF, Bindings, Bound, asked_by
from midfill.adapters.registry import BaseModel, Entry, Registry, check_usable
from midfill.engine.api import MAX_ADAPTERS, Adaptable, AdapterSource, Engine
from midfill.errors import AdapterError, MidfillError
from midfill.lsp.dialogs import Dialogs
from midfill.text.documents import Document
from midfill.text.uris import file_of

_LOG = logging.getLogger(__name__)

_CHECK_S = 1.0

_AGREE, _REFUSE = "Use it", "Do not use it"
_NOT_SUPPORTED = "Adapters are not used: the engine that runs the model does not support them."


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """A workspace whose own file requests an adapter that the user has neither accepted nor refused."""

    workspace: Path
    entry: Entry


class AdapterRouter:
    """The adapters of one server.

    Args:
        dialogs: shows warnings, and asks whether a workspace may have the adapter that it requests.
        on_change: called when documents get other adapters than before.

    Attributes:
        failures: why bound adapters are not used, a sentence each.
        held_out: this session runs without them, so that sessions can be compared; nothing is loaded.
    """

    def __init__(self, dialogs: Dialogs, on_change: Callable[[], None]) -> None:
        self._dialogs = dialogs
        self._on_change = on_change
        self.failures: tuple[str, ...] = ()
        self.held_out = False
        self._registry = Registry()
        self._bindings = Bindings()
        self._bound = Bound()
        self._file_state: list[tuple[int, int, int]] | None = None
        self._entries: dict[str, Entry] = {}  # the loaded ones, by digest
        self._engine: Adaptable | None = None
        self._has_begun = False
        self._model: BaseModel | None = None
        self._folders: tuple[Path, ...] = ()
        self._checked_s = 0.0
        self._asked: set[tuple[Path, str]] = set()
        self._lock = asyncio.Lock()

    def adapter_of(self, document: Document) -> str | None:
        """Return the key of the adapter for a document, as `Request.adapter` takes it; None for the base."""
        return None if self.held_out else self._bound_for(document)

    def _bound_for(self, document: Document) -> str | None:
        digest = self._bound.resolve(file_of(document.uri), document.language_id) if self._entries else None
        return digest if digest in self._entries else None

    @property
    def in_use(self) -> list[Entry]:
        """The loaded adapters."""
        return [] if self.held_out else list(self._entries.values())

    def name_for(self, document: Document | None) -> str | None:
        """Return the name of a document's adapter, even if it is held out; for None the names of all."""
        if document is not None:
            key = self._bound_for(document)
            return self._entries[key].name if key is not None else None
        return ", ".join(entry.name for entry in self._entries.values()) or None

    async def start(
        self,
        engine: Engine,
        model: BaseModel | None,
        *,
        is_remote: bool = False,
        held_out: bool = False,
    ) -> None:
        """Begin to serve adapters from a started engine; `model` is the one on this machine that it runs.

        If the engine is remote the model need not be here: its server checks whether an adapter fits.
        With `held_out` the adapters are routed, for the statistics, but neither loaded nor used.
        """
        self.held_out = held_out
        can = model is not None or is_remote
        self._engine = engine if can and isinstance(engine, Adaptable) else None
        self._model = model
        self._has_begun = True
        await self.update()

    async def open_folders(self, folders: Sequence[Path]) -> None:
        """Take the workspace's folders, and route by them once adapters are served."""
        self._folders = tuple(folders)
        await self.update()

    def is_due(self) -> bool:
        """Return whether one of the files has changed; checks at most once a second."""
        now = time.monotonic()
        if self._engine is None or now - self._checked_s < _CHECK_S:
            return False
        self._checked_s = now
        return bool(self._stat_files() != self._file_state)

    async def update(self) -> None:
        """Read the files and load what they bind. Show each new problem once.

        Does nothing before `start`, which reads the files too.
        """
        if not self._has_begun:
            return
        async with self._lock:
            self._checked_s = time.monotonic()
            self._file_state = self._stat_files()
            try:
                bound, entries, problems = await asyncio.to_thread(self._read)
                if self._engine is None:
                    problems = [_NOT_SUPPORTED] if entries else []
                else:
                    await self._use(bound, entries)
            except MidfillError as error:
                problems = [str(error)]
            for problem in problems:
                if problem not in self.failures:
                    _LOG.warning("%s", problem)
                    self._dialogs.show_warning(problem)
            self.failures = tuple(problems)
        await self._ask_for_requested()

    def known(self) -> tuple[list[Entry], Bound]:
        """Return all adapters on this machine and their bindings. Reads files. Raises `AdapterError`."""
        return self._registry.entries(), self._bindings.read()

    async def bind(self, name: str | None, where: str) -> None:
        """Bind an adapter, or none, to the "workspace" (its first folder), as "global", or to a language.

        Raises `AdapterError`.
        """
        await asyncio.to_thread(self._bind, name, where)
        await self.update()

    def _bind(self, name: str | None, where: str) -> None:
        digest = None
        if name is not None:
            entry = self._registry.get(name)
            check_usable(entry)
            digest = entry.digest
        if where == "global":
            self._bindings.bind(digest)
        elif where != "workspace":
            self._bindings.bind(digest, language=where)
        elif self._folders:
            self._bindings.bind(digest or OFF, workspace=self._folders[0])
        else:
            raise AdapterError(
                "No folder is open to bind the adapter to. Open one, or bind the adapter to `global`."
            )

    async def _use(self, bound: Bound, entries: dict[str, Entry]) -> None:
        """Load these adapters, and route documents to them when all are loaded."""
        if self._engine is None:
            raise AssertionError("called before `start`")
        if self.held_out:
            self._route(bound, entries)
            return
        both = self._entries | entries
        kept = {key: entry for key, entry in entries.items() if key in self._entries}
        if len(both) > MAX_ADAPTERS:
            # No room for both: until the new ones are loaded, documents of the old ones get the base.
            self._route(bound, kept)
        else:
            await self._engine.set_adapters(_sources(both))
            self._route(bound, entries)
        await self._engine.set_adapters(_sources(entries))
        self._route(bound, entries)

    def _route(self, bound: Bound, entries: dict[str, Entry]) -> None:
        differs = (bound, entries) != (self._bound, self._entries)
        # Bindings to no adapter, before and now, change no answer: earlier suggestions stay valid.
        matters = bool(entries or self._entries)
        self._bound, self._entries = bound, entries
        if differs and matters:
            self._on_change()

    def _read(self) -> tuple[Bound, dict[str, Entry], list[str]]:
        """Return the bindings, the bound adapters that are usable, and why the others are not."""
        bound = self._bindings.read()
        here = [digest for path, digest in bound.workspaces.items() if self._is_open(Path(path))]
        named = [*here, *bound.languages.values(), *([bound.everywhere] if bound.everywhere else [])]
        known = {entry.digest: entry for entry in self._registry.entries()}
        entries: dict[str, Entry] = {}
        problems = []
        for digest in dict.fromkeys(digest for digest in named if digest != OFF):
            try:
                if (entry := known.get(digest)) is None:
                    raise AdapterError(
                        f"The adapter {digest[:12]} is bound but no longer on this machine. "
                        "Bind another one, or none: midfill adapter use, midfill adapter off."
                    )
                check_usable(entry)
                if len(entries) == MAX_ADAPTERS:
                    raise AdapterError(
                        f"The adapter {entry.name} is not used: at most {MAX_ADAPTERS} adapters can be "
                        "loaded at the same time. Unbind another one: midfill adapter off."
                    )
                if self._engine is not None and digest not in self._entries:
                    self._registry.check(entry, self._model)
            except MidfillError as error:
                problems.append(str(error))
            else:
                entries[digest] = entry
        return bound, entries, problems

    def _is_open(self, path: Path) -> bool:
        return any(folder.is_relative_to(path) or path.is_relative_to(folder) for folder in self._folders)

    def _stat_files(self) -> list[tuple[int, int, int]]:
        state = []
        for path in (self._bindings.path, self._registry.root / "index.json"):
            try:
                state.append((path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino))
            except OSError:
                state.append((0, 0, 0))
        return state

    async def _ask_for_requested(self) -> None:
        """Ask the user about the adapters that open workspaces request, each once."""
        if self._engine is None:
            return
        for request in await asyncio.to_thread(self._undecided):
            key = (request.workspace, request.entry.digest)
            if key in self._asked:
                continue
            self._asked.add(key)
            chosen = await self._dialogs.ask(_question(request), (_AGREE, _REFUSE))
            if chosen == _AGREE:
                await asyncio.to_thread(
                    self._bindings.bind, request.entry.digest, workspace=request.workspace
                )
                await self.update()
            elif chosen == _REFUSE:
                await asyncio.to_thread(self._bindings.refuse, request.workspace, request.entry.digest)

    def _undecided(self) -> list[AdapterRequest]:
        bound = self._bindings.read()
        known = {entry.digest: entry for entry in self._registry.entries()}
        found = []
        for folder in self._folders:
            digest = asked_by(folder)
            entry = known.get(digest or "")
            decided = str(folder) in bound.workspaces or digest in bound.refused.get(str(folder), ())
            if entry is not None and entry.evaluation.usable and not decided:
                found.append(AdapterRequest(folder, entry))
        return found


def _question(request: AdapterRequest) -> str:
    evaluation = request.entry.evaluation
    verdict = "not evaluated" if evaluation.verdict == "none" else f"verdict: {evaluation.verdict}"
    return (
        f"the workspace {request.workspace.name} asks for your adapter {request.entry.name} ({verdict}). "
        "Use it there?"
    )


def _sources(entries: dict[str, Entry]) -> list[AdapterSource]:
    return [AdapterSource(entry.digest, entry.name, entry.path) for entry in entries.values()]
