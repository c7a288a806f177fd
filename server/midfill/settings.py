"""Settings: one typed schema, read from the user's own file and from the editor.

The user's file is `config.toml` in the user's configuration folder (`MIDFILL_CONFIG` names another).
Editors send the same keys in `initializationOptions` and `workspace/didChangeConfiguration`, in snake_case or
camelCase. Files of a workspace set nothing: they may come from anyone.

The `Policy` of a field says who may set it, and whether a running server takes a change. A field without one
may be set in the user's file only.
"""

from __future__ import annotations

import json
import os
import re
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
from midfill.system import text_files
from midfill.system.file_errors import why_unreadable, why_unwritable
from midfill.system.printable import printable
from midfill.text.secret_filter import SECRET_FILES

_RESTART = "Restart the server to apply a change."


class Scope(StrEnum):
    """Who may set a setting. Each scope includes those before it."""

    FILE = "file"
    """The user's own settings file and the command line. Not an editor: it may pass on what files of a
    workspace say, and these settings decide where code is sent and which programs are run."""
    EDITOR = "editor"
    """The user's settings in an editor."""
    PROJECT = "project"
    """The settings of a project, in an editor that asks the user which projects to trust, as VS Code does."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may set a setting, and when a change takes effect.

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

LOCAL_ENGINES = ("auto", "local", "shared")

# The form of a setting with a pattern, for error messages.
_FORMS = {
    "device": "use `auto`, `cpu`, `cuda`, `cuda:N`, `mps` or `xpu`",
    "engine_key": "say where the key is read from: `env:NAME`, `keyring:SERVICE/USER` or `command:PROGRAM`",
}
# Their values are not quoted in error messages: a user may have written the secret itself.
_UNQUOTED = {"engine_key"}


class Settings(BaseModel):
    """Every setting, with its default, range and description for users."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        protected_namespaces=(),
    )

    enabled: Annotated[bool, _BY_PROJECT] = Field(default=True, description="Show suggestions.")
    model: Annotated[str, _AT_START] = Field(
        default="qwen2.5-coder-0.5b",
        min_length=1,
        description="The model that writes the suggestions: a name of `midfill model list`, a Hugging Face "
        "id, a local folder or a GGUF file.",
    )
    family: Annotated[str | None, _AT_START] = Field(
        default=None,
        description="Fill-in-the-middle format of the model, for example `starcoder`. Only needed for a "
        "model that midfill does not recognise.",
    )
    adapter: Annotated[str | None, _AT_START] = Field(
        default=None,
        description="LoRA adapter for all files, in place of those chosen with `midfill adapter use`: a "
        "folder in PEFT format, or a name of `midfill adapter list`.",
    )
    adapter_holdout: Annotated[bool, _AT_START] = Field(
        default=False,
        description="Run one session in ten without the adapters chosen with `midfill adapter use`, so that "
        "`midfill adapter stats` can compare sessions with and without them.",
    )
    engine: Annotated[str | tuple[str, ...], _AT_START_FROM_FILE] = Field(
        default="auto",
        description="Where the model runs. `auto` or `local`: in the server itself. `shared`: in one "
        "process for all your editors. A URL, or a list of URLs: on a model server.",
    )
    engine_model: Annotated[str | None, _AT_START_FROM_FILE] = Field(
        default=None,
        description="If `engine` is a URL: the name of the model on that server. Without it: the first that "
        "the server lists.",
    )
    engine_api: Annotated[
        Literal["auto", "vllm", "sglang", "llama.cpp", "ollama", "mistral", "openai", "midfill"],
        _AT_START_FROM_FILE,
    ] = Field(
        default="auto",
        description="If `engine` is a URL: the kind of that server. `auto`: detect it.",
    )
    engine_key: Annotated[str, _AT_START_FROM_FILE] = Field(
        default="env:MIDFILL_API_KEY",
        pattern=r"^(env|keyring|command):.+$",
        description="If `engine` is a URL: where its API key is read from. `env:NAME`: an environment "
        "variable. `keyring:SERVICE/USER`: the system's keyring. `command:PROGRAM`: the output of a "
        "program.",
    )
    engine_ca: Annotated[str | None, _AT_START_FROM_FILE] = Field(
        default=None,
        description="If `engine` is a URL: a file of certificates (PEM) to trust in addition to the "
        "system's.",
    )
    engine_fallback: Annotated[bool, _AT_START_FROM_FILE] = Field(
        default=False,
        description="If `engine` is a URL: run `model` on this machine while that server does not answer.",
    )
    engine_unload_min: Annotated[float, _AT_START_FROM_FILE] = Field(
        default=15.0,
        ge=0,
        le=100_000,
        description="Minutes without a request after which a shared engine unloads its model from memory. "
        "0: never.",
    )
    engine_exit_min: Annotated[float, _AT_START_FROM_FILE] = Field(
        default=60.0,
        ge=0,
        le=100_000,
        description="Minutes without a request after which the process of a shared engine exits. 0: never.",
    )
    device: Annotated[str, _AT_START] = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$",
        description="Device that runs the model: `cpu`, `cuda` (NVIDIA and AMD), `cuda:N` for one of several "
        "GPUs, `mps` (Apple), `xpu` (Intel). `auto`: an NVIDIA or AMD GPU if it can run the model, otherwise "
        "the CPU.",
    )
    dtype: Annotated[Literal["auto", "int8", "int4", "float32", "bfloat16", "float16"], _AT_START] = Field(
        default="auto",
        description="Number format of the model's weights. `auto`: int8 on a CPU; on a GPU 16 bits, or "
        "fewer if its memory is too small for them.",
    )
    runner: Annotated[Literal["auto", "openvino", "torch", "llamacpp"], _AT_START] = Field(
        default="auto",
        description="Library that runs the model. `auto`: OpenVINO for int8 on a CPU if it supports the "
        "model, otherwise torch. `llamacpp`: llama.cpp runs the model's GGUF file as it is; it needs the "
        "package xllamacpp, in the version that `midfill doctor` names.",
    )
    num_threads: Annotated[int, _AT_START] = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads that run the model. 0: one per physical core (torch uses fewer while other "
        "programs are busy).",
    )
    prefix_tokens: Annotated[int, _ANY_TIME] = Field(
        default=256, ge=16, le=65_536, description="Maximum prompt tokens taken from before the cursor."
    )
    suffix_tokens: Annotated[int, _ANY_TIME] = Field(
        default=128, ge=0, le=65_536, description="Maximum prompt tokens taken from after the cursor."
    )
    context: Annotated[tuple[Literal["imports", "open", "repository", "edits"], ...], _BY_PROJECT] = Field(
        default=(),
        description="What the prompt may contain from other files: definitions that the file imports "
        "(`imports`), parts of open documents (`open`) and of the whole repository (`repository`), recent "
        "edits (`edits`). Empty: nothing, and no other file is read.",
    )
    context_tokens: Annotated[int, _ANY_TIME] = Field(
        default=256, ge=0, le=65_536, description="Maximum prompt tokens taken from other files."
    )
    max_new_tokens: Annotated[int, _BY_PROJECT] = Field(
        default=32, ge=1, le=1024, description="Maximum length of a suggestion, in tokens."
    )
    max_new_tokens_invoked: Annotated[int, _BY_PROJECT] = Field(
        default=64,
        ge=1,
        le=1024,
        description="Maximum length, in tokens, of a suggestion that you ask for explicitly; if it is less "
        "than `max_new_tokens`, that counts.",
    )
    popup_budget_ms: Annotated[int | None, _ANY_TIME] = Field(
        default=None,
        ge=0,
        le=60_000,
        description="Maximum time, in milliseconds, that the completion popup waits for the model. A "
        "suggestion that takes longer is in the popup at the next keystroke. Without a value: 80, and in "
        "Helix, which adds late items to its popup itself, as long as the model takes.",
    )
    layout: Annotated[Literal["auto", "anchored", "appending", "psm", "spm"], _ANY_TIME] = Field(
        default="auto",
        description="Order of the prompt's parts, for experiments. `auto`: the order that measured best for "
        "the model's family.",
    )
    healing: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Complete a half-typed word as a whole (token healing). Off for experiments only.",
    )
    prefetch: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="While the model is idle, compute the suggestion that would follow if you accepted the "
        "one that is shown.",
    )
    eagerness: Annotated[Literal["low", "normal", "high", "always"], _BY_PROJECT] = Field(
        default="normal",
        description="How likely a suggestion must be right to be shown while you type. `low`: only the most "
        "likely ones. `normal`, `high`: more. `always`: everything. What you ask for explicitly is always "
        "shown.",
    )
    deadline_s: Annotated[float, _ANY_TIME] = Field(
        default=10.0,
        ge=0.1,
        le=600,
        description="Seconds after which a request ends without a suggestion.",
    )
    disabled_languages: Annotated[tuple[str, ...], _BY_PROJECT] = Field(
        default=(),
        description="Languages without suggestions, for example `markdown`. The names of any editor work.",
    )
    excluded_files: Annotated[tuple[str, ...], _ANY_TIME] = Field(
        default=SECRET_FILES,
        description="Files that get no suggestions and are never shown to the model: patterns of their "
        "names, or of the ends of their paths.",
    )
    detect_secrets: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Give no suggestions in a file that contains a password, a token or a private key.",
    )
    count_feedback: Annotated[bool, _ANY_TIME] = Field(
        default=True,
        description="Count how many suggestions you accept, on this machine only and without their text. "
        "`midfill status` shows the counts.",
    )
    max_file_kb: Annotated[Annotated[int, Field(ge=1)], _ANY_TIME] = Field(
        default=20_000, description="Give no suggestions in documents larger than this many kilobytes."
    )

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value in LOCAL_ENGINES:
            return value
        urls = (value,) if isinstance(value, str) else value
        for url in urls:
            parts = urlsplit(url)
            plain = url.isprintable() and " " not in url
            whole = parts.scheme in {"http", "https"} and parts.hostname and _is_port(parts)
            if not plain or not whole or parts.username or parts.query:
                raise ValueError(
                    "use `auto`, `local`, `shared` or a URL such as http://host:8000; put a key into "
                    "`engine_key`"
                )
        if not urls:
            raise ValueError("the list of URLs is empty")
        return value

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """The URLs of the servers that run the model; empty if it runs on this machine."""
        if self.engine in LOCAL_ENGINES:
            return ()
        return (self.engine,) if isinstance(self.engine, str) else self.engine

    @property
    def longest_prompt(self) -> int:
        """The maximum number of tokens of a prompt with its output."""
        others = self.context_tokens if self.context else 0
        output = max(self.max_new_tokens, self.max_new_tokens_invoked)
        return self.prefix_tokens + self.suffix_tokens + others + output


def _is_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def policy(name: str) -> Policy:
    """Return the policy of a setting. Without one it may be set in the user's file only."""
    metadata = Settings.model_fields[name].metadata
    return next((one for one in metadata if isinstance(one, Policy)), _AT_START_FROM_FILE)


def changed(settings: Settings) -> list[str]:
    """Return the names of the settings that are not at their defaults."""
    default = Settings()
    return [name for name in Settings.model_fields if getattr(settings, name) != getattr(default, name)]


def config_path() -> Path:
    """Return the path of the user's own settings file, which need not exist."""
    if named := os.environ.get("MIDFILL_CONFIG"):
        return Path(named)
    return platformdirs.user_config_path("midfill") / "config.toml"


def load(path: Path | None = None) -> Settings:
    """Read the user's settings file; without one return the defaults.

    Raises `SettingsError` naming the file, the key and the value.
    """
    path = path or config_path()
    return parse(_read(path), where=str(path))


def parse(values: Mapping[str, Any], *, base: Settings | None = None, where: str = "settings") -> Settings:
    """Check `values` and put them over `base`. Raises `SettingsError` naming every bad key."""
    settings, problems = merge(values, base or Settings())
    if problems:
        raise SettingsError(f"{where}: " + " ".join(problems))
    return settings


def merge(values: Any, base: Settings, own: Settings | None = None) -> tuple[Settings, list[str]]:
    """Put the valid ones of `values` over `base`. Return the result, and a sentence for each invalid one.

    `values` is whatever an editor sent; what is no object changes nothing. `own` are the settings of the
    user's own file, or None if `values` are from that file. If it is given, settings of the scope `FILE` are
    refused, and a null sets a setting back to its value in `own`.
    """
    if values is None or values == []:
        # Lua has one kind of table: an empty one becomes a list in JSON.
        return base, []
    if not isinstance(values, Mapping):
        return base, [f"Settings must be an object of names and values, not {_shown(values)}."]
    names = {alias: name for name in Settings.model_fields for alias in (name, to_camel(name))}
    merged = base.model_dump()
    problems = []
    for key, value in values.items():
        name = names.get(key)
        if name is None:
            # A client that is newer than the server may set back what this server does not know.
            if value is not None:
                problems.append(_unknown(key, names))
            continue
        if own is not None and policy(name).scope is Scope.FILE:
            problems.append(
                f"Setting {key!r} is taken from {config_path()} only, not from an editor. Set it there."
            )
            continue
        if value is None and own is not None:
            merged[name] = getattr(own, name)
            continue
        value = tuple(value) if isinstance(value, list) else value  # noqa: PLW2901 - JSON has no tuples
        try:
            Settings.model_validate({name: value})
        except ValidationError as error:
            problems.append(_invalid(key, name, value, error))
        else:
            merged[name] = value
    return Settings.model_validate(merged), problems


def _invalid(key: str, name: str, value: Any, error: ValidationError) -> str:
    """Return a sentence that names an invalid value and what is valid."""
    first = error.errors()[0]
    if first["type"] == "string_pattern_mismatch":
        why = _FORMS.get(name, first["msg"])
    else:
        why = re.sub(r"^(Input|String) should\b", "it must", first["msg"].removeprefix("Value error, "))
    shown = "this value" if name in _UNQUOTED or "@" in str(value) else _shown(value)
    return f"Setting {key!r} cannot be {shown}: {why}."


def _unknown(key: Any, names: Mapping[str, str]) -> str:
    import difflib

    close = difflib.get_close_matches(str(key)[:80], names, 1)
    hint = f"Did you mean {close[0]!r}?" if close else "Remove it, or check its spelling."
    return f"Unknown setting {str(key)[:80]!r}. {hint}"


def _shown(value: Any) -> str:
    """Return a value as users write it, in JSON's notation, at most 80 characters of it."""
    try:
        return printable(json.dumps(value, ensure_ascii=False)[:80])
    except (TypeError, ValueError):
        return repr(value)[:80]


def keep_start_only(new: Settings, old: Settings) -> tuple[Settings, list[str]]:
    """Undo changes of settings that need a restart. Return the result, and a sentence for each of them.

    A running server keeps the model, adapter and device that it has started with.
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
    """Write one setting into the user's file and change nothing else in it. Returns the file's path.

    Comments, the order, line ends, a byte order mark, the mode and a symbolic link are kept, too.
    Raises `SettingsError` for a bad key or value, or a file that cannot be read or written.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    path = path or config_path()
    values = _read(path)
    # The file may have the key in camelCase, as editors write it.
    spelled = to_camel(key) if to_camel(key) in values else key
    parse(values | {spelled: value}, where=str(path))
    try:
        before = path.read_bytes().decode() if path.exists() else ""
        document = tomlkit.parse(before.removeprefix(text_files.BOM))
        document[spelled] = value
        after = tomlkit.dumps(document)
        if 0 < before.count("\n") == before.count("\r\n"):
            # The new line ends like the others.
            after = after.replace("\r\n", "\n").replace("\n", "\r\n")
        if tomllib.loads(after) != values | {spelled: value}:
            raise SettingsError(
                f"Cannot write {key!r} into {path} without changing other settings. Edit the file yourself."
            )
        text_files.replace(path, (text_files.BOM if before.startswith(text_files.BOM) else "") + after)
    except (OSError, TOMLKitError) as error:
        raise SettingsError(f"Cannot write the settings file {path}: {why_unwritable(error)}.") from error
    return path


# How server/docs/settings.md says who may set a setting.
_MAY_SET = {Scope.FILE: "file", Scope.EDITOR: "file, editor", Scope.PROJECT: "file, editor, project"}


def markdown_table() -> str:
    """Return the table of server/docs/settings.md; a test compares the two."""
    rows = ["| setting | default | set in | a change applies | meaning |", "|---|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        own = policy(name)
        default = "none" if field.default is None else f"`{_as_toml(field.default)}`"
        when = "after a restart" if own.restart else "at once"
        rows.append(f"| `{name}` | {default} | {_MAY_SET[own.scope]} | {when} | {field.description} |")
    return "\n".join(rows) + "\n"


def _as_toml(value: str | float | bool | tuple[str, ...]) -> str:
    # For the values of the schema TOML and JSON differ in nothing else.
    return json.dumps(value, ensure_ascii=False)


def vscode_settings() -> dict[str, dict[str, Any]]:
    """Return the settings as VS Code's extension declares them; a test compares the two.

    Settings that a project may not set get the scope "machine": VS Code takes them from the user's own
    settings only. Those that need a restart get the tag "restart". Those that no editor may set are left out.
    """
    declared = {}
    for name, schema in Settings.model_json_schema(by_alias=False)["properties"].items():
        own = policy(name)
        if own.scope is Scope.FILE:
            continue
        text = schema.pop("description")
        del schema["title"]
        if "anyOf" in schema:
            kinds = schema.pop("anyOf")
            # Limits of one type say nothing of a value of another.
            schema |= {key: limit for kind in kinds for key, limit in kind.items()}
            schema["type"] = [kind["type"] for kind in kinds]
        declared[f"midfill.{to_camel(name)}"] = schema | {
            "markdownDescription": f"{text} {_RESTART}" if own.restart else text,
            "scope": "window" if own.scope is Scope.PROJECT else "machine",
            "tags": ["restart"] if own.restart else [],
        }
    return declared


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text_files.read(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"Cannot read the settings file {path}: {why_unreadable(error)}.") from error
    except (UnicodeError, tomllib.TOMLDecodeError) as error:
        said = str(error).rstrip(".")
        raise SettingsError(f"Cannot read the settings file {path}: {said}. Correct or delete it.") from error
