"""All exceptions of midfill. A message is a sentence for users: what happened, with which value, what to do.

Cancellation is not an error: a cancelled task raises `asyncio.CancelledError`.
"""

from midfill.system.printable import shown

# The longest messages list all names that can be chosen.
_MAX_CHARS = 2000


class MidfillError(Exception):
    """The base class of every error that midfill raises on purpose.

    Its text is one printable line for terminals, logs and editors: control characters that a server or file
    has put into it are spelled out.
    """

    def __str__(self) -> str:
        """Return the message."""
        return shown(super().__str__(), _MAX_CHARS)


class SettingsError(MidfillError):
    """A setting has a wrong name or value. The message names the key."""


class ModelError(MidfillError):
    """A model cannot be found, downloaded, verified, converted or used."""


class ModelMissingError(ModelError):
    """A model that could be downloaded is not on this machine."""


class AdapterError(MidfillError):
    """An adapter cannot be loaded, or does not belong to the model."""


class EngineError(MidfillError):
    """A request to the engine failed; the next one may work."""


class EngineUnavailableError(EngineError):
    """The engine is not running: not started yet, failed to start, or closed."""


class EngineOverloadedError(EngineError):
    """The engine has too many waiting requests and rejected this one."""
