"""`midfill engine`: check a model server, or serve a model."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import (
    adapter_folder,
    engine_factory,
    read_settings,
    remote_engine,
    with_engine,
)
from midfill.cli.options import ADAPTER, JSON, MODEL
from midfill.cli.terminal import terminal
from midfill.errors import AdapterError, SettingsError

if TYPE_CHECKING:
    from midfill.engine.api import AdapterSource, Engine
    from midfill.engine.remote.server.listen import ListenSpec
    from midfill.settings import Settings

_FILE = click.Path(path_type=Path)
# Longer than an editor waits for a first token: a slow server is a finding, not a failure.
_CHECK_DEADLINE_S = 60.0


@click.group()
def engine() -> None:
    """Check a model server on another machine, or serve this machine's model to others."""


@engine.command("check")
@click.argument("url")
@click.option(
    "--key",
    metavar="WHERE",
    help="Where to read the server's API key: env:NAME, keyring:SERVICE/USER or command:PROGRAM.",
)
@click.option("--model", "name", metavar="NAME", help="Model to use, by the server's name for it.")
@JSON
def engine_check(url: str, key: str | None, name: str | None, as_json: bool) -> None:
    """Check that a model server is suitable for completion: model, FIM, speed, prefix cache, cancellation.

    Sends made-up code only. Exits with status 1 if the server cannot be used.

    \b
    Examples:
      midfill engine check http://127.0.0.1:8080
      midfill engine check https://gpu-box:8000 --key env:TEAM_KEY --json
    """
    from midfill.cli.engine_check import check, table

    settings = with_engine(
        read_settings(engine_key=key, engine_model=name, deadline_s=_CHECK_DEADLINE_S), url
    )
    findings = asyncio.run(check(remote_engine(settings), settings))
    if as_json:
        click.echo(json.dumps(findings.as_dict()))
    else:
        terminal().print(table(findings))
    if not findings.passed:
        raise click.exceptions.Exit(1)


_LISTEN_OPTIONS = (
    click.option("--socket", type=_FILE, help="ListenSpec on this Unix socket. Only you can connect."),
    click.option("--host", default="127.0.0.1", show_default=True, help="ListenSpec on this address."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8765,
        show_default=True,
        help="ListenSpec on this TCP port; 0 chooses a free one.",
    ),
    click.option(
        "--tokens",
        type=_FILE,
        help="File of users and their access tokens, one `USER TOKEN` per line, with mode 600.",
    ),
    click.option("--tls-cert", type=_FILE, help="TLS certificate (PEM)."),
    click.option("--tls-key", type=_FILE, help="Private key of the certificate (PEM), with mode 600."),
    click.option(
        "--behind-proxy", is_flag=True, help="Serve plain HTTP beyond this machine: a proxy terminates TLS."
    ),
    click.option(
        "--name",
        "names",
        multiple=True,
        metavar="HOST",
        help="ModelHost name by which clients reach this server. May be repeated.",
    ),
    click.option(
        "--any-temperature",
        is_flag=True,
        help="Accept a temperature above 0, and answer as for 0. Such requests are refused by default.",
    ),
)


def _listen_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that become a `ListenSpec`."""
    for option in reversed(_LISTEN_OPTIONS):
        command = option(command)
    return command


@engine.command("serve")
@_listen_options
@click.option(
    "--with-adapter",
    "adapters",
    multiple=True,
    metavar="NAME|DIR",
    help="Offer this adapter as an additional model. May be repeated.",
)
@click.option("--settings", "given", hidden=True, help="For the shared engine: settings as JSON.")
@click.option("--detach", is_flag=True, hidden=True, help="Continue in a child process.")
@MODEL
@ADAPTER
@click.option("--engine", "engine_override", hidden=True, help="For tests: scripted:FILE.")
def engine_serve(
    adapters: tuple[str, ...],
    given: str | None,
    detach: bool,
    model: str | None,
    adapter: str | None,
    engine_override: str | None,
    **listen_options: Any,
) -> None:
    """Serve this machine's model to editors and people, by OpenAI's /v1/completions protocol.

    With `engine = "shared"` in your settings file, editors start this for you. A team needs --tokens and, to
    be reached from other machines, TLS. Prompts and answers are never logged. /metrics is for Prometheus.

    Supported parameters: prompt (one string or one list of token ids), suffix (for models that fill in the
    middle), max_tokens, stop (8 strings of 100 characters), stream, stream_options, logprobs (0 or 1), model.
    Decoding is always greedy: top_p and seed have no effect, and temperature must be 0 (the default here)
    unless --any-temperature is given. n and best_of must be 1, echo false, logit_bias empty and the penalties
    0; user is ignored. Any other parameter is refused with status 400 and its name.

    All users get equal shares of the model. Limits per user: 16 requests at once, 20 per second, 10 minutes
    for each.

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
    from midfill.settings import Settings, parse

    if given is not None:
        settings = parse(json.loads(given), base=Settings(), where="--settings")
    else:
        settings = read_settings(model=model, adapter=adapter)
    listen = _listen(**listen_options)
    # Whatever `engine` says, the model runs in this process.
    _serve(with_engine(settings, "local"), listen, engine_factory(engine_override), _sources(adapters))


def _listen(socket: Path | None, tokens: Path | None, **others: Any) -> ListenSpec:
    """Return where to listen and who may connect. Raises `SettingsError` for options that are not safe."""
    from midfill.engine.remote.server.listen import ListenSpec, read_tokens

    if socket is not None and tokens is not None:
        raise SettingsError("--socket and --tokens exclude each other: only you can connect to the socket.")
    users = read_tokens(tokens) if tokens is not None else {}
    listen = ListenSpec(socket=socket, tokens=users, **others)
    listen.check()
    return listen


def _serve(
    settings: Settings,
    listen: ListenSpec,
    make: Callable[[Settings], Engine],
    adapters: tuple[AdapterSource, ...],
) -> None:
    """Serve until the process is stopped or, on a socket, was idle for the setting `engine_exit_min`."""
    from midfill.engine.remote.server.listen import run
    from midfill.engine.remote.server.model_host import ModelHost
    from midfill.fim.templates import infill
    from midfill.system.log_stream import unblocked
    from midfill.system.printable import LogFormatter

    host = ModelHost(
        lambda: make(settings),
        settings.engine_unload_min * 60,
        settings.engine_exit_min * 60 if listen.socket is not None else 0.0,
        adapters=adapters,
        infill=lambda info, before, after: infill(info, settings.family, before, after),
    )
    with unblocked():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
        run(host, listen)


def _sources(names: tuple[str, ...]) -> tuple[AdapterSource, ...]:
    """Return the adapters that clients may request. Raises `AdapterError` if one does not exist."""
    from midfill.adapters.format import digest_of
    from midfill.adapters.registry import Registry
    from midfill.engine.api import MAX_ADAPTERS, AdapterSource

    if len(names) > MAX_ADAPTERS:
        raise SettingsError(
            f"--with-adapter is given {len(names)} times, but at most {MAX_ADAPTERS} adapters can be offered."
        )
    folders = {Path(name).name: adapter_folder(name) for name in names}
    for folder in folders.values():
        if not folder.is_dir():
            known = ", ".join(entry.name for entry in Registry().entries()) or "none yet"
            raise AdapterError(f"There is no folder or registered adapter {folder}. Registered: {known}.")
    return tuple(AdapterSource(digest_of(folder), name, folder) for name, folder in folders.items())
