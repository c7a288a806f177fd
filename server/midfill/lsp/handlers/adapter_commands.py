"""The commands `midfill.adapter.*`: list, bind and train adapters from the editor."""

from __future__ import annotations

import asyncio
from typing import Any

from lsprotocol import types

from midfill.errors import AdapterError, MidfillError
from midfill.lsp.messages import ResponseError
from midfill.lsp.session import Session

_DEFAULT_MINUTES = 20
_MAX_MINUTES = 24 * 60


async def list_adapters(session: Session, _: list[Any]) -> dict[str, Any]:
    """Return the adapters on this machine, which of them are loaded, and why bound ones are not."""
    router = session.router
    entries, bound = await asyncio.to_thread(router.known)
    running = {entry.digest for entry in router.in_use}
    adapters = [
        {
            "name": entry.name,
            "digest": entry.digest,
            "base": entry.base,
            "verdict": entry.evaluation.verdict,
            "reasons": list(entry.evaluation.reasons),
            "forced": entry.evaluation.forced,
            "usedIn": bound.uses(entry.digest),
            "running": entry.digest in running,
        }
        for entry in entries
    ]
    return {"adapters": adapters, "failures": list(router.failures), "heldOut": router.held_out}


async def use_adapter(session: Session, arguments: list[Any]) -> dict[str, Any]:
    """Bind the adapter that `arguments[0]` names, and return what is loaded then.

    `arguments[1]` says where: "workspace" (the default), "global", or the identifier of a language.
    """
    name, where = (*arguments, None, None)[:2]
    if not isinstance(name, str) or not isinstance(where, str | None):
        raise _invalid("The arguments are the adapter's name, and `workspace`, `global` or a language.")
    return await _bind(session, name, where)


async def use_no_adapter(session: Session, arguments: list[Any]) -> dict[str, Any]:
    """Use no adapter in the workspace, or where `arguments[0]` says (see `use_adapter`)."""
    where = (*arguments, None)[0]
    if not isinstance(where, str | None):
        raise _invalid("The argument is `workspace`, `global` or a language.")
    return await _bind(session, None, where)


async def _bind(session: Session, name: str | None, where: str | None) -> dict[str, Any]:
    router = session.router
    try:
        if session.settings.adapter is not None:
            raise AdapterError(
                f"The setting `adapter` chooses the adapter {session.settings.adapter!r} for everything. "
                "Remove that setting first."
            )
        await router.bind(name, where or "workspace")
    except MidfillError as error:
        session.editor.show_error(str(error))
        return {"running": router.name_for(None), "error": str(error)}
    return {"running": router.name_for(None), "error": None}


async def train_adapter(session: Session, arguments: list[Any]) -> dict[str, Any]:
    """Train an adapter on the history of the workspace's first folder.

    `arguments[0]` may be an object with `name` and `minutes`. Returns at once: the name, or the error. Then
    the user is asked, and is shown the progress and the verdict.
    """
    wanted = arguments[0] if arguments else {}
    if not isinstance(wanted, dict):
        raise _invalid("The argument is an object with `name` and `minutes`.")
    name, minutes = wanted.get("name"), wanted.get("minutes", _DEFAULT_MINUTES)
    if not isinstance(name, str | None):
        raise _invalid("`name` must be a string.")
    if type(minutes) not in {int, float} or not 0 < minutes <= _MAX_MINUTES:
        raise _invalid(f"`minutes` must be a number above 0, up to {_MAX_MINUTES}.")
    settings = session.settings
    folder = next((path for _, path in session.editor.workspace_folders()), None)
    try:
        job, model = await session.training.plan(folder, name, float(minutes), settings)
    except MidfillError as error:
        session.editor.show_error(str(error))
        return {"name": None, "error": str(error)}
    session.spawn(session.training.run(job, model, settings))
    return {"name": job.name, "error": None}


def stop_training(session: Session, _: list[Any]) -> dict[str, bool]:
    """Stop a running training, which leaves a checkpoint. Return whether one was running."""
    return {"stopped": session.training.stop()}


def _invalid(message: str) -> ResponseError:
    return ResponseError(types.ErrorCodes.InvalidParams, message)
