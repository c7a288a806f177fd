"""Load the model after the handshake, and show how that goes in the editor. Runs on the event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
import uuid

from midfill.completion import calibrations
from midfill.completion.stats import acceptance
from midfill.completion.stats.request_log import InstrumentedEngine
from midfill.engine.api import Engine
from midfill.errors import EngineUnavailableError, MidfillError, ModelMissingError
from midfill.fim.probing import identify
from midfill.lsp.session import Session
from midfill.models.store import find as find_model
from midfill.system import malloc
from midfill.text import secret_shapes

_LOG = logging.getLogger(__name__)

# The pauses between tries while a remote engine does not answer.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


async def load_model(session: Session) -> None:
    """Load the model. If it is remote and does not answer, try again until it does."""
    pause_s = _FIRST_PAUSE_S
    while not await _try_load(session):
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _try_load(session: Session) -> bool:
    """Load the model and show the progress. Return False if another try makes sense.

    A failure ends no server: requests then get no suggestion, and its reason.
    """
    begun = time.monotonic()
    completer = session.completer

    def outcome() -> str:
        return "ready" if completer.failure is None else "failed"

    async with session.editor.progress(session.settings.model, outcome) as report:
        try:
            engine = await asyncio.to_thread(session.make_engine, session.settings)
            session.engine = engine
            await asyncio.gather(engine.start(report), asyncio.to_thread(secret_shapes.prepare))
            family = await identify(engine, session.settings.family)
            await _load_calibration(session, engine.model.name)
            completer.use(InstrumentedEngine(engine, session.costs), family)
        except EngineUnavailableError as error:
            _show_failure(session, str(error))
            if session.engine is not None:
                await session.engine.close()
            return False
        except MidfillError as error:
            session.model_missing = isinstance(error, ModelMissingError)
            _show_failure(session, str(error))
        except Exception as error:
            _LOG.exception("loading the model failed")
            kind = type(error).__name__
            _show_failure(session, f"Loading the model failed ({kind}). The server's log has the details.")
        else:
            _begin_serving(session, engine, time.monotonic() - begun)
    return True


def _begin_serving(session: Session, engine: Engine, took_s: float) -> None:
    session.spawn(_start_adapters(session, engine))
    for uri in session.documents:
        session.schedule_idle_work(uri)
    # What has been imported and loaded stays; a collection that walks over it would delay the answer
    # to a keystroke by tens of milliseconds.
    gc.freeze()
    # Reading a vocabulary takes 90 MB, which the C library would keep.
    malloc.trim()
    model = engine.model
    _LOG.info("serving %s (%s, %s) after %.1f s", model.name, model.device, model.dtype, took_s)


async def _load_calibration(session: Session, model: str) -> None:
    """Rate suggestions by the user's own calibration for the model, if there is one."""
    found = await asyncio.to_thread(calibrations.in_use, model)
    session.completer.calibration = found.calibration
    if found.problem:
        _LOG.warning("%s", found.problem)
        session.editor.show_warning(found.problem)


async def _start_adapters(session: Session, engine: Engine) -> None:
    """Use the adapters that are bound, unless the setting `adapter` names one for everything."""
    settings = session.settings
    if settings.adapter is not None:
        return
    held_out = False
    if settings.adapter_holdout:
        # An editor that restarts its server passes the id on, so that the session stays the same.
        session.acceptance.session = id_ = os.environ.get("MIDFILL_SESSION") or uuid.uuid4().hex
        held_out = acceptance.is_held_out(id_)
    is_remote = bool(settings.engine_urls)
    name = engine.model.name if is_remote else settings.model
    model = await asyncio.to_thread(find_model, name)
    await session.router.start(engine, model, is_remote=is_remote, held_out=held_out)


def _show_failure(session: Session, why: str) -> None:
    session.completer.fail(why)
    if session.should_show(why):
        _LOG.error("%s", why)
        session.editor.show_error(why)
