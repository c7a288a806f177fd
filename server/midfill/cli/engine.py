"""`midfill engine`: engines in other processes and on other machines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from midfill.cli.shared import (
    ADAPTER,
    JSON,
    MODEL,
    adapter_folder,
    engine_maker,
    read_engine,
    read_settings,
    remote_engine,
)
from midfill.cli.terminal import terminal
from midfill.errors import AdapterError, SettingsError

if TYPE_CHECKING:
    from midfill.engine.api import AdapterSource

_FILE = click.Path(path_type=Path)


@click.group()
def engine() -> None:
    """Engines that run in another process or on another machine."""


@engine.command("check")
@click.argument("url")
@click.option(
    "--key", metavar="WHERE", help="Where its key is: env:NAME, keyring:SERVICE/USER, command:PROGRAM."
)
@click.option("--model", "name", metavar="NAME", help="The model to use, as the server calls it.")
@JSON
def engine_check(url: str, key: str | None, name: str | None, as_json: bool) -> None:
    """Ask a model server whether it is fit for code completion: model, training, speed, cancellation.

    Ends with status 1 if it cannot be used.

    \b
    Examples:
      midfill engine check http://127.0.0.1:8080
      midfill engine check https://gpu-box:8000 --key env:TEAM_KEY --json
    """
    from midfill.cli.engine_check import check, table

    settings = read_engine(read_settings(engine_key=key, engine_model=name, deadline_s=60.0), url)
    findings = asyncio.run(check(remote_engine(settings), settings))
    if as_json:
        click.echo(json.dumps(findings.as_dict()))
    else:
        terminal().print(table(findings))
    if not findings.passed:
        raise click.exceptions.Exit(1)


@engine.command("serve")
@click.option("--socket", type=_FILE, help="Listen on this Unix socket, for yourself alone.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address, for a team.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True)
@click.option("--tokens", type=_FILE, help="Who may ask: lines of `user token`, in a file of mode 600.")
@click.option("--tls-cert", type=_FILE, help="Certificate (PEM).")
@click.option("--tls-key", type=_FILE, help="Its key (PEM), in a file of mode 600.")
@click.option("--behind-proxy", is_flag=True, help="Something before it encrypts; it does not.")
@click.option("--name", "names", multiple=True, help="A host name that it is called by; may be repeated.")
@click.option(
    "--with-adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="An adapter (its folder, or a name of `adapter list`) to offer as a model of its own as well.",
)
@click.option(
    "--any-temperature",
    is_flag=True,
    help="Take requests with a temperature above 0 too, and answer as for 0; without this they are refused.",
)
@click.option("--settings", "given", hidden=True, help="For the shared engine: settings as JSON.")
@click.option("--detach", is_flag=True, hidden=True, help="Go on in a child process.")
@MODEL
@ADAPTER
@click.option("--engine", "script", hidden=True, help="For tests: scripted:FILE.")
def engine_serve(
    socket: Path | None,
    host: str,
    port: int,
    tokens: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    behind_proxy: bool,
    names: tuple[str, ...],
    adapters: tuple[str, ...],
    any_temperature: bool,
    given: str | None,
    detach: bool,
    model: str | None,
    adapter: str | None,
    script: str | None,
) -> None:
    """Serve the model of this machine to several editors or people, in the form of OpenAI's /v1/completions.

    With `engine = "shared"` in your settings file this is started for you. For a team it needs tokens, and
    beyond this machine TLS. What is asked and answered is never logged; /metrics is for Prometheus.

    Of OpenAI's parameters these work: prompt (one text, or one list of token ids), suffix (the text after the
    hole, for models that fill in the middle), max_tokens, stop (8 texts of 100 characters), stream,
    stream_options, logprobs (0 or 1), and model. The engine always takes the likeliest token: temperature 0
    (the default here), any top_p and any seed give the same answer; a higher temperature is refused unless
    --any-temperature is given. n and best_of must be 1, echo false, logit_bias empty, the penalties 0. user
    is taken and not used. Whatever else is sent is refused with status 400 and its name.

    Each user has an equal share of the model, however many requests they send: at most 16 at once, 20 a
    second, each for at most 10 minutes.

    \b
    Examples:
      midfill engine serve --socket ~/.midfill.sock
      midfill engine serve --host 0.0.0.0 --name gpu-box --tokens team --tls-cert box.pem --tls-key box.key
      midfill engine serve --tokens team --port 8765 --with-adapter ours --behind-proxy --host 10.0.0.5
      curl https://gpu-box:8765/v1/completions -H "Authorization: Bearer $TOKEN" -d '{"prompt": "x = "}'
    """
    if detach and os.fork():
        os._exit(0)
    if detach:
        os.setsid()
    from midfill.engine.remote.server.listen import ListenSpec, read_tokens, run
    from midfill.engine.remote.server.model_host import ModelHost
    from midfill.fim.templates import infill
    from midfill.settings import Settings, parse
    from midfill.system.log_stream import unblocked
    from midfill.system.printable import LogFormatter

    if given is not None:
        settings = parse(json.loads(given), base=Settings(), where="--settings")
    else:
        settings = read_settings(model=model, adapter=adapter)
    # Whatever the settings say of other engines, this is where the model runs.
    settings = read_engine(settings, "local")
    listen = ListenSpec(
        socket=socket,
        host=host,
        port=port,
        tokens=read_tokens(tokens) if tokens is not None else {},
        tls_cert=tls_cert,
        tls_key=tls_key,
        names=names,
        behind_proxy=behind_proxy,
        any_temperature=any_temperature,
    )
    if socket is not None and tokens is not None:
        raise SettingsError("--socket is for yourself alone and needs no --tokens.")
    listen.check()
    make = engine_maker(script)
    exits_s = settings.engine_exit_min * 60 if socket is not None else 0.0
    unloads_s = settings.engine_unload_min * 60
    served = ModelHost(
        lambda: make(settings),
        unloads_s,
        exits_s,
        adapters=_sources(adapters),
        infill=lambda info, before, after: infill(info, settings.family, before, after),
    )
    with unblocked():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
        run(served, listen)


def _sources(names: tuple[str, ...]) -> tuple[AdapterSource, ...]:
    """Adapters that users of the engine may ask for. Raises `AdapterError`."""
    from midfill.adapters.format import digest_of
    from midfill.adapters.registry import Registry
    from midfill.engine.api import MAX_ADAPTERS, AdapterSource

    if len(names) > MAX_ADAPTERS:
        raise SettingsError(
            f"--with-adapter is given {len(names)} times; there is room for {MAX_ADAPTERS} adapters."
        )
    folders = {Path(name).name: adapter_folder(name) for name in names}
    for folder in folders.values():
        if not folder.is_dir():
            known = ", ".join(entry.name for entry in Registry().entries()) or "none yet"
            raise AdapterError(f"There is no adapter {folder}: give a folder, or a name of these: {known}.")
    return tuple(AdapterSource(digest_of(folder), name, folder) for name, folder in folders.items())
