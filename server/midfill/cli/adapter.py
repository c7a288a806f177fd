"""`midfill adapter`: import, use, list and check adapters. Training is in `adapter_training`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import installed_model, read_settings
from midfill.cli.options import JSON, MODEL
from midfill.cli.terminal import say, show, with_progress
from midfill.errors import AdapterError
from midfill.system.file_errors import why_unwritable

if TYPE_CHECKING:
    from midfill.adapters.bindings import Bound
    from midfill.adapters.registry import Entry, Registry
    from midfill.models.store import LocalModel

FOLDER = click.option(
    "--workspace",
    type=click.Path(path_type=Path, file_okay=False),
    help="For files in this folder and below. [default: the repository of the current folder]",
)
LANGUAGE = click.option("--language", metavar="ID", help="For files of this language, for example python.")
EVERYWHERE = click.option(
    "--global",
    "everywhere",
    is_flag=True,
    help="For all files that have no adapter of a workspace or language.",
)


@click.group()
def adapter() -> None:
    """Train, import, use and check LoRA adapters, which adapt the model to a project.

    The adapter of a workspace takes precedence over that of a language, and that over the global one.
    Running servers notice a change at the next edit.
    """


@adapter.command("list")
@JSON
def adapter_list(as_json: bool) -> None:
    """List the adapters on this machine, with their verdict and where they are used.

    \b
    Examples:
      midfill adapter list
      midfill adapter list --json
    """
    from midfill.adapters.bindings import Bindings
    from midfill.adapters.registry import Registry

    bound = Bindings().read()
    show({"adapters": [_as_dict(entry, bound) for entry in Registry().entries()]}, _table, as_json=as_json)


@adapter.command("show")
@click.argument("name")
@JSON
def adapter_show(name: str, as_json: bool) -> None:
    """Show the details of one adapter: base model, size, source, verdict with reasons, use and folder.

    \b
    Example:
      midfill adapter show mine
    """
    from midfill.adapters.bindings import Bindings
    from midfill.adapters.registry import Registry

    show(_as_dict(Registry().get(name), Bindings().read()), _page, as_json=as_json)


@adapter.command("use")
@click.argument("name")
@FOLDER
@LANGUAGE
@EVERYWHERE
@click.option(
    "--force",
    is_flag=True,
    help="Use it even if its evaluation rejected it. The registry records that it was forced.",
)
def adapter_use(
    name: str, workspace: Path | None, language: str | None, everywhere: bool, force: bool
) -> None:
    """Use an adapter in a workspace (the default), for a language, or everywhere.

    \b
    Examples:
      midfill adapter use mine
      midfill adapter use mine --workspace ~/src/project
      midfill adapter use pandas --language python
      midfill adapter use house-style --global
    """
    from midfill.adapters.bindings import Bindings
    from midfill.adapters.registry import Registry, check_usable

    scope = _scope(workspace, language, everywhere)
    registry = Registry()
    entry = registry.get(name)
    registry.check(entry)
    if force and not entry.evaluation.usable:
        entry = registry.force(entry.digest)
    check_usable(entry)
    Bindings().bind(entry.digest, **scope)
    say(f"The adapter {entry.name} is now used {_describe_scope(scope)}.")
    if read_settings().adapter is not None:
        say("Your setting `adapter` takes precedence. Remove it to use this adapter.", err=True)


@adapter.command("off")
@FOLDER
@LANGUAGE
@EVERYWHERE
def adapter_off(workspace: Path | None, language: str | None, everywhere: bool) -> None:
    """Stop using an adapter in a workspace (the default), for a language, or everywhere else.

    In a workspace that is switched off, neither a language's adapter nor the global one is used.

    \b
    Examples:
      midfill adapter off
      midfill adapter off --language python
    """
    from midfill.adapters.bindings import OFF, Bindings

    scope = _scope(workspace, language, everywhere)
    Bindings().bind(OFF if "workspace" in scope else None, **scope)
    say(f"No adapter is used {_describe_scope(scope)} any more.")


@adapter.command("rollback")
@JSON
def adapter_rollback(as_json: bool) -> None:
    """Undo the latest `use` or `off`. Run it again to undo the change before.

    \b
    Example:
      midfill adapter rollback
    """
    from dataclasses import asdict

    from midfill.adapters.bindings import Bindings
    from midfill.adapters.registry import Registry

    bound = Bindings().rollback()
    names = {entry.digest: entry.name for entry in Registry().entries()}
    show(asdict(bound), lambda _: _bindings_text(bound, names), as_json=as_json)


@adapter.command("import")
@click.argument("source")
@click.option(
    "--name", metavar="NAME", help="Name of the adapter on this machine. [default: the name of its folder]"
)
@MODEL
@JSON
def adapter_import(source: str, name: str | None, model: str | None, as_json: bool) -> None:
    """Import an adapter. SOURCE is a folder in PEFT format, or a Hugging Face id to download.

    The adapter is first checked against its base model: the model of your settings, or the one of --model.
    Only safetensors files are read.

    \b
    Examples:
      midfill adapter import ./lora-out --name mine
      midfill adapter import somebody/qwen-lora --model qwen2.5-coder-1.5b
    """
    import tempfile

    from midfill.adapters.registry import Registry
    from midfill.models import hub
    from midfill.models.catalogue import is_hub_id
    from midfill.models.store import as_path

    base = installed_model(read_settings(model=model).model)
    path = as_path(source)
    called = name or (path or Path(source)).resolve().name
    if path is not None:
        _check_base(path, base)
        entry = Registry().add(path, name=called, base=base, source=str(path.resolve()))
    elif is_hub_id(source):
        with tempfile.TemporaryDirectory(prefix="midfill-adapter-") as folder:
            found = Path(folder)
            with_progress(f"downloading {source}", lambda report: hub.fetch_adapter(source, found, report))
            _check_base(found, base)
            entry = Registry().add(found, name=called, base=base, source=f"{source} of the hub")
    else:
        raise AdapterError(f"{source!r} is neither a folder nor a Hugging Face id (owner/name).")
    if as_json:
        show(entry.as_dict(), str, as_json=True)
        return
    say(f"Imported {entry.name} ({entry.digest[:12]}, rank {entry.rank}, for {entry.base}).")
    say(f"It has not been evaluated. To use it: midfill adapter use {entry.name}")


@adapter.command("export")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def adapter_export(name: str, folder: Path) -> None:
    """Copy an adapter to a new folder, in PEFT format.

    \b
    Example:
      midfill adapter export mine ./mine
    """
    import shutil

    from midfill.adapters.registry import Registry

    registry = Registry()
    entry = registry.get(name)
    registry.check(entry)
    try:
        folder.mkdir(parents=True)
        for file in entry.path.iterdir():
            shutil.copyfile(file, folder / file.name)
    except FileExistsError as error:
        raise AdapterError(f"{folder} already exists. Name a new folder.") from error
    except OSError as error:
        raise AdapterError(f"Cannot write {folder}: {why_unwritable(error)}.") from error
    say(f"Exported {entry.name} to {folder}.")


@adapter.command("rm")
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it even if it is in use, and unbind it.")
def adapter_rm(name: str, force: bool) -> None:
    """Delete an adapter from this machine.

    \b
    Example:
      midfill adapter rm mine
    """
    from midfill.adapters.bindings import Bindings
    from midfill.adapters.registry import Registry
    from midfill.engine.openvino.int8_weights import forget_merged
    from midfill.models import store

    registry, bindings = Registry(), Bindings()
    entry = registry.get(name)
    if (used := bindings.read().uses(entry.digest)) and not force:
        raise AdapterError(
            f"The adapter {entry.name} is in use ({', '.join(used)}). To delete and unbind it, run: "
            f"midfill adapter rm {entry.name} --force"
        )
    bindings.release(entry.digest)
    registry.remove(entry.digest)
    if (found := store.find(entry.base)) is not None:
        forget_merged(found.path)
    say(f"Deleted {entry.name}.")


@adapter.command("doctor")
@JSON
def adapter_doctor(as_json: bool) -> None:
    """Check every adapter: its files, base model and verdict, and that each one in use still exists.

    Exits with status 1 if there is a problem.

    \b
    Examples:
      midfill adapter doctor
      midfill adapter doctor --json
    """
    from midfill.adapters.registry import Registry

    problems = _problems(Registry())
    show({"problems": problems}, _report, as_json=as_json)
    if problems:
        raise click.exceptions.Exit(1)


def _problems(registry: Registry) -> list[str]:
    from midfill.adapters.bindings import OFF, Bindings, asked_by
    from midfill.adapters.registry import check_usable
    from midfill.errors import MidfillError
    from midfill.models import store

    bound = Bindings().read()
    entries = {entry.digest: entry for entry in registry.entries()}
    problems = []
    for entry in entries.values():
        try:
            found = store.find(entry.base)
            registry.check(entry, found)
            if found is None:
                raise AdapterError(
                    f"The base model of {entry.name} is not on this machine. "
                    f"Run: midfill model pull {entry.base}"
                )
            if bound.uses(entry.digest):
                check_usable(entry)
        except MidfillError as error:
            problems.append(str(error))
    everywhere = [bound.everywhere] if bound.everywhere else []
    problems += [
        f"The adapter {digest[:12]} is in use ({', '.join(bound.uses(digest))}), but is not on this machine "
        "any more. Import it again, or run `midfill adapter off` there."
        for digest in dict.fromkeys([*bound.workspaces.values(), *bound.languages.values(), *everywhere])
        if digest not in entries and digest != OFF
    ]
    problems += [
        f"{folder} belongs to no registered adapter. Delete it."
        for folder in sorted(registry.root.glob("*/"))
        if not folder.name.startswith(".") and folder.name not in entries
    ]
    if (asked := asked_by(_repository())) and asked not in entries:
        problems.append(
            f"This workspace requests the adapter {asked[:12]}, which is not on this machine. Import it."
        )
    return problems


def _check_base(folder: Path, base: LocalModel) -> None:
    """Raise `AdapterError` if the adapter's configuration names another base model."""
    from midfill.adapters.format import read_config
    from midfill.models import catalogue

    said = read_config(folder).get("base_model_name_or_path")
    entry = catalogue.lookup(base.name)
    known = {name.rpartition("/")[2].lower() for name in (base.name, entry.hub if entry else base.name)}
    if isinstance(said, str) and catalogue.is_hub_id(said) and not Path(said).exists():
        plain = said.rpartition("/")[2].lower()
        if plain.removesuffix("-instruct") not in {name.removesuffix("-instruct") for name in known}:
            raise AdapterError(
                f"This adapter was trained for {said}, not for {base.name}. Add: --model {said}"
            )


def _repository() -> Path:
    """Return the repository of the current folder, or the folder itself outside a repository."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)


def _scope(workspace: Path | None, language: str | None, everywhere: bool) -> dict[str, Any]:
    """Return the keyword arguments of `Bindings.bind`: a workspace, a language, or nothing for everywhere."""
    if (workspace is not None) + (language is not None) + everywhere > 1:
        raise AdapterError("Give only one of --workspace, --language and --global.")
    if language is not None:
        from midfill.text.languages import normalise

        return {"language": normalise(language)}
    if everywhere:
        return {}
    return {"workspace": (workspace.expanduser() if workspace is not None else _repository()).absolute()}


def _describe_scope(scope: dict[str, Any]) -> str:
    if "workspace" in scope:
        return f"in {scope['workspace']}"
    return f"for {scope['language']}" if scope else "for all files without an adapter of their own"


def _as_dict(entry: Entry, bound: Bound) -> dict[str, Any]:
    return entry.as_dict() | {"used": bound.uses(entry.digest)}


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "digest", "base", "rank", "verdict", "used"):
        table.add_column(title)
    for entry in result["adapters"]:
        row = [entry["name"], entry["digest"][:12], entry["base"], str(entry["rank"])]
        table.add_row(*row, _verdict(entry["evaluation"]), ", ".join(entry["used"]))
    return (
        table if result["adapters"] else "No adapters yet. Get one: midfill adapter train, or adapter import."
    )


def _page(entry: dict[str, Any]) -> str:
    evaluation = entry["evaluation"]
    lines = {
        "name": entry["name"],
        "digest": f"sha256:{entry['digest']}",
        "base": f"{entry['base']} ({entry['fingerprint'][:12]})",
        "rank": f"{entry['rank']} ({entry['num_parameters'] / 1e6:.1f} million weights)",
        "created": entry["created"],
        "source": entry["source"],
        "verdict": " ".join([_verdict(evaluation), *evaluation["reasons"]]),
        "used": ", ".join(entry["used"]) or "nowhere",
        "folder": entry["path"],
    }
    return "\n".join(f"{key:10} {value}" for key, value in lines.items())


def _verdict(evaluation: dict[str, Any]) -> str:
    shown = "not evaluated" if evaluation["verdict"] == "none" else str(evaluation["verdict"])
    return f"{shown}, forced" if evaluation["forced"] else shown


def _bindings_text(bound: Bound, names: dict[str, str]) -> str:
    pairs = [(f"workspace {path}", digest) for path, digest in bound.workspaces.items()]
    pairs += [(f"language {name}", digest) for name, digest in bound.languages.items()]
    pairs += [("everywhere else", bound.everywhere)] if bound.everywhere else []
    shown = [f"{scope}: {names.get(digest, digest[:12])}" for scope, digest in pairs]
    return "\n".join(shown) or "No adapter is used anywhere."


def _report(result: dict[str, Any]) -> str:
    return "\n".join(result["problems"]) or "No problems found."
