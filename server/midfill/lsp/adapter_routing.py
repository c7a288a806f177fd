"""Which adapter serves which document, and how that changes while the server runs.

Bindings and registry are files of the user's, which commands change; they are looked at when a document is
opened, saved or edited, at most once a second, so that a change counts within moments and nothing polls. The
engine loads what is new in the background; until it is there, what was in use before goes on. Knows nothing
of LSP. Runs on the event loop; files are read in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midfill.adapters.bindings import OFF, Bindings, Bound, asked_by
from midfill.adapters.registry import BaseModel, Entry, Registry, check_usable
from midfill.engine.api import MAX_ADAPTERS, Adaptable, AdapterSource, Engine
from midfill.errors import AdapterError, MidfillError
from midfill.text.documents import Document
from midfill.text.uris import file_of

_LOG = logging.getLogger(__name__)

_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A workspace that asks for an adapter which the user has not decided on."""

    workspace: Path
    entry: Entry


class Switch:
    """The adapters of one server.

    Args:
        say: tells the user a sentence.
        changed: called when documents get other adapters than before.

    Attributes:
        ask: asks the user whether a workspace may have what it asks for: True, False, or None for no answer.
        failures: why adapters that are bound are not used, a sentence each.
        held_out: this session has none of them, so that sessions can be compared; nothing is loaded.
    """

    def __init__(self, say: Callable[[str], None], changed: Callable[[], None]) -> None:
        self._say = say
        self._changed = changed
        self.ask: Callable[[Asked], Awaitable[bool | None]] | None = None
        self.failures: tuple[str, ...] = ()
        self.held_out = False
        self._registry = Registry()
        self._bindings = Bindings()
        self._bound = Bound()
        self._state: Any = None
        self._entries: dict[str, Entry] = {}  # those in the model, by digest
        self._engine: Adaptable | None = None
        self._model: BaseModel | None = None
        self._folders: tuple[Path, ...] = ()
        self._looked_s = 0.0
        self._asked: set[tuple[Path, str]] = set()
        self._lock = asyncio.Lock()

    def adapter_of(self, document: Document) -> str | None:
        """The key of the adapter for a document; see `Request.adapter`."""
        return None if self.held_out else self._bound_for(document)

    def _bound_for(self, document: Document) -> str | None:
        digest = self._bound.resolve(file_of(document.uri), document.language_id) if self._entries else None
        return digest if digest in self._entries else None

    @property
    def started(self) -> bool:
        """Whether adapters are served as bindings say."""
        return self._engine is not None

    @property
    def in_use(self) -> list[Entry]:
        """The adapters that are in the model."""
        return [] if self.held_out else list(self._entries.values())

    def name_for(self, document: Document | None) -> str | None:
        """The name of a document's adapter, though it be held out; without a document, of all of them."""
        if document is not None:
            key = self._bound_for(document)
            return self._entries[key].name if key is not None else None
        return ", ".join(entry.name for entry in self._entries.values()) or None

    async def start(
        self, engine: Engine, model: BaseModel | None, folders: Sequence[Path], *, served: bool = False
    ) -> None:
        """Begin to serve adapters from a started engine; `model` is the one on this machine that it runs.

        Where it is `served` by others, that need not be here: their server says whether an adapter fits.
        """
        can = model is not None or served
        self._engine = engine if can and isinstance(engine, Adaptable) else None
        self._model = model
        self._folders = tuple(folders)
        await self.update()

    async def open_folders(self, folders: Sequence[Path]) -> None:
        """The workspace has these folders now."""
        self._folders = tuple(folders)
        await self.update()

    def is_due(self) -> bool:
        """Whether it is time to look at the files again, and one of them has changed."""
        now = time.monotonic()
        if self._engine is None or now - self._looked_s < _LOOK_S:
            return False
        self._looked_s = now
        return bool(self._files() != self._state)

    async def update(self) -> None:
        """Do as the bindings say. What is wrong with them is said, each once."""
        async with self._lock:
            self._looked_s = time.monotonic()
            self._state = self._files()
            try:
                bound, entries, problems = await asyncio.to_thread(self._read)
                if self._engine is None:
                    problems = [_NOT_SERVED] if entries else []
                else:
                    await self._use(bound, entries)
            except MidfillError as error:
                problems = [str(error)]
            for problem in problems:
                if problem not in self.failures:
                    _LOG.warning("%s", problem)
                    self._say(problem)
            self.failures = tuple(problems)
        await self._answer_requests()

    def known(self) -> tuple[list[Entry], Bound]:
        """All adapters on this machine, and where they are bound. Reads files. Raises `AdapterError`."""
        return self._registry.entries(), self._bindings.read()

    async def bind(self, name: str | None, where: str) -> None:
        """Use an adapter, or none, in the "workspace" (its first folder), as "global", or for a language.

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
            raise AdapterError("No folder is open that an adapter could be used in.")

    async def _use(self, bound: Bound, entries: dict[str, Entry]) -> None:
        """Have these adapters in the model. Documents go over to them when all are there."""
        if self._engine is None:
            raise AssertionError("there is an engine")
        if self.held_out:
            self._route(bound, entries)
            return
        both = self._entries | entries
        kept = {key: entry for key, entry in entries.items() if key in self._entries}
        if len(both) > MAX_ADAPTERS:
            # There is no room for all: documents of those that leave have the base meanwhile.
            self._route(bound, kept)
        else:
            await self._engine.set_adapters(_sources(both))
            self._route(bound, entries)
        await self._engine.set_adapters(_sources(entries))
        self._route(bound, entries)

    def _route(self, bound: Bound, entries: dict[str, Entry]) -> None:
        differs = (bound, entries) != (self._bound, self._entries)
        # Bindings that lead to no adapter, before and now, change no answer: what was suggested still holds.
        matters = bool(entries or self._entries)
        self._bound, self._entries = bound, entries
        if differs and matters:
            self._changed()

    def _read(self) -> tuple[Bound, dict[str, Entry], list[str]]:
        """The bindings, those of the adapters they name that can be used, and why others cannot."""
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
                        f"The adapter {digest[:12]} is bound but is not on this machine any more."
                    )
                check_usable(entry)
                if len(entries) == MAX_ADAPTERS:
                    raise AdapterError(
                        f"{entry.name} is not used: only {MAX_ADAPTERS} adapters are at a time."
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

    def _files(self) -> Any:
        state = []
        for path in (self._bindings.path, self._registry.root / "index.json"):
            try:
                state.append((path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino))
            except OSError:
                state.append((0, 0, 0))
        return state

    async def _answer_requests(self) -> None:
        """Ask the user about what open workspaces ask for, each once."""
        if self.ask is None or self._engine is None:
            return
        for asked in await asyncio.to_thread(self._undecided):
            place = (asked.workspace, asked.entry.digest)
            if place in self._asked:
                continue
            self._asked.add(place)
            if (agreed := await self.ask(asked)) is None:
                continue
            if agreed:
                await asyncio.to_thread(self._bindings.bind, asked.entry.digest, workspace=asked.workspace)
                await self.update()
            else:
                await asyncio.to_thread(self._bindings.refuse, asked.workspace, asked.entry.digest)

    def _undecided(self) -> list[Asked]:
        bound = self._bindings.read()
        known = {entry.digest: entry for entry in self._registry.entries()}
        found = []
        for folder in self._folders:
            digest = asked_by(folder)
            entry = known.get(digest or "")
            decided = str(folder) in bound.workspaces or digest in bound.refused.get(str(folder), ())
            if entry is not None and entry.judgement.usable and not decided:
                found.append(Asked(folder, entry))
        return found


_NOT_SERVED = "The adapters that you have chosen are not used: the engine cannot have any."


def _sources(entries: dict[str, Entry]) -> list[AdapterSource]:
    return [AdapterSource(entry.digest, entry.name, entry.path) for entry in entries.values()]
