"""The one exception tree. Messages are sentences for users: what happened, with which value, what to do.

Cancellation is not an error and has no class here: a cancelled task raises `asyncio.CancelledError`.
"""

from midfill.system.printable import shown

# The longest sentences of ours list the names that can be chosen from.
_MAX_CHARS = 2000


class MidfillError(Exception):
    """The base of every error that midfill raises on purpose.

    Its text is one printable line, whatever a server or a file has put into it: it is for terminals, logs and
    editors.
    """

    def __str__(self) -> str:
        """The sentence."""
        return shown(super().__str__(), _MAX_CHARS)


class SettingsError(MidfillError):
    """A setting has a wrong name or value. The message names the key."""


class ModelError(MidfillError):
    """A model cannot be found, fetched, verified, converted or used."""


class AdapterError(MidfillError):
    """An adapter cannot be loaded, or does not belong to the model."""


class EngineError(MidfillError):
    """A request to the engine failed; the next one may work."""


class EngineUnavailableError(EngineError):
    """The engine is not running: not started yet, failed to start, or closed."""


class EngineOverloadedError(EngineError):
    """The engine has too many requests waiting; this one was not taken."""
