"""`midfill model`: list, download, check and choose models."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import engine_factory, installed_model, read_settings
from midfill.cli.options import ADAPTER, JSON
from midfill.cli.terminal import say, terminal, with_progress
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.engine.torch.devices import Device
    from midfill.models.catalogue import Entry
    from midfill.settings import Settings


@click.group()
def model() -> None:
    """List, download, check and choose models."""


@model.command("list")
@JSON
def model_list(as_json: bool) -> None:
    """List the models of midfill's catalogue, and all others that are on this machine.

    The memory is that of the device that the settings choose: on a GPU with the keys and values of the
    longest prompt and 1 GB for other programs, in the best format that fits into what is free.

    \b
    Examples:
      midfill model list
      midfill model list --json
    """
    from midfill.models import catalogue, store

    settings = read_settings()
    device = _chosen_device(settings)
    here = {installed.name: installed for installed in store.installed()}
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "family": entry.family,
            "license": entry.license,
            "parameters": entry.parameters,
            "context": entry.context,
            **_memory_of(entry, device, settings),
            "download_mb": entry.wheels.total_bytes // 1_000_000 if entry.wheels else None,
            "hub": entry.hub,
            "installed": entry.name in here,
            "gguf": _gguf_state(entry),
        }
        for entry in catalogue.entries().values()
    ]
    rows += [
        {"name": name, "family": found.family, "installed": True}
        for name, found in here.items()
        if name not in catalogue.entries()
    ]
    used = settings.model
    if as_json:
        where = {"device": device.torch_name, "free_mb": round(device.free_bytes() / 1e6) or None}
        click.echo(json.dumps({"models": rows, "used": used, "cache": str(store.cache_root()), **where}))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "name", "parameters", "memory", "licence", "here", "GGUF"):
        table.add_column(title, justify="right" if title in ("parameters", "memory") else "left")
    for row in rows:
        parameters = f"{row['parameters'] / 1e9:.1f} B" if "parameters" in row else ""
        memory = _memory_text(row)
        chosen = "*" if row["name"] == used else ""
        here_mark = "yes" if row["installed"] else ""
        license_, file = row.get("license", ""), row.get("gguf") or ""
        table.add_row(chosen, row["name"], parameters, memory, license_, here_mark, file)
    terminal().print(table)
    if device.kind != "cpu":
        say(f"\nMemory on {device.torch_name}, {device.name}: {device.free_bytes() / 1e9:.1f} GB are free.")
    say("\n* in use. Download: midfill model pull NAME. Choose: midfill model use NAME.")
    say('GGUF: the file for `runner = "llamacpp"`. Download: midfill model pull NAME --gguf.')


def _gguf_state(entry: Entry) -> str | None:
    """Return "here" or "available" for the GGUF file of a model of the catalogue, or None."""
    from midfill.models import store

    if store.find_gguf(entry.name) is not None:
        return "here"
    return "available" if entry.wheels is not None else None


def _chosen_device(settings: Settings) -> Device:
    """Return the device that the settings choose; the CPU if it is not there."""
    from midfill.engine.torch import devices

    try:
        return devices.choose(settings.device, devices.find_gpus(settings.device))[0]
    except MidfillError:
        return devices.CPU


def _memory_of(entry: Entry, device: Device, settings: Settings) -> dict[str, Any]:
    """Return the memory that a model takes on a device, in which format, and if it is free.

    Of the CPU only the estimate in the catalogue is returned.
    """
    from midfill.engine.torch import memory

    if device.kind == "cpu":
        return {"memory_mb": entry.memory_mb}
    if (size := memory.size_in_catalogue(entry)) is None:
        return {}
    formats = device.automatic if settings.dtype == "auto" else (settings.dtype,)
    needs = {dtype: memory.need(size, dtype, settings.longest_prompt) for dtype in formats}
    fitting = memory.first_that_fits(needs, device.free_bytes())
    dtype = fitting or formats[-1]
    return {"memory_mb": round(needs[dtype].total / 1e6), "dtype": dtype, "fits": fitting is not None}


def _memory_text(row: dict[str, Any]) -> str:
    if "memory_mb" not in row:
        return ""
    text = f"{row['memory_mb'] / 1000:.1f} GB"
    if "fits" not in row:
        return text
    return f"{text} {row['dtype']}" if row["fits"] else f"{text} too large"


@model.command("pull")
@click.argument("name")
@click.option(
    "--gguf",
    is_flag=True,
    help='Download the GGUF file of the same weights instead, for `runner = "llamacpp"`, with which it is '
    "the default.",
)
def model_pull(name: str, gguf: bool) -> None:
    """Download a model. NAME is a catalogue name, a Hugging Face id, or a GGUF file to convert.

    A stopped download resumes when you run the command again; nothing is downloaded twice. The runners
    OpenVINO and torch need no GGUF file; llama.cpp needs nothing else, and runs any GGUF file where it is.

    \b
    Examples:
      midfill model pull qwen2.5-coder-1.5b
      midfill model pull bigcode/tiny_starcoder_py
      midfill model pull qwen2.5-coder-0.5b --gguf
    """
    from midfill.models import fetch

    if gguf or read_settings().runner == "llamacpp":
        file = with_progress(f"downloading {name}", lambda report: fetch.pull_gguf(name, report))
        say(f"The GGUF file of {name} is ready: {file}")
        return
    found = with_progress(f"downloading {name}", lambda report: fetch.pull(name, report))
    say(f"{found.name} is ready: {found.path}")


@model.command("check")
@click.argument("name")
@ADAPTER
@JSON
def model_check(name: str, adapter: str | None, as_json: bool) -> None:
    """Load a model, detect its FIM template, and test that it fills known holes.

    The probe prints the log-loss of the true text of four holes, in nats per character (0 is certain), for
    each order of prefix and suffix, and for the prefix alone. A model whose name matches no FIM family is
    used with the order that it predicts best. Exits with status 1 if the model fails.

    \b
    Examples:
      midfill model check qwen2.5-coder-0.5b
      midfill model check ./my-model --json
    """
    from midfill.cli.doctor_checks import check_model

    settings = read_settings(model=name, adapter=adapter)
    result = asyncio.run(check_model(settings, engine_factory(None)))
    if as_json:
        click.echo(json.dumps(result))
    else:
        for key, value in result.items():
            if key != "holes":
                say(f"{key:12} {value}")
        for hole in result["holes"]:
            mark = click.style("pass", fg="green") if hole["passed"] else click.style("fail", fg="red")
            say(f"{mark}  {hole['hole']}  ->  {hole['text']!r}")
    if not result["passed"]:
        raise MidfillError(
            f"{name} does not fill the holes. Use a base model that was trained for fill-in-the-middle."
        )


@model.command("use")
@click.argument("name")
def model_use(name: str) -> None:
    """Choose the model for all editors: writes `model` to your settings file.

    \b
    Example:
      midfill model use qwen2.5-coder-1.5b
    """
    from midfill import settings
    from midfill.models import catalogue, store

    if store.find_for(name, read_settings().runner) is None:
        hint = f"Run: midfill model pull {name}"
        if catalogue.lookup(name) is None and "/" not in name:
            hint = "To see the known names, run: midfill model list"
        raise MidfillError(f"The model {name!r} is not on this machine. {hint}")
    path_given = None if catalogue.lookup(name) else store.as_path(name)
    value = str(path_given or name)
    path = settings.store("model", value)
    say(f"The model is now {value} (written to {path}). Running servers switch when they are restarted.")


@model.command("path")
@click.argument("name", required=False)
@click.option(
    "--gguf",
    is_flag=True,
    help="Print the path of the GGUF file that `midfill model pull NAME --gguf` downloaded.",
)
def model_path(name: str | None, gguf: bool) -> None:
    """Print the path of a model; without NAME, the folder of all models.

    \b
    Examples:
      midfill model path
      midfill model path qwen2.5-coder-0.5b
    """
    from midfill.models import store

    if gguf and name is not None:
        if (file := store.find_gguf(name)) is None:
            raise MidfillError(
                f"The GGUF file of {name!r} is not on this machine. Run: midfill model pull {name} --gguf"
            )
        say(str(file))
        return
    if name is None:
        say(str(store.models_dir()))
        return
    say(str(installed_model(name).path))
