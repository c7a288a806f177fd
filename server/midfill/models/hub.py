"""Fetch a model or an adapter from the Hugging Face hub, or from a mirror of it (HF_ENDPOINT).

Fetches configuration, tokenizer and safetensors weights only: no code, no pickles. Resumes interrupted
downloads. Of midfill's cache, knows only the folder that it is given.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from midfill.errors import ModelError
from midfill.system.json_files import MAX_BYTES

Report = Callable[[int], None]
"""Called with the number of bytes fetched so far."""

Progress = Callable[[str, float | None], None]

# Timeout of the hub's first answer; then the next source is tried.
_FIRST_ANSWER_S = 4.0
_POLL_S = 0.25

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "model.safetensors.index.json",
)

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class HubUnreachableError(ModelError):
    """The hub does not answer, or is switched off; another source may be tried."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files to fetch.

    Attributes:
        repository: the hub id.
        revision: the commit.
        sizes: size of each file in bytes.
        hashes: SHA-256 of the large files.
    """

    repository: str
    revision: str
    sizes: dict[str, int]
    hashes: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(self.sizes.values())


def look_up(repository: str) -> Listing:
    """Ask the hub which files the model has.

    Raises:
        HubUnreachableError: no answer within a few seconds, or HF_HUB_OFFLINE is set.
        ModelError: there is no such repository, no access to it, or no weights in it that midfill loads.
    """
    info = _ask(repository)
    names = {item.rfilename: item for item in info.siblings or ()}
    # `*` matches slashes and "..", and the hub's library takes these names as patterns again.
    plain = [name for name in names if _PLAIN.fullmatch(name)]
    weights = [name for name in plain if fnmatch(name, "model*.safetensors")]
    weights = weights or [name for name in plain if name.endswith(".safetensors")]
    if not weights:
        raise ModelError(
            f"The hub repository {repository} has no safetensors weights; midfill refuses pickled ones. "
            "Choose another model, or convert this one to safetensors yourself if you trust it."
        )
    wanted = {name: names[name] for name in (*_SMALL_FILES, *weights) if name in names}
    for name in set(_SMALL_FILES) & set(wanted):
        if (names[name].size or 0) > MAX_BYTES:
            raise ModelError(
                f"{name} of {repository} has {names[name].size >> 20} MB; the maximum is "
                f"{MAX_BYTES >> 20} MB. Choose another model."
            )
    return Listing(
        repository,
        info.sha or "main",
        {name: item.size or 0 for name, item in wanted.items()},
        {name: item.lfs.sha256 for name, item in wanted.items() if item.lfs is not None},
    )


def fetch(listing: Listing, folder: Path, report: Report) -> None:
    """Fetch all files into the folder, verified by SHA-256 where the hub gives one.

    Raises:
        ModelError: the connection broke (the next call resumes), or a file has the wrong hash.
    """
    _fetch_files(listing, folder, report)
    if not (folder / "tokenizer.json").exists():
        _build_tokenizer(folder, listing.repository)


def _fetch_files(listing: Listing, folder: Path, report: Report) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        with _watched(folder, report):
            snapshot_download(
                listing.repository,
                revision=listing.revision,
                local_dir=folder,
                allow_patterns=list(listing.sizes),
            )
    except Exception as error:
        raise _explain(error, listing.repository, "stopped answering; run it again to resume") from error
    for name, expected in listing.hashes.items():
        with (folder / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            (folder / name).unlink()
            raise ModelError(
                f"{name} of {listing.repository} has the wrong SHA-256: {found} instead of {expected}. The "
                "file was deleted. Run it again."
            )
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def fetch_adapter(repository: str, folder: Path, report: Progress) -> None:
    """Fetch the two files of a PEFT adapter, and no others. Raises as `look_up` and `fetch` do."""
    info = _ask(repository)
    names = {item.rfilename: item for item in info.siblings or ()}
    wanted = ("adapter_config.json", "adapter_model.safetensors")
    if missing := [name for name in wanted if name not in names]:
        raise ModelError(
            f"The hub repository {repository} has no {missing[0]}, so midfill cannot use it as an adapter "
            "(pickled weights are refused)."
        )
    sizes = {name: names[name].size or 0 for name in wanted}
    hashes = {name: names[name].lfs.sha256 for name in wanted if names[name].lfs is not None}
    listing = Listing(repository, info.sha or "main", sizes, hashes)
    total = max(1, listing.total_bytes)
    _fetch_files(listing, folder, lambda done: report(f"fetching {repository}", min(1.0, done / total)))


def _ask(repository: str) -> Any:
    """Return the hub's answer. Raises `HubUnreachableError` after `_FIRST_ANSWER_S`.

    Runs in a thread, because a DNS lookup cannot be given a timeout.
    """
    answer: list[Any] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            answer.append(HfApi().model_info(repository, timeout=_FIRST_ANSWER_S, files_metadata=True))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, name="midfill-hub", daemon=True)
    thread.start()
    thread.join(_FIRST_ANSWER_S + 0.5)
    if not answer:
        raise HubUnreachableError(f"The hub did not answer within {_FIRST_ANSWER_S:.0f} s.")
    if isinstance(answer[0], Exception):
        raise _explain(answer[0], repository, "cannot be reached") from answer[0]
    return answer[0]


def _explain(error: Exception, repository: str, unreachable: str) -> Exception:
    """Return an error with a sentence for the user; errors that do not come from the hub are unchanged."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if _is_network(error):
        return HubUnreachableError(f"The hub ({constants.ENDPOINT}) {unreachable}: {error}")
    if status >= 500 or status == 429:
        return HubUnreachableError(f"The hub answered with HTTP status {status}. Try again later.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachableError("HF_HUB_OFFLINE switches the hub off; unset it to fetch a model.")
    if isinstance(error, errors.GatedRepoError):
        sentence = f"is gated: accept its licence at {page}, run `hf auth login`, and fetch it again."
    elif isinstance(error, errors.RepositoryNotFoundError):
        sentence = f"is not on the hub, or is private. Check its name ({page}), or run `hf auth login`."
    elif isinstance(error, errors.HFValidationError):
        sentence = f"is not a valid name of a hub repository: {error}"
    elif status in (401, 403):
        sentence = "cannot be fetched: the hub refuses access. Run `hf auth login`, and try again."
    elif status:
        sentence = f"cannot be fetched: the hub answered with HTTP status {status}: {error}"
    else:
        return error
    return ModelError(f"{repository} {sentence}")


def _is_network(error: Exception) -> bool:
    """Return whether there was no answer at all. The hub library's HTTP client depends on its version."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError | errors.OfflineModeIsEnabled):
        return False
    library = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(library & {"httpx", "httpx2", "requests"}) or isinstance(
        error, ConnectionError | TimeoutError | errors.LocalEntryNotFoundError
    )


def _build_tokenizer(folder: Path, repository: str) -> None:
    """Make a tokenizer.json from the older files of a slow tokenizer."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"{repository} has no tokenizer.json, and midfill cannot make one without running the "
            f"repository's own code, which it never does ({error})."
        ) from error
    if not (folder / "tokenizer.json").exists():
        raise ModelError(f"{repository} has no tokenizer that the `tokenizers` library can load.")


@contextmanager
def _watched(folder: Path, report: Report) -> Iterator[None]:
    """Report the size of a growing folder until the block ends."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            report(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))

    thread = threading.Thread(target=watch, name="midfill-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
