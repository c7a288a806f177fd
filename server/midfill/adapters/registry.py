"""The adapters on this machine: immutable folders, an index file, a lock.

A folder is named by the SHA-256 of its content and is renamed into place when complete; the index is replaced
atomically. Several processes may use both at the same time. Only adapters that fit their base model are
registered. Knows nothing of where an adapter is used, see `bindings`. Runs on any thread.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from filelock import FileLock, Timeout

from midfill.errors import AdapterError
from midfill.system import text_files
from midfill.system.folders import data_folder
from midfill.system.json_files import read_json
from midfill.system.private import private_folder

VERDICTS = ("enabled", "rejected", "inconclusive", "none")

_FORMAT = 1
_LOCK_S = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{8,64})")


class BaseModel(Protocol):
    """What the registry needs of a base model; `models.store.LocalModel` is one."""

    @property
    def name(self) -> str:
        """Catalogue name, hub id or path."""
        ...

    @property
    def path(self) -> Path:
        """The folder."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an adapter's evaluation on later commits.

    Attributes:
        verdict: one of `VERDICTS`; "none" if never evaluated. Only "enabled" means better than the base.
        reasons: reasons of the verdict, a sentence each.
        forced: whether the user chose to use it in spite of the verdict.
        details: the figures, for JSON.
    """

    verdict: Literal["enabled", "rejected", "inconclusive", "none"] = "none"
    reasons: tuple[str, ...] = ()
    forced: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise AdapterError(f"There is no verdict {self.verdict!r}; use {', '.join(VERDICTS)}.")

    @property
    def usable(self) -> bool:
        """Whether the adapter may be used: better than its base, never evaluated, or forced."""
        return self.verdict in {"enabled", "none"} or self.forced


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter of the registry.

    Attributes:
        name: unique; chosen by the user.
        digest: from `format.digest_of`; the folder's name.
        base: the base model's name.
        fingerprint: of the base model, from `format.fingerprint_of`.
        created: when it was added, in ISO 8601.
        rank: the largest rank of its branches.
        num_parameters: number of weights of all branches.
        source: where it came from, for the user.
        evaluation: the result of its evaluation.
        path: its folder, in PEFT's format.
    """

    name: str
    digest: str
    base: str
    fingerprint: str
    created: str
    rank: int
    num_parameters: int
    source: str
    evaluation: Evaluation
    path: Path

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        return asdict(self) | {"path": str(self.path)}


class Registry:
    """The adapters below a folder.

    Args:
        root: the folder; by default `adapters` in `data_folder()`. It need not exist.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_folder() / "adapters"
        self._index = self.root / "index.json"

    def entries(self) -> list[Entry]:
        """Return all adapters, the oldest first. Raises `AdapterError` if the index cannot be read."""
        try:
            content = read_json(self._index)
            if content["format"] != _FORMAT:
                raise AdapterError(
                    f"{self._index} was written by another version of midfill. Update midfill, or delete the "
                    "file."
                )
            entries = [self._entry(values) for values in content["adapters"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{self._index} cannot be read ({error!r}). Repair or delete it.") from error
        return sorted(entries, key=lambda entry: entry.created)

    def find(self, name: str) -> Entry | None:
        """Return the adapter with this name or digest (at least eight digits of it), or None."""
        entries = self.entries()
        if named := next((entry for entry in entries if entry.name == name), None):
            return named
        if (match := _DIGEST.fullmatch(name)) is None:
            return None
        found = [entry for entry in entries if entry.digest.startswith(match[2])]
        return found[0] if len(found) == 1 else None

    def get(self, name: str) -> Entry:
        """Return the adapter with this name or digest. Raises `AdapterError` if there is none."""
        if (found := self.find(name)) is None:
            known = ", ".join(entry.name for entry in self.entries()) or "none"
            raise AdapterError(f"There is no adapter {name!r} on this machine. Adapters here: {known}.")
        return found

    def add(
        self,
        folder: Path,
        *,
        name: str,
        base: BaseModel,
        evaluation: Evaluation | None = None,
        source: str = "",
    ) -> Entry:
        """Copy the adapter of a folder into the registry.

        Only the configuration and the weights are copied. If the adapter is registered under this name
        already, only its evaluation is updated, if one is given.

        Args:
            folder: in PEFT's format.
            name: letters, digits, ".", "_" and "-"; not taken by another adapter.
            base: the model that it was trained on, on this machine.
            evaluation: by default that it was never evaluated.
            source: where it came from, for the user.

        Raises:
            AdapterError: it is no adapter, does not fit the model, or the name is taken.
            ModelError: the base model's files cannot be read.
        """
        from midfill.adapters import format as peft_format

        check_name(name)
        layers, fingerprint = peft_format.layers_of(base.path), peft_format.fingerprint_of(base.path)
        with self._locked(), self._copied(folder) as copy:
            # Check the copy: the original may change meanwhile.
            adapter = peft_format.read(copy, layers)
            entries = self.entries()
            if (known := _known(entries, name, adapter.digest)) is not None:
                changed = replace(known, evaluation=evaluation or known.evaluation)
                self._write([changed if entry is known else entry for entry in entries])
                return changed
            entry = Entry(
                name=name,
                digest=adapter.digest,
                base=base.name,
                fingerprint=fingerprint,
                created=datetime.now(UTC).isoformat(timespec="microseconds"),
                rank=adapter.rank,
                num_parameters=adapter.num_parameters,
                source=source,
                evaluation=evaluation or Evaluation(),
                path=self.root / adapter.digest,
            )
            if entry.path.exists():  # left by a process that ended before it wrote the index
                shutil.rmtree(entry.path)
            copy.rename(entry.path)
            self._write([*entries, entry])
        return entry

    def remove(self, name: str) -> Entry:
        """Remove an adapter and delete its folder. Raises `AdapterError` if there is none."""
        with self._locked():
            entry = self.get(name)
            self._write([other for other in self.entries() if other.digest != entry.digest])
            shutil.rmtree(entry.path, ignore_errors=True)
        return entry

    def set_evaluation(self, name: str, evaluation: Evaluation) -> Entry:
        """Replace the evaluation of an adapter."""
        return self._change(name, lambda _: evaluation)

    def force(self, name: str) -> Entry:
        """Record that the user wants to use an adapter in spite of its verdict."""
        return self._change(name, lambda evaluation: replace(evaluation, forced=True))

    def check(self, entry: Entry, base: BaseModel | None = None) -> None:
        """Raise `AdapterError` if an adapter's files have changed, or if it belongs to another model."""
        from midfill.adapters import format as peft_format

        if peft_format.digest_of(entry.path) != entry.digest:
            raise AdapterError(
                f"The files of {entry.name} in {entry.path} have changed since they were added. "
                f"Remove it (midfill adapter rm {entry.name}) and import it again."
            )
        if base is not None and peft_format.fingerprint_of(base.path) != entry.fingerprint:
            raise AdapterError(
                f"The adapter {entry.name} was trained on {entry.base}, and {base.name} is another model. "
                f"Use {entry.base}, or another adapter."
            )

    def _change(self, name: str, change: Any) -> Entry:
        with self._locked():
            entry = self.get(name)
            changed = replace(entry, evaluation=change(entry.evaluation))
            self._write([changed if other.digest == entry.digest else other for other in self.entries()])
        return changed

    def _entry(self, values: Mapping[str, Any]) -> Entry:
        evaluation = values["evaluation"]
        digest = values["digest"]
        if re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise AdapterError(
                f"{self._index} names a folder that is not an adapter's. Repair or delete the file."
            )
        return Entry(
            **{key: values[key] for key in _STORED},
            evaluation=Evaluation(**evaluation | {"reasons": tuple(evaluation["reasons"])}),
            path=self.root / digest,
        )

    def _write(self, entries: list[Entry]) -> None:
        content = {
            "format": _FORMAT,
            "adapters": [
                {key: value for key, value in asdict(entry).items() if key != "path"} for entry in entries
            ],
        }
        text_files.replace(self._index, json.dumps(content, indent=1), private=True)

    @contextlib.contextmanager
    def _copied(self, folder: Path) -> Iterator[Path]:
        """Copy an adapter's two files into a temporary folder, which may be renamed within the context."""
        from midfill.adapters import format as peft_format

        peft_format.read_config(folder)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".adding-", ignore_cleanup_errors=True) as new:
            copy = Path(new) / "adapter"
            copy.mkdir(mode=0o700)
            for name in (peft_format.CONFIG, peft_format.WEIGHTS):
                shutil.copyfile(folder / name, copy / name)
                (copy / name).chmod(0o400)
            yield copy

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.root):
            yield


_STORED = ("name", "digest", "base", "fingerprint", "created", "rank", "num_parameters", "source")


def _known(entries: list[Entry], name: str, digest: str) -> Entry | None:
    """Return the entry with this name and digest, or None.

    Raises `AdapterError` if the name belongs to another adapter, or the adapter has another name.
    """
    for entry in entries:
        if entry.digest == digest and entry.name != name:
            raise AdapterError(f"This adapter is registered already, as {entry.name!r}.")
        if entry.name == name and entry.digest != digest:
            raise AdapterError(
                f"The name {name!r} is taken by another adapter. Choose another name, or remove that "
                f"adapter: midfill adapter rm {name}"
            )
        if entry.name == name:
            return entry
    return None


def is_name(name: str) -> bool:
    """Return whether an adapter can have this name: it must not be a path, nor look like a digest."""
    return _NAME.fullmatch(name) is not None and _DIGEST.fullmatch(name) is None


def check_name(name: str) -> None:
    """Raise `AdapterError` if an adapter cannot have this name."""
    if not is_name(name):
        raise AdapterError(
            f"{name[:80]!r} is not a valid adapter name: use letters, digits, '.', '_' and '-'."
        )


def check_usable(entry: Entry) -> None:
    """Raise `AdapterError` if the verdict is against this adapter and the user has not overruled it."""
    if not entry.evaluation.usable:
        reasons = " ".join(entry.evaluation.reasons)
        raise AdapterError(
            f"The adapter {entry.name} has the verdict {entry.evaluation.verdict!r} and is not used. "
            f"{reasons} To use it anyway, run: midfill adapter use {entry.name} --force"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against changes by other processes. Raises `AdapterError`."""
    try:
        private_folder(folder)
        with FileLock(folder / ".lock", timeout=_LOCK_S, mode=0o600):
            yield
    except Timeout as error:
        raise AdapterError(
            f"Another midfill process has locked {folder} for more than {_LOCK_S:.0f} s. Try again."
        ) from error
    except OSError as error:
        raise AdapterError(f"{error.filename or folder} cannot be written: {error.strerror}.") from error
