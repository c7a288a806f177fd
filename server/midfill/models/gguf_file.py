"""Read the GGUF container format: metadata and the location of each tensor.

Knows the file format and the shapes of its quantised blocks; nothing of architectures, tokenizers or
midfill's cache. Every count in the file is checked against the file's size before anything is allocated, so
that a damaged or hostile file raises a `ModelError`.

The `gguf` library's own reader is not used: it builds one numpy view per array entry, which takes half a
minute for a vocabulary of 150,000 tokens. This one takes well under a second.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midfill.errors import ModelError
from midfill.system.file_errors import why_unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Value types of the metadata, and their struct codes:
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_LENGTH = struct.Struct("<Q")
_ARRAY = 9
_MAX_DIMENSIONS = 4
_MAX_KEY_BYTES = 65_535
# Far more than any model has. As Python objects, values take up to a hundred times their size in the file.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_ENTRIES = 1 << 22
_MAX_TEXT_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The location of a tensor.

    Attributes:
        name: its name in the file, for example "blk.0.attn_q.weight".
        shape: as in torch and numpy, slowest dimension first (the file has it reversed).
        type_name: the ggml type, for example "Q8_0".
        offset: offset of its first byte in the file.
        row_bytes: bytes of one row (the last dimension).
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Number of rows of the last dimension."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file: its metadata, its tensors, and their values on request."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    _bytes: mmap.mmap

    def rows(self, tensor: TensorInfo, first: int, count: int) -> NDArray[np.float32]:
        """Return rows `first` to `first + count` of a tensor as float32, shape (count, last dimension)."""
        import gguf
        import numpy as np

        raw = np.frombuffer(
            self._bytes, np.uint8, count * tensor.row_bytes, tensor.offset + first * tensor.row_bytes
        )
        values = gguf.quants.dequantize(
            raw.reshape(count, tensor.row_bytes), gguf.GGMLQuantizationType[tensor.type_name]
        )
        return np.asarray(values, np.float32).reshape(count, tensor.shape[-1])


@contextmanager
def open_gguf(path: Path) -> Iterator[GGUFFile]:
    """Open a GGUF file for reading.

    Raises:
        ModelError: the file cannot be read, is not GGUF, is incomplete or inconsistent.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {why_unreadable(error)}.") from error
    with stream:
        try:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file cannot be mapped
            raise ModelError(f"The model file {path} is empty. Fetch it again.") from error
    try:
        yield _Reader(path, mapped).read()
    finally:
        # An exception's traceback may still hold an array over the mapped bytes; it then closes the map.
        with suppress(BufferError):
            mapped.close()


class _Reader:
    """Reads a header sequentially; checks every length against the rest of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0
        self._num_entries = 0
        self._text_bytes = 0

    def read(self) -> GGUFFile:
        if self._data[:4] != b"GGUF":
            raise ModelError(f"{self._path} is not a GGUF file: it does not begin with the letters GGUF.")
        self._at = 4
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise ModelError(
                f"{self._path} has GGUF version {version}; midfill reads versions 2 and 3 (little-endian). "
                "Convert it again with a current llama.cpp."
            )
        num_tensors, num_keys = self._unpack("QQ")
        # A key takes at least 8 + 4 + 1 bytes, a tensor's entry 8 + 4 + 8 + 4 + 8.
        if num_keys * 13 + num_tensors * 32 > self._size - self._at:
            raise self._damaged(
                f"its header claims {num_keys} keys and {num_tensors} tensors, more than fit into the file"
            )
        if num_keys > _MAX_KEYS or num_tensors > _MAX_TENSORS:
            raise self._damaged(
                f"its header claims {num_keys} keys and {num_tensors} tensors; models have at most "
                f"{_MAX_KEYS} and {_MAX_TENSORS}"
            )
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string(limit=_MAX_KEY_BYTES)
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind, key)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        tensors = self._locate(entries, metadata)
        return GGUFFile(self._path, metadata, tensors, self._data)

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"The model file {self._path} is damaged or incomplete: {what}. Fetch it again.")

    def _unpack(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{code}" if count == 1 else f"<{count}{code}"
        size = struct.calcsize(layout)
        if size > self._size - self._at:
            raise self._damaged(f"it ends inside the header, at byte {self._size}")
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += size
        return values

    def _string(self, limit: int | None = None) -> str:
        # A vocabulary has hundreds of thousands of texts.
        rest = self._size - self._at - _LENGTH.size
        if rest < 0:
            raise self._damaged(f"it ends inside the header, at byte {self._size}")
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        self._at += _LENGTH.size
        if length > rest or (limit is not None and length > limit):
            raise self._damaged(f"a text of {length} bytes at byte {self._at} does not fit")
        self._text_bytes += length
        if self._text_bytes > _MAX_TEXT_BYTES:
            raise self._damaged(f"its header has more than {_MAX_TEXT_BYTES >> 20} MB of text")
        raw = self._data[self._at : self._at + length]
        self._at += length
        # Vocabularies use the byte alphabet of BPE, which is valid UTF-8; the tokenizer's checks report
        # anything else with a better message than a failed decode.
        return raw.decode("utf-8", errors="replace")

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise self._damaged(f"the value of {key!r} has the unknown type {kind}")
        (item,) = self._unpack("I")
        (count,) = self._unpack("Q")
        smallest = 8 if item == _STRING else struct.calcsize(_SCALARS.get(item, "B"))
        if count * smallest > self._size - self._at:
            raise self._damaged(f"the list {key!r} of {count} entries does not fit")
        self._num_entries += count
        if self._num_entries > _MAX_ENTRIES:
            raise self._damaged(f"the list {key!r} and those before it have {self._num_entries} entries")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item in _SCALARS:
            return list(self._unpack(_SCALARS[item], count)) if count else []
        raise self._damaged(f"the list {key!r} has entries of the unsupported type {item}")

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(limit=_MAX_KEY_BYTES)
        (num_dimensions,) = self._unpack("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"the tensor {name!r} has {num_dimensions} dimensions")
        sizes = self._unpack("Q", num_dimensions)
        kind, offset = self._unpack("IQ")
        return name, tuple(reversed(sizes)), kind, offset

    def _locate(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> dict[str, TensorInfo]:
        if not entries:
            return {}  # a vocabulary-only file
        import gguf

        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 65_536:
            raise self._damaged(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            try:
                quant = gguf.GGMLQuantizationType(kind)
            except ValueError as error:
                raise ModelError(
                    f"The tensor {name!r} of {self._path} has the unknown type {kind}. A newer version of "
                    "the gguf package may know it: pip install --upgrade gguf"
                ) from error
            block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
            if shape[-1] % block:
                raise self._damaged(f"the rows of {name!r} are not whole {quant.name} blocks")
            row_bytes = shape[-1] // block * block_bytes
            info = TensorInfo(name, shape, quant.name, start + offset, row_bytes)
            if 0 in shape or info.offset + info.num_rows * row_bytes > self._size:
                raise self._damaged(f"the tensor {name!r} reaches beyond the end of the file")
            if name in tensors:
                raise self._damaged(f"it has two tensors named {name!r}")
            tensors[name] = info
        return tensors
