"""The adapters in a loaded model, and how they are replaced while it serves.

The slow part (reading, checking, compiling) runs in a thread started by `LocalEngine.set_adapters`. The rest
is a swap between two forward passes; it waits until the last request that uses a departing adapter has ended.
Knows adapters and a runner; nothing of requests' contents. Runs on the engine thread only, except where it
says "any thread".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from midfill.adapters import format as peft_format
from midfill.adapters.format import Adapter
from midfill.engine.api import BASE, MAX_ADAPTERS, AdapterSource
from midfill.engine.runner import Runner
from midfill.errors import AdapterError, EngineError, EngineUnavailableError, MidfillError

_LOG = logging.getLogger(__name__)

_CANARY = tuple(range(5, 95, 12))
"""Token ids that every vocabulary has; their meaning does not matter."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterSwap:
    """A prepared change of the adapters in the model.

    Attributes:
        adapters: all adapters that will be in the model, by key.
        install: see `Runner.prepare`.
        done: a future of `loop`, resolved when requests may name the adapters.
        retired: what was in the model before. The task that waits for `done` clears it, in a thread: freeing
            a compiled graph takes longer than the swap.
    """

    adapters: Mapping[str, Adapter]
    install: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    retired: list[Callable[[], None]] = field(default_factory=list)

    def end(self, error: MidfillError | None = None) -> None:
        """Resolve `done`, with an error if there is one."""

        def resolve() -> None:
            if self.done.done():
                return
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
            self.loop.call_soon_threadsafe(resolve)


class LoadedAdapters:
    """The adapters of one model.

    Args:
        runner: the model.
        install: what installed the current adapters; called again if a swap fails.
        default: the adapter of requests that name none; it stays in the model.

    Attributes:
        adapters: those in the model, by key. Replaced as a whole, so that any thread may read it.
        default: the key of the default adapter, or None.
    """

    def __init__(self, runner: Runner, install: Callable[[], None], default: Adapter | None) -> None:
        self._runner = runner
        self._install = install
        self._waiting: deque[AdapterSwap] = deque()
        self.adapters: Mapping[str, Adapter] = {} if default is None else {default.digest: default}
        self.default = None if default is None else default.digest

    def key_of(self, adapter: str | None) -> str | None:
        """Return the key of a request's adapter, which tells whose KV it uses; None for the base model.

        Raises `EngineError` if the adapter is not in the model.
        """
        key = self.default if adapter is None else adapter
        if key is None or key == BASE:
            return None
        if key not in self.adapters:
            raise EngineError(f"The adapter {key[:12]} is not loaded.")
        return key

    def prepare_swap(
        self,
        sources: Sequence[AdapterSource],
        model: Path,
        loop: asyncio.AbstractEventLoop,
        done: asyncio.Future[None],
    ) -> AdapterSwap | None:
        """Read these adapters and prepare the model for them and the default; None if nothing changes.

        Any thread, but not twice at a time. Raises `AdapterError`, `ModelError`.
        """
        known = self.adapters
        # Adapters that stay are not read again.
        kept = {self.default, *(source.key for source in sources)}
        adapters = {key: adapter for key, adapter in known.items() if key in kept}
        new = [source for source in sources if source.key not in adapters]
        if len(adapters) + len(new) > MAX_ADAPTERS:
            raise AdapterError(f"A model can have at most {MAX_ADAPTERS} adapters at a time.")
        if not new and adapters.keys() == known.keys():
            return None
        adapters |= read_all(new, model)
        return AdapterSwap(adapters, prepare(self._runner, adapters), loop, done)

    def add(self, swap: AdapterSwap) -> None:
        """Queue a swap; it is made once no request uses a departing adapter."""
        self._waiting.append(swap)

    @property
    def leaving(self) -> set[str]:
        """Keys of the adapters that the next swap removes."""
        return self.adapters.keys() - self._waiting[0].adapters.keys() if self._waiting else set()

    def swap(self, in_use: Iterable[str | None]) -> None:
        """Make the next swap, unless a departing adapter is in use. Call between two passes."""
        if self._waiting and self.leaving.isdisjoint(in_use):
            swap = self._waiting.popleft()
            swap.end(self._install_swap(swap))

    def refuse(self, reason: str) -> None:
        """End all waiting swaps with `EngineUnavailableError`."""
        while self._waiting:
            self._waiting.popleft().end(EngineUnavailableError(reason))

    def _install_swap(self, swap: AdapterSwap) -> MidfillError | None:
        began = time.monotonic()
        new = swap.adapters.keys() - self.adapters.keys()
        try:
            swap.install()
            check(self._runner, {key: swap.adapters[key] for key in new})
        except Exception as error:
            self._install()
            if isinstance(error, MidfillError):
                return error
            _LOG.exception("adapters could not be installed")
            what = "there is not enough memory" if isinstance(error, MemoryError) else type(error).__name__
            return AdapterError(f"The adapter could not be loaded into the model: {what}.")
        swap.retired.append(self._install)
        self._install, self.adapters = swap.install, swap.adapters
        _LOG.info(
            "%d adapters in the model after %.0f ms", len(self.adapters), (time.monotonic() - began) * 1000
        )
        return None


def read(path: Path, model: Path) -> Adapter:
    """Read the adapter in a folder, for a model's folder. Any thread. Raises `AdapterError`, `ModelError`."""
    return peft_format.read(path, peft_format.layers_of(model))


def read_all(sources: Iterable[AdapterSource], model: Path) -> dict[str, Adapter]:
    """Read several adapters and check their keys. Any thread. Raises as `read` does."""
    found = {}
    for source in sources:
        adapter = read(source.path, model)
        if adapter.digest != source.key:
            raise AdapterError(f"The files of the adapter {source.name} in {source.path} have changed.")
        found[source.key] = adapter
    return found


def prepare(runner: Runner, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
    """Call `runner.prepare`; raise `AdapterError` for any failure. Any thread."""
    try:
        return runner.prepare(adapters)
    except MidfillError:
        raise
    except MemoryError as error:
        raise AdapterError("There is not enough memory to load the adapter.") from error
    except Exception as error:
        _LOG.exception("adapters could not be prepared")
        raise AdapterError(f"The adapter cannot be served: {type(error).__name__}.") from error


def check(runner: Runner, adapters: Mapping[str, Adapter]) -> None:
    """Check that new adapters change the logits and keep them finite. Raises `AdapterError`."""
    if not adapters:
        return
    tokens = list(_CANARY)
    base = runner.probe(tokens, None)
    for key, adapter in adapters.items():
        logits = runner.probe(tokens, key)
        if not np.isfinite(logits).all():
            raise AdapterError(
                f"With the adapter {adapter.path} the model computes values that are not finite. "
                "It is damaged, or was trained on another model."
            )
        if np.array_equal(logits, base) and any(branch.up.any() for branch in adapter.branches.values()):
            raise AdapterError(f"The adapter {adapter.path} has no effect on the model; it is not used.")
