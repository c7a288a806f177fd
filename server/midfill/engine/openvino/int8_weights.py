"""A model's weights for OpenVINO: quantized to int8 once, then kept in the cache and mapped at every start.

Mapped weights need not be in memory twice: after OpenVINO has packed them, which it does in its first pass,
their pages are given back to the system. A folder in the cache belongs to one state of one model's files, or
of those with an adapter merged into them; it is built beside its final path, renamed to it, and the folder
that it replaces is deleted.

Knows files and arrays; nothing of graphs. Imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from midfill.adapters.format import Adapter
from midfill.errors import AdapterError, MidfillError, ModelError
from midfill.models import store
from midfill.models.safetensors_io import find_tensors, read_blocks, shapes_of
from midfill.system.private import private, private_folder

Floats = npt.NDArray[np.float32]

_LOG = logging.getLogger(__name__)

_BLOCK_ELEMENTS = 1 << 18
"""Rows are quantized in blocks of about this many elements, so that the scratch memory stays in the cache."""

_MIN_CACHED_ELEMENTS = 1 << 24
"""A model with fewer weights is quantized at every start, in less than half a second."""

_FORMAT = 1
_ADAPTED = "-adapted"
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """An int8 matrix (outputs x inputs) and its scales (outputs x 1): a row is about values * scale."""

    values: npt.NDArray[np.int8]
    scales: Floats


Tensors = dict[str, Floats | QuantizedTensor]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The tensors of a model, by name."""

    tensors: Tensors
    _mapped: tuple[npt.NDArray[np.int8], ...] = ()

    def size_of(self, layers: Iterable[str]) -> int:
        """Return the size in bytes of these layers' matrices."""
        found = (self.tensors[f"{layer}.weight"] for layer in layers)
        return sum(one.values.nbytes if isinstance(one, QuantizedTensor) else one.nbytes for one in found)

    def release_pages(self) -> None:
        """Let the system reclaim the pages of the mapped files; reading them again brings them back."""
        for mapped in self._mapped:
            if isinstance(mapped, np.memmap):
                with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
                    mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # noqa: SLF001 - numpy has no name for it


@dataclass(frozen=True, slots=True)
class _TensorOffset:
    """Position of a tensor: its first element among the integers (if it is int8), and among the floats."""

    shape: tuple[int, ...]
    is_int8: bool
    integers: int
    floats: int


def read_weights(
    path: Path,
    *,
    exact: Callable[[str], bool],
    num_threads: int,
    report: Callable[[float], None],
) -> ModelWeights:
    """Return all tensors of a model's folder.

    Args:
        path: folder with safetensors files.
        exact: returns whether a tensor of that name stays float32; tensors that are no matrices always do.
        num_threads: number of tensors that are quantized at a time.
        report: called with the share done, 0..1; an exception raised by it ends the loading.

    Raises:
        ModelError: a file is missing or damaged, or holds a value that is not a finite float.
    """
    files = find_tensors(path)
    shapes = shapes_of(files)
    offsets = _offsets(shapes, exact)
    reader = _WeightReader(files, offsets, num_threads, report)
    if sum(map(math.prod, shapes.values())) < _MIN_CACHED_ELEMENTS:
        return ModelWeights(reader.read(*_empty(offsets)))
    integers, floats = _cached(path, files, reader)
    return ModelWeights(_views(offsets, integers, floats), (integers,))


def read_merged(path: Path, base: ModelWeights, adapter: Adapter, *, num_threads: int) -> ModelWeights:
    """Return the tensors of a model with an adapter merged into its matrices; the others are those of `base`.

    The sum is computed from the model's own files and quantized once, so its error is that of any quantized
    model. Added to weights that are quantized already, most of an adapter would be lost: its change of a
    single weight is less than a quantization step.

    Args:
        path: folder of the model.
        base: its tensors without the adapter, which stay as they are.
        adapter: fits the model.
        num_threads: number of tensors that are computed at a time.

    Raises:
        AdapterError: the sum is not finite.
        ModelError: a file is missing or damaged.
    """
    names = {f"{layer}.weight" for layer in adapter.branches}
    files = {name: file for name, file in find_tensors(path).items() if name in names}
    offsets = _offsets(
        shapes_of(files),
        lambda name: not isinstance(base.tensors[name], QuantizedTensor),
    )
    reader = _WeightReader(files, offsets, num_threads, lambda _: None, adapter)
    if sum(math.prod(offset.shape) for offset in offsets.values()) < _MIN_CACHED_ELEMENTS:
        return ModelWeights(base.tensors | reader.read(*_empty(offsets)), base._mapped)  # noqa: SLF001 - our own class
    integers, floats = _cached(path, files, reader)
    merged = base.tensors | _views(offsets, integers, floats)
    return ModelWeights(merged, (*base._mapped, integers))  # noqa: SLF001


def _offsets(shapes: dict[str, tuple[int, ...]], exact: Callable[[str], bool]) -> dict[str, _TensorOffset]:
    """Assign an offset to each tensor, the largest first."""
    offsets: dict[str, _TensorOffset] = {}
    integers = floats = 0
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        shape = shapes[name]
        is_int8 = len(shape) == 2 and not exact(name)
        offsets[name] = _TensorOffset(shape, is_int8, integers, floats)
        integers += _aligned(math.prod(shape)) if is_int8 else 0
        floats += _aligned(shape[0] if is_int8 else math.prod(shape))
    return offsets


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _sizes(offsets: dict[str, _TensorOffset]) -> tuple[int, int]:
    integers = sum(_aligned(math.prod(offset.shape)) for offset in offsets.values() if offset.is_int8)
    floats = sum(
        _aligned(offset.shape[0] if offset.is_int8 else math.prod(offset.shape))
        for offset in offsets.values()
    )
    return integers, floats


def _empty(offsets: dict[str, _TensorOffset]) -> tuple[npt.NDArray[np.int8], Floats]:
    integers, floats = _sizes(offsets)
    return np.empty(integers, np.int8), np.empty(floats, np.float32)


def _views(offsets: dict[str, _TensorOffset], integers: npt.NDArray[np.int8], floats: Floats) -> Tensors:
    weights: Tensors = {}
    for name, offset in offsets.items():
        size = math.prod(offset.shape)
        if offset.is_int8:
            values = integers[offset.integers : offset.integers + size].reshape(offset.shape)
            scales = floats[offset.floats : offset.floats + offset.shape[0]].reshape(-1, 1)
            weights[name] = QuantizedTensor(values, scales)
        else:
            weights[name] = floats[offset.floats : offset.floats + size].reshape(offset.shape)
    return weights


def forget_merged(path: Path) -> None:
    """Delete the cached weights of a model with an adapter; processes that have mapped them keep them."""
    for folder in (store.cache_root() / "rounded").glob(f"{glob.escape(_owner(path))}{_ADAPTED}-*"):
        shutil.rmtree(folder, ignore_errors=True)


class _WeightReader:
    """Reads and quantizes the tensors of a model, with or without an adapter added, into two arrays."""

    def __init__(
        self,
        files: dict[str, Path],
        offsets: dict[str, _TensorOffset],
        num_threads: int,
        report: Callable[[float], None],
        adapter: Adapter | None = None,
    ) -> None:
        self._files = files
        self.offsets = offsets
        self.adapter = adapter
        self._num_threads = num_threads
        self._report = report

    def read(self, integers: npt.NDArray[np.int8], floats: Floats) -> Tensors:
        """Fill the arrays, the largest tensors first; return the views of all tensors."""
        weights = _views(self.offsets, integers, floats)
        total = sum(math.prod(offset.shape) for offset in self.offsets.values())
        done = 0
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="midfill-load") as pool:
            tasks = {pool.submit(self._fill, name, target): name for name, target in weights.items()}
            try:
                for task in as_completed(tasks):
                    task.result()
                    done += math.prod(self.offsets[tasks[task]].shape)
                    self._report(done / total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return weights

    def _fill(self, name: str, target: Floats | QuantizedTensor) -> None:
        start = 0
        shape = self.offsets[name].shape
        for block in read_blocks(self._files[name], name, shape, _BLOCK_ELEMENTS, framework="np"):
            values = block.astype(np.float32)
            if self.adapter is not None:
                self._merge(name, start, values)
            if not isinstance(target, QuantizedTensor):
                if not np.isfinite(values).all():
                    raise self._not_finite(name)
                target[start : start + len(values)] = values
                start += len(values)
                continue
            extremes = np.maximum(values.max(axis=1), -values.min(axis=1))[:, None]
            if not np.isfinite(extremes).all():
                raise self._not_finite(name)
            scales = np.maximum(extremes / 127, np.finfo(np.float32).tiny)
            np.divide(values, scales, out=values)
            np.rint(values, out=values)
            target.values[start : start + len(values)] = values
            target.scales[start : start + len(values)] = scales
            start += len(values)

    def _merge(self, name: str, start: int, values: Floats) -> None:
        """Add the adapter's change to these rows of a matrix."""
        assert self.adapter is not None
        branch = self.adapter.branches[name.removesuffix(".weight")]
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the name
            values += np.float32(branch.scale) * branch.up[start : start + len(values)] @ branch.down

    def _not_finite(self, name: str) -> MidfillError:
        if self.adapter is not None:
            return AdapterError(
                f"With the adapter {self.adapter.path} {name} holds values that are not finite. "
                "It is damaged, or was trained on another model."
            )
        return ModelError(f"{name} holds values that are not finite (NaN or infinity). Pull the model again.")


def _cached(path: Path, files: dict[str, Path], reader: _WeightReader) -> tuple[npt.NDArray[np.int8], Floats]:
    """Return the two arrays of a model from the cache; build them first if they are not there."""
    owner, state = _names(path, files, reader)
    folder = store.cache_root() / "rounded"
    target = folder / f"{owner}-{state}"
    if (found := _open(target, reader.offsets)) is not None:
        return found
    try:
        private_folder(store.make_cache_root() / folder.name)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-", ignore_cleanup_errors=True) as new:
            _make(Path(new), reader)
            for old in folder.glob(f"{glob.escape(owner)}-{'?' * len(state)}"):
                shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was faster
                Path(new).rename(target)
            if (found := _open(target, reader.offsets)) is not None:
                return found
    except OSError as error:
        _LOG.warning("int8 weights cannot be cached in %s: %s", folder, error)
    arrays = _empty(reader.offsets)
    reader.read(*arrays)
    return arrays


def _names(path: Path, files: dict[str, Path], reader: _WeightReader) -> tuple[str, str]:
    """Return the parts of a cache folder's name: the model, and the state of its files.

    Two folders are kept per model: without an adapter, and with the latest merged adapter.
    """
    stats = [(file.name, file.stat()) for file in sorted(set(files.values()))]
    exact = [name for name, offset in reader.offsets.items() if not offset.is_int8]
    state: list[Any] = [_FORMAT, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats], exact]
    kind = ""
    if reader.adapter is not None:
        state += [reader.adapter.digest, sorted(reader.offsets)]
        kind = _ADAPTED
    return f"{_owner(path)}{kind}", _digest(json.dumps(state))


def _owner(path: Path) -> str:
    resolved = path.resolve()
    return f"{resolved.name}-{_digest(str(resolved))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _make(folder: Path, reader: _WeightReader) -> None:
    num_integers, num_floats = _sizes(reader.offsets)
    integers = np.lib.format.open_memmap(
        folder / "integers.npy", mode="w+", dtype=np.int8, shape=(num_integers,)
    )
    floats = np.lib.format.open_memmap(
        folder / "floats.npy", mode="w+", dtype=np.float32, shape=(num_floats,)
    )
    reader.read(integers, floats)
    for name, array in (("integers.npy", integers), ("floats.npy", floats)):
        private(folder / name)
        if sys.platform == "win32":
            array.flush()
        else:
            # Python lets no other thread run while it flushes a mapping, which may take half a second.
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())


def _open(folder: Path, offsets: dict[str, _TensorOffset]) -> tuple[npt.NDArray[np.int8], Floats] | None:
    """Return the arrays in a folder, the large one mapped; None if they are missing or of another size."""
    try:
        # Copy on write, because OpenVINO takes no array that is read-only. Nothing is ever written.
        integers = np.load(folder / "integers.npy", mmap_mode="c", allow_pickle=False)
        floats = np.load(folder / "floats.npy", allow_pickle=False)
    except (OSError, ValueError):
        return None
    sizes = _sizes(offsets)
    right = integers.dtype == np.int8 and floats.dtype == np.float32
    return (integers, floats) if right and (integers.size, floats.size) == sizes else None
