"""Models on this machine: find, verify and publish model folders.

Every model in midfill's cache is a folder with config.json, tokenizer.json, safetensors weights and a
manifest, midfill.json, that is written last. Folders are built under a temporary name and then renamed, so an
incomplete one is never found. Uses no network, and imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from midfill.errors import ModelError
from midfill.models import catalogue
from midfill.models.catalogue import Entry
from midfill.system.file_errors import why_unreadable
from midfill.system.json_files import read_json
from midfill.system.private import private_folder

_MANIFEST = "midfill.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A complete model.

    Attributes:
        name: catalogue name, hub id or path, as the user chose it.
        path: the folder with config.json, tokenizer.json and safetensors weights, or a GGUF file.
        family: the FIM template that the catalogue names, or None.
        source: where the weights came from, for the user.
    """

    name: str
    path: Path
    family: str | None
    source: str


def cache_root() -> Path:
    """Return the folder of data that can be fetched again: $MIDFILL_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("MIDFILL_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("midfill")


def make_cache_root() -> Path:
    """Make the cache folder, for its owner only unless MIDFILL_CACHE names an existing folder; return it.

    Raises `OSError`.
    """
    return private_folder(cache_root(), tighten="MIDFILL_CACHE" not in os.environ)


def models_dir() -> Path:
    """Return the folder of the model folders."""
    return cache_root() / "models"


def find(name_or_path: str, known: Mapping[str, Entry] | None = None) -> LocalModel | None:
    """Return the model if it is on this machine and complete, or None.

    Searched in order: a catalogue name or hub id in midfill's cache, then in the hub's own cache; a path to a
    model folder; a path to a GGUF file that has been converted before. A relative path of the form "a/b" must
    be written "./a/b": otherwise a folder in the current directory, such as one of a cloned repository, could
    shadow a hub model.

    Args:
        name_or_path: what the user wrote.
        known: the catalogue; midfill's own by default.

    Raises:
        ModelError: the path exists, but is not a model that midfill can load.
    """
    entry = catalogue.lookup(name_or_path, known)
    if entry is None and (path := as_path(name_or_path)) is not None:
        if path.is_dir():
            return _from_folder(name_or_path, path)
        return read_folder(models_dir() / gguf_key(path), name=name_or_path)
    key = key_of(entry.name if entry else name_or_path)
    name = entry.name if entry else name_or_path
    if found := read_folder(models_dir() / key, name=name):
        return found
    hub = entry.hub if entry else name_or_path
    if catalogue.is_hub_id(hub) and (snapshot := _hub_snapshot(hub)):
        family = entry.family if entry else None
        return LocalModel(name, snapshot, family, f"{hub}, in the cache of huggingface_hub")
    return None


def find_for(name_or_path: str, runner: str, known: Mapping[str, Entry] | None = None) -> LocalModel | None:
    """Return the model in the form that a runner takes, or None: for "llamacpp" its GGUF file as it is.

    Raises `ModelError`.
    """
    if runner != "llamacpp":
        return find(name_or_path, known)
    path = find_gguf(name_or_path, known)
    if path is None:
        return None
    entry = catalogue.lookup(name_or_path, known)
    name = entry.name if entry else name_or_path
    return LocalModel(name, path, entry.family if entry else None, f"the file {path}")


def find_gguf(name_or_path: str, known: Mapping[str, Entry] | None = None) -> Path | None:
    """Return the GGUF file of a model: one that was pulled, or the user's own; else None."""
    entry = catalogue.lookup(name_or_path, known)
    if entry is None and (path := as_path(name_or_path)) is not None:
        return path if path.suffix.lower() == ".gguf" and path.is_file() else None
    kept = gguf_place(entry.name if entry else name_or_path)
    return kept if kept.is_file() else None


def gguf_place(name: str) -> Path:
    """Return the path at which `fetch.pull_gguf` keeps a GGUF file, complete and verified."""
    return cache_root() / "gguf" / f"{key_of(name)}.gguf"


def installed() -> list[LocalModel]:
    """Return every complete model in midfill's cache, by name."""
    folder = models_dir()
    if not folder.is_dir():
        return []
    found = (read_folder(path) for path in folder.iterdir() if not path.name.startswith("."))
    return sorted((model for model in found if model is not None), key=lambda model: model.name)


def as_path(name_or_path: str) -> Path | None:
    """Return the existing file or folder that a text names, or None if it is a model's name."""
    path = Path(name_or_path).expanduser()
    explicit = path.is_absolute() or name_or_path.startswith((".", "~")) or path.suffix.lower() == ".gguf"
    if not explicit and catalogue.is_hub_id(name_or_path):
        return None
    try:
        return path.absolute() if name_or_path.strip() and path.exists() else None
    except (OSError, ValueError):  # too long, or with a null byte: not a path
        return None


def key_of(name: str) -> str:
    """Return the folder name of a model in the cache."""
    return name.replace("/", "--").lower()


def gguf_key(path: Path) -> str:
    """Return the folder name of a converted GGUF file, which depends on the file's path, size and date."""
    resolved = path.resolve()
    stat = resolved.stat()
    identity = f"{resolved}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return f"gguf--{key_of(path.stem)}--{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a model folder.

    Raises:
        ModelError: it is missing, or is not a JSON object.
    """
    file = path / "config.json"
    try:
        config = read_json(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {why_unreadable(error)}.") from error
    except ValueError as error:
        raise ModelError(f"{file} cannot be used: {error}. Fetch the model again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a JSON object. Fetch the model again.")
    return config


def read_folder(folder: Path, name: str | None = None) -> LocalModel | None:
    """Return the model in a folder of midfill's cache, or None if it is missing or incomplete."""
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["format"] != _FORMAT:
            return None
        for file, facts in manifest["files"].items():
            if not _is_inside(file) or (folder / file).stat().st_size != facts["bytes"]:
                return None
        found = LocalModel(name or manifest["name"], folder, manifest["family"], manifest["source"])
        texts = (found.name, found.source, "" if found.family is None else found.family)
        return found if all(isinstance(text, str) for text in texts) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def verify(folder: Path) -> None:
    """Compare the files of a folder of midfill's cache with their hashes; do nothing for other folders.

    A file that was not modified since it was hashed is not hashed again: that takes 0.7 s for 1 GB.

    Raises:
        ModelError: a file differs from what was pulled or converted.
    """
    try:
        files = read_json(folder / _MANIFEST)["files"]
        for file, facts in files.items():
            inside = _is_inside(file)
            if inside and (folder / file).stat().st_mtime_ns == facts.get("mtime_ns"):
                continue
            # A pipe or a device could block for ever.
            if not inside or not (folder / file).is_file():
                raise ModelError(f"The manifest of {folder} names {file!r}, which is no file in it.")
            with (folder / file).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                    raise ModelError(
                        f"{folder / file} is damaged: its SHA-256 has changed since it was pulled. "
                        f"Delete {folder} and pull the model again."
                    )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return


@contextmanager
def new_folder(key: str) -> Iterator[Path]:
    """Give an empty folder to build a model in; delete it at the end, unless `publish` has renamed it.

    The caller holds the model's lock, so remains of an interrupted run can be deleted.
    """
    building = models_dir() / f".building-{key}"
    shutil.rmtree(building, ignore_errors=True)
    make_cache_root()
    building.mkdir(parents=True)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def publish(building: Path, key: str, *, name: str, family: str | None, source: str) -> LocalModel:
    """Publish a built folder: check it, sync it to disk, add the manifest, rename it into place.

    Raises:
        ModelError: the folder is not a complete model.
    """
    check_folder(building)
    files = {}
    for path in sorted(path for path in building.iterdir() if path.is_file()):
        with path.open("rb") as stream:
            files[path.name] = {
                "bytes": path.stat().st_size,
                "mtime_ns": path.stat().st_mtime_ns,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            }
            _sync(stream.fileno())
    from midfill import __version__

    manifest = {
        "format": _FORMAT,
        "name": name,
        "family": family,
        "source": source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "midfill": __version__,
        "files": files,
    }
    with (building / _MANIFEST).open("w", encoding="utf-8") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        _sync(out.fileno())
    target = models_dir() / key
    if target.exists():  # incomplete, or of an older format: `find` did not take it
        old = models_dir() / f".old-{key}"
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
        shutil.rmtree(old, ignore_errors=True)
    building.replace(target)
    return LocalModel(name, target, family, source)


def check_folder(folder: Path) -> None:
    """Check that a model folder has everything that the engine reads.

    Raises:
        ModelError: something is missing, or the weights are pickled.
    """
    read_config(folder)
    weights = _weight_files(folder)
    if not weights:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise ModelError(
                f"{folder} holds its weights in Python's pickle format, which can run code when loaded; "
                "midfill refuses it. If you trust it, convert it to safetensors with transformers: "
                "from_pretrained(...).save_pretrained(...)."
            )
        if gguf := next(folder.glob("*.gguf"), None):
            raise ModelError(f"{folder} is not a model folder. To use the GGUF file in it, name it: {gguf}")
        raise ModelError(f"{folder} has no weights: there is no *.safetensors file in it.")
    for name in weights:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is incomplete: the weights {name} are missing. Fetch it again.")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json. Make one with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) into this folder."
        )


def _from_folder(name: str, folder: Path) -> LocalModel:
    """Return the model in a folder that the user has named; one of midfill's own keeps its family."""
    check_folder(folder)
    own = read_folder(folder)
    return LocalModel(
        name, folder, own.family if own else None, own.source if own else f"the folder {folder}"
    )


def _weight_files(folder: Path) -> list[str]:
    """Return the names of all safetensors files that the folder should have."""
    try:
        index = read_json(folder / "model.safetensors.index.json")
        names = sorted(map(str, set(index["weight_map"].values())))
    except OSError:
        return sorted(path.name for path in folder.glob("*.safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"The index of the weights in {folder} is damaged. Fetch it again.") from error
    if not all(map(_is_inside, names)):
        raise ModelError(f"The index of the weights in {folder} names files outside the folder.")
    return names


def _is_inside(name: str) -> bool:
    """Return whether a name is a plain file name that cannot lead to another folder."""
    return Path(name).name == name and "\0" not in name and "\\" not in name


def _hub_snapshot(hub: str) -> Path | None:
    """Return the main snapshot of a repository in the hub library's cache, if it is a complete model."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{hub.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshot = repository / "snapshots" / commit
        check_folder(snapshot)
    except (OSError, ModelError):
        return None
    return snapshot


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems refuse it for files opened to read; the hash in the manifest still protects.
        return
