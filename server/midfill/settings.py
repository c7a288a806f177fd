"""Settings: one typed schema, read from the user's own file and from the editor.

The user's file is `config.toml` in the user's configuration folder (`MIDFILL_CONFIG` names another).
Editors send the same keys in `initializationOptions` and `workspace/didChangeConfiguration`, where
camelCase is understood too. Files of a workspace set nothing: they may come from anyone.

Who may set a key, and whether a running server follows, is data: the `Policy` of its field. A field without
one is the file's alone.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from midfill.errors import SettingsError
from midfill.system import text_files as textfiles
from midfill.text.secret_filter import SECRET_FILES

_RESTART = "It takes effect when the server starts."


class Scope(StrEnum):
    """Who may set a setting."""

    FILE = "file"
    """The user's own settings file and the command line. An editor may pass on what a workspace's own files
    say, and these settings say where code is sent and what is run."""
    EDITOR = "editor"
    """The user's settings of an editor, too."""
    PROJECT = "project"
    """The settings of a project, too, in an editor that keeps those of projects which the user trusts, as VS
    Code does."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a setting may be set.

    Attributes:
        scope: who may set it.
        restart: a running server keeps the value that it has started with.
    """

    scope: Scope
    restart: bool = False


_AT_START_FROM_FILE = Policy(Scope.FILE, restart=True)
_AT_START = Policy(Scope.EDITOR, restart=True)
_ANY_TIME = Policy(Scope.EDITOR)
_BY_PROJECT = Policy(Scope.PROJECT)

ENGINES_HERE = ("auto", "local", "shared")


class Settings(BaseModel):
    """Every setting, with its default, range and meaning."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
    )

    enabled: Annotated[bool, _BY_PROJECT] = Field(
        default=True, description="Whether suggestions are made at all."
    )
    model: Annotated[str, _AT_START] = Field(
        default="qwen2.5-coder-0.5b",
        min_length=1,
        description="Catalogue name, Hugging Face id, local folder or GGUF file of the model.",
    )
    family: Annotated[str | None, _AT_START] = Field(
        default=None,
        description="FIM family of a model that midfill does not recognise, for example `starcoder`.",
    )
    adapter: Annotated[str | None, _AT_START] = Field(
        default=None,
        description="One LoRA adapter for everything, whatever `midfill adapter use` says: a folder in PEFT "
        "format, or a name of `midfill adapter list`.",
    )
    adapter_holdout: Annotated[bool, _AT_START] = Field(
        default=False,
        description="Whether one session in ten is without the adapters that `midfill adapter use` chose, "
        "so that `midfill adapter stats` can compare.",
    )
    engine: Annotated[str | tuple[str, ...], _AT_START_FROM_FILE] = Field(
        default="auto",
        description="Who runs the model: `auto` or `local` is midfill itself, `shared` one process for all "
        "your editors, a URL (or several, in a list) a server that has it.",
    )
    engine_model: Annotated[str | None, _AT_START_FROM_FILE] = Field(
        default=None, description="The model to use, as that server calls it; none: its first."
    )
    engine_api: Annotated[
        Literal["auto", "vllm", "sglang", "llama.cpp", "ollama", "mistral", "openai", "midfill"],
        _AT_START_FROM_FILE,
    ] = Field(default="auto", description="What kind of server it is; `auto` asks it.")
    engine_key: Annotated[str, _AT_START_FROM_FILE] = Field(
        default="env:MIDFILL_API_KEY",
        pattern=r"^(env|keyring|command):.+$",
        description="Where that server's key comes from: `env:NAME`, `keyring:SERVICE/USER` or "
        "`command:PROGRAM`.",
    )
    engine_ca: Annotated[str | None, _AT_START_FROM_FILE] = Field(
        default=None, description="A file of certificates (PEM) to trust beside the system's."
    )
    engine_fallback: Annotated[bool, _AT_START_FROM_FILE] = Field(
        default=False,
        description="Whether the model `model` runs here while that server does not answer.",
    )
    engine_unload_min: Annotated[float, _AT_START_FROM_FILE] = Field(
        default=15.0,
        ge=0,
        le=100_000,
        description="Minutes without a request after which a shared engine's model leaves memory; 0: never.",
    )
    engine_exit_min: Annotated[float, _AT_START_FROM_FILE] = Field(
        default=60.0,
        ge=0,
        le=100_000,
        description="The same for the end of its process.",
    )
    device: Annotated[str, _AT_START] = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `cuda` or `cuda:N`.",
    )
    dtype: Annotated[Literal["auto", "int8", "float32", "bfloat16"], _AT_START] = Field(
        default="auto",
        description="Number format of the weights; `auto` is int8 on a CPU and bfloat16 on a GPU.",
    )
    runner: Annotated[Literal["auto", "openvino", "torch"], _AT_START] = Field(
        default="auto",
        description="What runs the model; `auto` is OpenVINO for int8 on a CPU where it can, else torch.",
    )
    num_threads: Annotated[int, _AT_START] = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads; 0 means one per physical core (torch takes fewer while others are busy).",
    )
    prefix_tokens: Annotated[int, _ANY_TIME] = Field(
        default=256, ge=16, le=65_536, description="Most tokens of the prompt from before the cursor."
    )
    suffix_tokens: Annotated[int, _ANY_TIME] = Field(
        default=128, ge=0, le=65_536, description="Most tokens of the prompt from after the cursor."
    )
    context: Annotated[tuple[Literal["imports", "open", "repository", "edits"], ...], _BY_PROJECT] = Field(
        default=(),
        description="What the prompt may show of other files: what is defined by `imports`, pieces of `open` "
        "documents and of the whole `repository`, recent `edits`. Empty: nothing, and no file is read.",
    )
    context_tokens: Annotated[int, _ANY_TIME] = Field(
        default=256, ge=0, le=65_536, description="Most tokens of the prompt from other files."
    )
    max_new_tokens: Annotated[int, _BY_PROJECT] = Field(
        default=32, ge=1, le=1024, description="Most tokens that a suggestion may have."
    )
    max_new_tokens_invoked: Annotated[int, _BY_PROJECT] = Field(
        default=64,
        ge=1,
        le=1024,
        description="The same where the suggestion was asked for explicitly, if that is more.",
    )
    popup_budget_ms: Annotated[int, _ANY_TIME] = Field(
        default=80,
        ge=0,
        le=60_000,
        description="Most milliseconds that the popup waits for the model; what comes later is in the popup "
        "at the next key.",
    )
    layout: Annotated[Literal["auto", "anchored", "appending", "psm", "spm"], _ANY_TIME] = Field(
        default="auto",
        description="Order of the prompt's parts, for measurements; `auto` is what was measured best for "
        "the model's family.",
    )
    healing: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Whether a half-typed word is taken back and completed as a whole; off for measurements.",
    )
    prefetch: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Compute what comes next, as if the suggestion on the screen had been accepted, while "
        "the model has nothing else to do.",
    )
    eagerness: Annotated[Literal["low", "normal", "high", "always"], _BY_PROJECT] = Field(
        default="normal",
        description="How readily something is shown unasked: `low` only what is rated highest, `normal` and "
        "`high` more, `always` whatever the model wrote. Asking explicitly always shows it.",
    )
    deadline_s: Annotated[float, _ANY_TIME] = Field(
        default=10.0, ge=0.1, le=600, description="Seconds after which a request is given up."
    )
    disabled_languages: Annotated[tuple[str, ...], _BY_PROJECT] = Field(
        default=(),
        description="Languages that get no suggestions, as any editor calls them, for example `markdown`.",
    )
    excluded_files: Annotated[tuple[str, ...], _ANY_TIME] = Field(
        default=SECRET_FILES,
        description="Patterns of names (or of the ends of paths) of files that get no suggestions and are "
        "never shown to the model.",
    )
    detect_secrets: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Whether a file in which a password, a token or a private key is found gets no "
        "suggestions either.",
    )
    count_feedback: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Whether accepted suggestions are counted, on this machine only and without their text; "
        "`midfill status` shows the counts.",
    )
    max_file_kb: Annotated[Annotated[int, Field(ge=1)], _ANY_TIME] = Field(
        default=20_000, description="Documents larger than this many kilobytes get no suggestions."
    )

    @field_validator("engine")
    @classmethod
    def _is_a_place(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value in ENGINES_HERE:
            return value
        urls = (value,) if isinstance(value, str) else value
        for url in urls:
            parts = urlsplit(url)
            plain = url.isprintable() and " " not in url
            whole = parts.scheme in {"http", "https"} and parts.hostname and _is_port(parts)
            if not plain or not whole or parts.username or parts.query:
                raise ValueError(
                    f"{url!r} is none of {', '.join(ENGINES_HERE)} and no URL like http://host:8000"
                )
        if not urls:
            raise ValueError("no URL is named")
        return value

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """The servers that have the model; none where it runs on this machine."""
        if self.engine in ENGINES_HERE:
            return ()
        return (self.engine,) if isinstance(self.engine, str) else self.engine


def _is_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def policy(name: str) -> Policy:
    """Return how a setting may be set. One that does not say is the file's alone."""
    metadata = Settings.model_fields[name].metadata
    return next((one for one in metadata if isinstance(one, Policy)), _AT_START_FROM_FILE)


def changed(settings: Settings) -> list[str]:
    """Return the names of the settings that are not at their defaults."""
    default = Settings()
    return [name for name in Settings.model_fields if getattr(settings, name) != getattr(default, name)]


def config_path() -> Path:
    """Where the user's own settings file is (it need not exist)."""
    if named := os.environ.get("MIDFILL_CONFIG"):
        return Path(named)
    return platformdirs.user_config_path("midfill") / "config.toml"


def load(path: Path | None = None) -> Settings:
    """Read the user's settings file; defaults where there is none.

    Raises `SettingsError` naming the file and the key.
    """
    path = path or config_path()
    return parse(_read(path), where=str(path))


def parse(values: Mapping[str, Any], *, base: Settings | None = None, where: str = "settings") -> Settings:
    """Check `values` and lay them over `base`. Raises `SettingsError` naming every bad key."""
    settings, problems = merge(values, base or Settings())
    if problems:
        raise SettingsError(f"{where}: " + " ".join(problems))
    return settings


def merge(values: Any, base: Settings, own: Settings | None = None) -> tuple[Settings, list[str]]:
    """Lay the good ones of `values` over `base`; say what is wrong with the others, a sentence each.

    `values` is whatever an editor sent: junk leaves `base` as it is, and so does what is the file's alone. A
    null takes a setting back: it becomes what the user's own file says (`own`; None if that file is what is
    being read).
    """
    if values is None or values == []:
        # An empty table of Lua is a list as soon as it is JSON.
        return base, []
    if not isinstance(values, Mapping):
        return base, [f"Settings must be an object, not {type(values).__name__}."]
    names = {alias: name for name in Settings.model_fields for alias in (name, to_camel(name))}
    merged = base.model_dump()
    problems = []
    for key, value in values.items():
        name = names.get(key)
        if name is None:
            # A client that is newer than the server takes back what the server never knew.
            if value is not None:
                problems.append(f"Unknown setting {key!r}.")
            continue
        if own is not None and policy(name).scope is Scope.FILE:
            problems.append(f"Setting {key!r} is taken from {config_path()} only, not from an editor.")
            continue
        if value is None and own is not None:
            merged[name] = getattr(own, name)
            continue
        value = tuple(value) if isinstance(value, list) else value  # noqa: PLW2901 - JSON has no tuples
        try:
            Settings.model_validate({name: value})
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            problems.append(f"Setting {key!r}: {what}; {value!r:.80} was ignored.")
        else:
            merged[name] = value
    return Settings.model_validate(merged), problems


def keep_start_only(new: Settings, old: Settings) -> tuple[Settings, list[str]]:
    """Undo changes of settings that count only at the start; a sentence for each that was changed.

    A running server's model, adapter and device were chosen when it started, and stay.
    """
    kept = {
        name: getattr(old, name)
        for name in Settings.model_fields
        if policy(name).restart and getattr(new, name) != getattr(old, name)
    }
    return new.model_copy(update=kept), [
        f"Setting {name!r}: restart the server to change it." for name in kept
    ]


def store(key: str, value: str | float | bool, path: Path | None = None) -> Path:
    """Write one setting into the user's file; all else in it stays as it is. Returns the file's path.

    Comments, the order, line ends, a byte order mark, the mode and a symbolic link stay, too.
    Raises `SettingsError` for a bad key or value, or a file that cannot be read or written.
    """
    import tomlkit  # noqa: PLC0415 - the server writes no settings
    from tomlkit.exceptions import TOMLKitError  # noqa: PLC0415

    path = path or config_path()
    values = _read(path)
    # A user may have spelled the key as editors do.
    spelled = to_camel(key) if to_camel(key) in values else key
    parse(values | {spelled: value}, where=str(path))
    try:
        before = path.read_bytes().decode() if path.exists() else ""
        document = tomlkit.parse(before.removeprefix(textfiles.BOM))
        document[spelled] = value
        after = tomlkit.dumps(document)
        if 0 < before.count("\n") == before.count("\r\n"):
            # What was added ends as the other lines do.
            after = after.replace("\r\n", "\n").replace("\n", "\r\n")
        if tomllib.loads(after) != values | {spelled: value}:
            raise SettingsError(f"Cannot put {key!r} into {path}: write it there yourself.")
        textfiles.replace(path, (textfiles.BOM if before.startswith(textfiles.BOM) else "") + after)
    except (OSError, TOMLKitError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"Cannot write {path}: {why}.") from error
    return path


# How server/docs/settings.md says who may set a setting.
_MAY_SET = {Scope.FILE: "file", Scope.EDITOR: "file, editor", Scope.PROJECT: "file, editor, project"}


def markdown_table() -> str:
    """Return the table of server/docs/settings.md; a test compares the two."""
    rows = ["| setting | default | set in | a change counts | meaning |", "|---|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        own = policy(name)
        default = "none" if field.default is None else f"`{_as_toml(field.default)}`"
        when = "at the next start" if own.restart else "at once"
        rows.append(f"| `{name}` | {default} | {_MAY_SET[own.scope]} | {when} | {field.description} |")
    return "\n".join(rows) + "\n"


def _as_toml(value: str | float | bool | tuple[str, ...]) -> str:
    # On values of the schema the two notations differ in nothing else.
    return json.dumps(value, ensure_ascii=False)


def vscode_settings() -> dict[str, dict[str, Any]]:
    """The settings as an extension of VS Code declares them; a test compares them.

    What is no project's business has the scope "machine": VS Code takes it from the user's own settings only.
    The tag "restart" is on what counts only at the start. What an editor may not set is left out.
    """
    declared = {}
    for name, schema in Settings.model_json_schema(by_alias=False)["properties"].items():
        own = policy(name)
        if own.scope is Scope.FILE:
            continue
        text = schema.pop("description")
        del schema["title"]
        if "anyOf" in schema:
            schema["type"] = [one["type"] for one in schema.pop("anyOf")]
        declared[f"midfill.{to_camel(name)}"] = schema | {
            "markdownDescription": f"{text} {_RESTART}" if own.restart else text,
            "scope": "window" if own.scope is Scope.PROJECT else "machine",
            "tags": ["restart"] if own.restart else [],
        }
    return declared


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(textfiles.read(path))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        said = str(error).rstrip(".")
        raise SettingsError(f"Cannot read {path}: {said}. Mend or delete the file.") from error
