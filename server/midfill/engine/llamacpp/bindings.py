"""llama.cpp's C interface, called by ctypes in the shared library of the wheel `xllamacpp`.

The wheel's Python module offers a server only, but its library exports all of llama.cpp's functions. Structs
are passed by value and their layout changes between versions, so one exact version is accepted, and `library`
compares the defaults that the library returns with known values before anything else is called. Everything
that depends on the version is in this file. Knows no chunks, slots or models. Calls release the interpreter
lock.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from ctypes import CFUNCTYPE, POINTER, Structure
from ctypes import c_bool as boolean
from ctypes import c_char_p as text
from ctypes import c_float as real
from ctypes import c_int8 as int8
from ctypes import c_int32 as int32
from ctypes import c_size_t as size
from ctypes import c_uint32 as uint32
from ctypes import c_void_p as pointer
from functools import cache
from pathlib import Path
from typing import Any

from midfill.errors import EngineError

_LOG = logging.getLogger(__name__)

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
"""The version whose layouts are below; the extra `llamacpp` in pyproject.toml pins the same."""

INSTALL = f'pip install "{PACKAGE}=={VERSION}"'

F32 = 0
F16 = 1
Q8_0 = 8
"""Values of `enum ggml_type`."""

ABORTED, NO_CELLS, OUT_OF_MEMORY = 2, 1, -2
"""What `llama_decode` returns, besides 0 for success: aborted by the callback; no place in the KV cache."""

LOAD_MAPPED = 1
"""Value of `enum llama_load_mode`: map the file into memory."""

FLASH_ATTENTION_OFF, FLASH_ATTENTION_ON = 0, 1

_ERROR_LEVEL = 4
_NUM_ERRORS = 8
_GPU_TYPES = (1, 2)  # values of `enum ggml_backend_dev_type`: a card, a processor's own graphics


class ModelParams(Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", pointer),
        ("tensor_buft_overrides", pointer),
        ("n_gpu_layers", int32),
        ("split_mode", int32),
        ("load_mode", int32),
        ("lazy_mode", int32),
        ("main_gpu", int32),
        ("tensor_split", pointer),
        ("progress_callback", pointer),
        ("progress_callback_user_data", pointer),
        ("kv_overrides", pointer),
        ("vocab_only", boolean),
        ("check_tensors", boolean),
        ("use_extra_bufts", boolean),
        ("no_host", boolean),
        ("no_alloc", boolean),
        ("load_mtp", boolean),
    )


class ContextParams(Structure):
    """`struct llama_context_params`."""

    _fields_ = (
        ("n_ctx", uint32),
        ("n_batch", uint32),
        ("n_ubatch", uint32),
        ("n_seq_max", uint32),
        ("n_rs_seq", uint32),
        ("n_outputs_max", uint32),
        ("n_outputs_max_per_seq", uint32),
        ("n_threads", int32),
        ("n_threads_batch", int32),
        ("ctx_type", int32),
        ("rope_scaling_type", int32),
        ("pooling_type", int32),
        ("attention_type", int32),
        ("flash_attn_type", int32),
        ("rope_freq_base", real),
        ("rope_freq_scale", real),
        ("yarn_ext_factor", real),
        ("yarn_attn_factor", real),
        ("yarn_beta_fast", real),
        ("yarn_beta_slow", real),
        ("yarn_orig_ctx", uint32),
        ("defrag_thold", real),
        ("cb_eval", pointer),
        ("cb_eval_user_data", pointer),
        ("type_k", int32),
        ("type_v", int32),
        # The abort callback and its data, for which there is a function, and the size of a cache for mixtures
        # of experts, in an unknown order.
        ("unused_1", pointer),
        ("unused_2", pointer),
        ("unused_3", pointer),
        ("embeddings", boolean),
        ("offload_kqv", boolean),
        ("no_perf", boolean),
        ("op_offload", boolean),
        ("swa_full", boolean),
        ("kv_unified", boolean),
        ("samplers", pointer),
        ("n_samplers", size),
        ("ctx_other", pointer),
    )


class Batch(Structure):
    """`struct llama_batch`."""

    _fields_ = (
        ("n_tokens", int32),
        ("token", POINTER(int32)),
        ("embd", pointer),
        ("pos", POINTER(int32)),
        ("n_seq_id", POINTER(int32)),
        ("seq_id", POINTER(POINTER(int32))),
        ("logits", POINTER(int8)),
    )


_MODEL_DEFAULTS = dict.fromkeys(name for name, _ in ModelParams._fields_) | {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
    "vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False,
    "no_alloc": False, "load_mtp": False,
}  # fmt: skip
_CONTEXT_DEFAULTS = dict.fromkeys(name for name, _ in ContextParams._fields_) | {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0, "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "ctx_type": 0,
    "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1,
    "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "yarn_orig_ctx": 0, "defrag_thold": -1.0,
    "type_k": F16, "type_v": F16, "embeddings": False, "offload_kqv": True, "no_perf": True,
    "op_offload": True, "swa_full": True, "kv_unified": False, "n_samplers": 0,
}  # fmt: skip
"""Values of the default parameters by name; None is a null pointer."""

_LogCallback = CFUNCTYPE(None, int32, text, pointer)

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_log_set": (None, [_LogCallback, pointer]),
    "llama_backend_init": (None, []),
    "llama_supports_gpu_offload": (boolean, []),
    "llama_model_load_from_file": (pointer, [text, ModelParams]),
    "llama_model_free": (None, [pointer]),
    "llama_model_get_vocab": (pointer, [pointer]),
    "llama_model_n_ctx_train": (int32, [pointer]),
    "llama_model_n_layer": (int32, [pointer]),
    "llama_model_size": (ctypes.c_uint64, [pointer]),
    "llama_model_ftype": (int32, [pointer]),
    "llama_ftype_name": (text, [int32]),
    "llama_model_has_encoder": (boolean, [pointer]),
    "llama_model_is_recurrent": (boolean, [pointer]),
    "llama_model_is_hybrid": (boolean, [pointer]),
    "llama_model_is_diffusion": (boolean, [pointer]),
    "llama_model_meta_val_str": (int32, [pointer, text, text, size]),
    "llama_vocab_n_tokens": (int32, [pointer]),
    "llama_init_from_model": (pointer, [pointer, ContextParams]),
    "llama_free": (None, [pointer]),
    "llama_n_ctx": (uint32, [pointer]),
    "llama_set_n_threads": (None, [pointer, int32, int32]),
    "llama_set_abort_callback": (None, [pointer, pointer, pointer]),
    "llama_decode": (int32, [pointer, Batch]),
    "llama_get_logits_ith": (POINTER(real), [pointer, int32]),
    "llama_get_memory": (pointer, [pointer]),
    "llama_memory_seq_rm": (boolean, [pointer, int32, int32, int32]),
    "llama_memory_seq_cp": (None, [pointer, int32, int32, int32, int32]),
    "llama_memory_seq_pos_max": (int32, [pointer, int32]),
    "llama_state_seq_get_size": (size, [pointer, int32]),
    "llama_state_seq_get_data": (size, [pointer, pointer, size, int32]),
    "llama_state_seq_set_data": (size, [pointer, pointer, size, int32]),
    "llama_adapter_lora_init": (pointer, [pointer, text]),
    "llama_adapter_lora_free": (None, [pointer]),
    "llama_set_adapters_lora": (int32, [pointer, POINTER(pointer), size, POINTER(real)]),
    "llama_tokenize": (int32, [pointer, text, int32, POINTER(int32), int32, boolean, boolean]),
    "ggml_backend_load_all": (None, []),
    "ggml_backend_dev_count": (size, []),
    "ggml_backend_dev_get": (pointer, [size]),
    "ggml_backend_dev_name": (text, [pointer]),
    "ggml_backend_dev_description": (text, [pointer]),
    "ggml_backend_dev_type": (int32, [pointer]),
    "ggml_backend_dev_memory": (None, [pointer, POINTER(size), POINTER(size)]),
}


class Library:
    """The loaded library. Its functions are attributes, by their names in C.

    Raises `EngineError` if it lacks a function or has other layouts.
    """

    def __init__(self, path: Path) -> None:
        # Otherwise a failed assertion attaches a debugger to this process.
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        self.errors: deque[str] = deque(maxlen=_NUM_ERRORS)
        self._library = _open(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                raise EngineError(f"{path} lacks the function {name}. Install it again: {INSTALL}") from error
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        _check_defaults(path, self.llama_model_default_params(), _MODEL_DEFAULTS)
        _check_defaults(path, self.llama_context_default_params(), _CONTEXT_DEFAULTS)
        self._log = _LogCallback(self._record)
        self.llama_log_set(self._log, None)
        # Before anything else: without its backends the library aborts the process.
        self.ggml_backend_load_all()
        self.llama_backend_init()

    def __getattr__(self, name: str) -> Any:
        """Fail; it tells the type checker that functions are attributes."""
        raise AttributeError(name)

    def _record(self, level: int, message: bytes | None, _data: object) -> None:
        """Keep messages about errors; they name files and tensors, never a prompt."""
        line = (message or b"").decode(errors="replace").strip()
        if level == _ERROR_LEVEL and line:
            self.errors.append(line)
            _LOG.debug("llama.cpp: %s", line)

    def reason(self) -> str:
        """Return the first message about an error since the last call, without the function's name.

        Those that follow it are less specific.
        """
        line = self.errors[0] if self.errors else "the library does not say why"
        self.errors.clear()
        return (line.partition(": ")[2] or line).rstrip(".")


@cache
def library() -> Library:
    """Load the library of the installed wheel, once per process.

    Raises `EngineError` if it is missing, another version, or cannot be loaded.
    """
    try:
        found = importlib.metadata.version(PACKAGE)
        spec = importlib.util.find_spec(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise EngineError(f'Runner "llamacpp" needs the package {PACKAGE} {VERSION}. Run: {INSTALL}')
    if found.partition("+")[0] != VERSION:
        raise EngineError(
            f'Runner "llamacpp" needs {PACKAGE} {VERSION}, but {found} is installed, whose functions take '
            f"other parameters. Run: {INSTALL}"
        )
    ending = "pyd" if sys.platform == "win32" else "so"
    files = sorted(Path(spec.origin).parent.glob(f"{PACKAGE}*.{ending}"))
    if not files:
        raise EngineError(f"{PACKAGE} {found} has no library. Install it again: {INSTALL}")
    return Library(files[0])


def gpus(lib: Library) -> list[tuple[int, str, str, int, int]]:
    """Return the GPUs that the library can use: handle, name, description, free and total bytes."""
    found = []
    for number in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(number)
        if lib.ggml_backend_dev_type(device) in _GPU_TYPES:
            free, total = size(), size()
            lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            name, description = lib.ggml_backend_dev_name(device), lib.ggml_backend_dev_description(device)
            found.append((device, name.decode(), description.decode(), free.value, total.value))
    return found


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        hint = " Install it: apt install libgomp1, or dnf install libgomp." if "libgomp" in str(error) else ""
        raise EngineError(f"{path} cannot be loaded: {error}.{hint}") from error


def _check_defaults(path: Path, params: Structure, expected: Mapping[str, Any]) -> None:
    """Raise `EngineError` if a struct of default parameters has other values than this version's."""
    for name, value in expected.items():
        found = getattr(params, name)
        if found != value:
            raise EngineError(
                f"{path} is not llama.cpp as {PACKAGE} {VERSION} brings it: its default for {name} is "
                f"{found!r}, not {value!r}. Install it again: {INSTALL}"
            )
