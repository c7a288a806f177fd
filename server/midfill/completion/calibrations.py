"""The user's own calibrations: one file for each model, with weights that replace the built-in ones.

`midfill eval calibrate --write` fits them to the user's results; the server reads the one of its model when
it loads the model. A file holds numbers only. A file that cannot be read is reported and not used. Reads and
writes files: do not call it on the event loop.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from midfill.completion.confidence import BUILT_IN, WEIGHTS, Calibration, Eagerness
from midfill.errors import MidfillError
from midfill.system import text_files as textfiles
from midfill.system.file_errors import why_unreadable, why_unwritable
from midfill.system.folders import data_folder

_FORMAT = 1
_MAX_BYTES = 65_536
_Weight = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
_Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class CalibrationError(MidfillError):
    """A calibration cannot be read or written. The message names the file."""


class Saved(BaseModel):
    """The content of a calibration file.

    Attributes:
        model: the model's name, as in `midfill/status`.
        suggestions, repositories: how many it was fitted to.
        made: the day, YYYY-MM-DD.
        weights: by feature of `confidence`, and "bias".
        thresholds: for each eagerness but "always".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = _FORMAT
    model: str
    suggestions: int = Field(ge=1)
    repositories: int = Field(ge=1)
    made: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    weights: dict[str, _Weight]
    thresholds: dict[str, _Probability]

    @model_validator(mode="after")
    def _is_whole(self) -> Saved:
        if self.format != _FORMAT:
            raise ValueError("it was written by another version of midfill")
        if set(self.weights) != set(WEIGHTS):
            raise ValueError("its weights are not the ones that this version of midfill uses")
        if set(self.thresholds) != set(BUILT_IN.thresholds):
            raise ValueError("it needs a threshold for each eagerness")
        low, normal, high = (self.thresholds[level] for level in BUILT_IN.thresholds)
        if not low >= normal >= high:
            raise ValueError("a higher eagerness must not have a higher threshold")
        return self


@dataclass(frozen=True, slots=True)
class InUse:
    """The calibration in use for a model.

    Attributes:
        calibration: the user's, else the built-in one.
        saved: the content of the user's file; None if the built-in one is used.
        problem: a sentence that says why the user's file is not used; "" if it is used, or does not exist.
    """

    calibration: Calibration
    saved: Saved | None = None
    problem: str = ""


def path_of(model: str) -> Path:
    """Return the path of a model's calibration, which need not exist."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip(".-")[:60]
    # The digest keeps the files of two models apart, whatever characters their names differ in.
    digest = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return data_folder() / "calibrations" / f"{readable or 'model'}-{digest}.json"


def read(model: str) -> Saved | None:
    """Return the user's calibration for a model; None if there is none. Raises `CalibrationError`."""
    path = path_of(model)
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise CalibrationError(f"{path} is too large for a calibration ({_MAX_BYTES} bytes at most).")
        saved = Saved.model_validate(json.loads(textfiles.decode(data)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {why_unreadable(error)}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise CalibrationError(f"{path} is not a valid calibration: {what}.") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not a valid calibration: {str(error).rstrip('.')}.") from error
    if saved.model != model:
        raise CalibrationError(f"{path} is for the model {saved.model!r}.")
    return saved


def in_use(model: str) -> InUse:
    """Return the calibration in use for a model. A broken file does not raise: see `InUse.problem`."""
    try:
        saved = read(model)
    except CalibrationError as error:
        remedy = "`midfill eval calibrate --reset` removes it"
        return InUse(BUILT_IN, problem=f"{error} The built-in calibration is used; {remedy}.")
    if saved is None:
        return InUse(BUILT_IN)
    thresholds = {Eagerness(level): value for level, value in saved.thresholds.items()}
    return InUse(Calibration(saved.weights, thresholds, str(path_of(model))), saved)


def describe(found: InUse) -> str:
    """Return a sentence that names the calibration in use."""
    if found.problem:
        return found.problem
    if found.saved is None:
        return "built-in calibration"
    one = found.saved
    return (
        f"your own calibration of {one.made}, from {one.suggestions} suggestions in {one.repositories} "
        f"repositories ({found.calibration.source})"
    )


def write(saved: Saved) -> Path:
    """Store a calibration as the one for its model. Returns its file. Raises `CalibrationError`."""
    path = path_of(saved.model)
    try:
        textfiles.replace(path, json.dumps(saved.model_dump(), indent=1) + "\n")
    except OSError as error:
        raise CalibrationError(f"Cannot write {path}: {why_unwritable(error)}.") from error
    return path


def remove(model: str) -> Path | None:
    """Delete the user's calibration for a model. Returns the deleted file. Raises `CalibrationError`."""
    path = path_of(model)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(f"Cannot remove {path}: {error.strerror}.") from error
    return path
