"""A LoRA adapter in PEFT's format: a folder with a configuration and weights, read and checked.

Everything is checked before a model is changed: the options of the configuration against a list of supported
ones, the names of the tensors against the layers that the configuration selects, their shapes against the
base model's, and that all values are finite. What PEFT would accept with a warning, or would run as code, is
refused. `peft.PeftModel.from_pretrained` is the reference that runners are tested against. Works on files and
arrays, knows no runners; imports neither torch nor peft. Runs on any thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - with it numpy, and so safetensors, knows bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from midfill.adapters.patterns import PatternError, compile_pattern, ends, fullmatch
from midfill.errors import AdapterError, ModelError
from midfill.models.gguf import linear_layers
from midfill.models.gguf_file import open_gguf
from midfill.models.safetensors_io import check_header, find_tensors, shapes_of
from midfill.system.file_errors import why_unreadable
from midfill.system.json_files import parse_json, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Layers = Mapping[str, tuple[int, int]]
"""The linear layers of a base model: (outputs, inputs) by the module's name."""

_MAX_CONFIG_BYTES = 1 << 20
_MAX_RANK = 256
# Limits of rank_pattern and alpha_pattern: plain names are cheap to match, expressions are not.
_MAX_NAMED = 5000
_MAX_EXPRESSIONS = 100
_PREFIX = "base_model.model."
_SAMPLES = 4
_SAMPLE_BYTES = 64

# Embeddings are looked up, not multiplied, and a head may share their weights.
_NO_LINEAR = frozenset({"embed_tokens", "wte", "wpe", "embed_positions", "lm_head"})

_INFORMATIVE = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        "bias", "init_lora_weights", "ensure_weight_tying", "runtime_config", "ephemeral_gpu_offload",
        # Meaningless without the option that they belong to, which is refused.
        "megatron_core", "qalora_group_size", "loftq_config",
    }
)  # fmt: skip
"""Options of `LoraConfig` that are supported, or have no effect once an adapter is trained. `fan_in_fan_out`
matters for merging only: the product is the same however a base layer stores its weight."""

_REASONS = {
    "megatron_config": "names a Python module to import",
    "modules_to_save": "replaces whole layers",
    "use_dora": "needs the base weights unquantised",
    "lora_bias": "adds biases",
    "target_parameters": "changes parameters that are not linear layers",
    "trainable_token_indices": "changes embeddings",
    "layer_replication": "adds layers",
    "alora_invocation_tokens": "applies to a part of the text only",
    "arrow_config": "chooses among several adapters",
    "use_qalora": "changes how a quantised base is computed",
}
"""Why an option is refused; options that are not listed are unknown."""

_PLAIN = re.compile(r"[\w.-]+")
_LAYER_NUMBER = re.compile(r"\.(\d{1,9})\.")

# These leave the base weights unchanged; the others rewrite them.
_WEIGHT_INITS = (True, False, None, "gaussian")


@dataclass(frozen=True, slots=True)
class Branch:
    """What an adapter adds to a linear layer: y += scale * up @ (down @ x).

    Attributes:
        down: rank x inputs.
        up: outputs x rank.
        scale: `lora_alpha` divided by the rank, or by its square root with rsLoRA.
    """

    down: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits the layers it was checked against.

    Attributes:
        path: its folder.
        digest: from `digest_of`.
        base: the base model as its author named it, or None.
        rank: the largest rank of its branches.
        branches: by name of the layer.
    """

    path: Path
    digest: str
    base: str | None
    rank: int
    branches: dict[str, Branch]

    @property
    def num_parameters(self) -> int:
        """Number of weights of all branches."""
        return sum(branch.down.size + branch.up.size for branch in self.branches.values())


def read(path: Path, layers: Layers) -> Adapter:
    """Read the adapter of a folder and check it against the base model's layers (see `layers_of`).

    Raises:
        AdapterError: it is no adapter, is damaged, uses unsupported options, or does not fit the model.
    """
    config = read_config(path)
    plan = _plan(path, config, layers)
    branches = {}
    weights = path / WEIGHTS
    try:
        check_header(weights)
        with safe_open(weights, framework="np") as tensors:
            _check_names(path, set(tensors.keys()), plan)
            for name, (rank, scale) in plan.items():
                outputs, inputs = layers[name]
                down = _tensor(weights, tensors, f"{_PREFIX}{name}.lora_A.weight", (rank, inputs))
                up = _tensor(weights, tensors, f"{_PREFIX}{name}.lora_B.weight", (outputs, rank))
                branches[name] = Branch(down, up, scale)
    except (SafetensorError, OSError, ModelError) as error:
        raise AdapterError(f"{weights} is damaged or incomplete ({error}).") from error
    base = config.get("base_model_name_or_path")
    rank = max(rank for rank, _ in plan.values())
    return Adapter(path, digest_of(path), base if isinstance(base, str) else None, rank, branches)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of an adapter's folder, after checking its options.

    Raises `AdapterError` if an option is not supported, or the file of weights is missing.
    """
    config = _load_config(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is not a LoRA adapter; other kinds are not supported.")
    for option, value in config.items():
        if option not in _INFORMATIVE and value not in (None, False, [], {}):
            reason = _REASONS.get(option, "midfill does not know")
            raise AdapterError(f"The adapter {path} uses {option}, which {reason}; this is not supported.")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"The adapter {path} has trained biases (bias={config['bias']!r}), which are not supported."
        )
    start = config.get("init_lora_weights")
    if not any(start is known for known in _WEIGHT_INITS[:3]) and start != _WEIGHT_INITS[3]:
        raise AdapterError(
            f"The adapter {path} was initialised with init_lora_weights={start!r}, which changes the base "
            "weights. Convert it to a plain LoRA with PEFT first."
        )
    if not _is_regular(path / WEIGHTS):
        pickled = " (adapter_model.bin is pickled and is not opened)"
        hint = pickled if (path / "adapter_model.bin").exists() else ""
        raise AdapterError(
            f"The adapter {path} has no {WEIGHTS}{hint}. Save it with safe_serialization=True."
        )
    return config


def digest_of(path: Path) -> str:
    """Return the SHA-256 of an adapter's configuration and weights, 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            with (path / name).open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise AdapterError(f"{path / name} cannot be read: {why_unreadable(error)}.") from error
    return whole.hexdigest()


def layers_of(model: Path) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a model's folder or GGUF file: all matrices but embeddings and the head.

    Raises `ModelError`.
    """
    if model.is_file():
        with open_gguf(model) as file:
            shapes = {name: layer.shape for name, layer in linear_layers(file).items()}
    else:
        shapes = {
            tensor.removesuffix(".weight"): (shape[0], shape[1])
            for tensor, shape in shapes_of(find_tensors(model)).items()
            if tensor.endswith(".weight") and len(shape) == 2
        }
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in _NO_LINEAR}


def fingerprint_of(model: Path) -> str:
    """Return a fingerprint that identifies a base model: a SHA-256 over names, shapes and sampled values.

    Takes a few milliseconds, since only some values of each tensor are read; models of different trainings
    differ in all of them. Independent of how the tensors are spread over files. Raises `ModelError`.
    """
    whole = hashlib.sha256()
    by_file: dict[Path, list[str]] = {}
    for name, file in find_tensors(model).items():
        by_file.setdefault(file, []).append(name)
    samples: dict[str, bytes] = {}
    for file, names in by_file.items():
        samples.update(_samples(file, names))
    for name in sorted(samples):
        whole.update(name.encode() + b"\0" + samples[name])
    return whole.hexdigest()


def _samples(file: Path, names: list[str]) -> dict[str, bytes]:
    """Return type, shape and some bytes of each tensor, located by the file's header."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(header_bytes))
        samples = {}
        for name in names:
            place = header[name]
            start, end = place["data_offsets"]
            parts = [json.dumps([place["dtype"], place["shape"]]).encode()]
            for number in range(_SAMPLES):
                at = start + (end - start) * number // _SAMPLES
                stream.seek(8 + header_bytes + at)
                parts.append(stream.read(min(_SAMPLE_BYTES, end - at)))
            samples[name] = b"\0".join(parts)
    return samples


def _load_config(path: Path) -> Any:
    file = path / CONFIG
    if not path.exists():
        raise AdapterError(f"There is no folder {path}. Check the path.")
    if not _is_regular(file):
        raise AdapterError(f"{path} is not an adapter: it has no {CONFIG}.")
    try:
        return read_json(file, max_bytes=_MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is not an adapter: {CONFIG} cannot be read: {why_unreadable(error)}."
        ) from error


def _is_regular(path: Path) -> bool:
    """Return whether a path is a regular file, not a pipe, which could block for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _plan(path: Path, config: Mapping[str, Any], layers: Layers) -> dict[str, tuple[int, float]]:
    """Return rank and scale of each layer that the configuration selects, by PEFT's rules."""
    try:
        ranks, alphas = (_patterns(config, key) for key in ("rank_pattern", "alpha_pattern"))
        chooser = _chooser(config)
        chosen = [name for name in layers if chooser(name)]
        plan = {}
        for name in chosen:
            rank = _by_pattern(ranks, name, config.get("r", 8))
            alpha = _by_pattern(alphas, name, config.get("lora_alpha", 8))
            if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
                raise AdapterError(
                    f"The adapter {path} has rank {rank!r}; only ranks from 1 to {_MAX_RANK} are supported."
                )
            if type(alpha) not in (int, float) or not math.isfinite(alpha):
                raise AdapterError(f"The adapter {path} has lora_alpha {alpha!r}, which is not a number.")
            plan[name] = (rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    except (KeyError, TypeError, AttributeError, ArithmeticError, PatternError) as error:
        raise AdapterError(
            f"The {CONFIG} of {path} selects layers in a way that is not supported: {error}."
        ) from error
    if not plan:
        raise AdapterError(
            f"The adapter {path} does not fit the model: none of its target modules "
            f"({_shown(config.get('target_modules'))}) is one of its linear layers. "
            "Use an adapter trained on this model."
        )
    return plan


def _chooser(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a predicate: would PEFT add a LoRA to a layer of this name? See `peft.tuners.tuners_utils`."""
    excluded = _names(config.get("exclude_modules"))
    targets = _names(config["target_modules"])
    only = config.get("layers_to_transform")
    numbers = frozenset([only] if isinstance(only, int) else only or ())
    everywhere = isinstance(targets, str) or only is None or only == []
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if len(patterns) > _MAX_EXPRESSIONS:
        raise PatternError(
            f"layers_pattern has {len(patterns)} entries; at most {_MAX_EXPRESSIONS} are supported"
        )

    def chooses(name: str) -> bool:
        if excluded and _named(excluded, name):
            return False
        if targets == "all-linear":
            return True
        if not _named(targets, name):
            return False
        return everywhere or _number(patterns, name) in numbers

    return chooses


def _names(value: Any) -> str | frozenset[str]:
    """Return an expression unchanged, a list of names as a set."""
    return value if isinstance(value, str) else frozenset(value or ())


def _number(patterns: Iterable[str], name: str) -> int | None:
    """Return the layer number in a module's name: between dots, after a match of one of the patterns."""
    for pattern in patterns:
        for begin in _starts(name):
            for end in sorted(ends(pattern, name, [begin]), reverse=True):
                if match := _LAYER_NUMBER.match(name, end):
                    return int(match[1])
    return None


def _starts(name: str) -> list[int]:
    """Return the offsets of a name's parts: 0 and those after each dot."""
    return [0, *(at + 1 for at, mark in enumerate(name) if mark == ".")]


def _named(targets: str | frozenset[str], name: str) -> bool:
    if isinstance(targets, str):
        return fullmatch(targets, name)
    return any(name[begin:] in targets for begin in _starts(name))


def _patterns(config: Mapping[str, Any], option: str) -> Mapping[str, Any]:
    """Return an option's values by name or expression, after checking that there are not too many."""
    found: Mapping[str, Any] = config.get(option) or {}
    expressions = [key for key in found if not _PLAIN.fullmatch(key)]
    if len(found) > _MAX_NAMED or len(expressions) > _MAX_EXPRESSIONS:
        raise PatternError(
            f"{option} has {len(found)} entries, {len(expressions)} of them expressions; at most "
            f"{_MAX_NAMED} and {_MAX_EXPRESSIONS} are supported"
        )
    for expression in expressions:
        compile_pattern(expression)
    return found


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if _fits_end(key, name)), default)


def _fits_end(key: str, name: str) -> bool:
    """Return whether an expression matches the end of a name, from its begin or from after a dot."""
    if _PLAIN.fullmatch(key):
        # A dot is any character.
        return _plain(key).search(name) is not None
    return len(name) in ends(key, name, _starts(name))


@lru_cache(maxsize=2 * _MAX_NAMED)
def _plain(key: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.){key}$")


def _check_names(path: Path, found: set[str], plan: Mapping[str, Any]) -> None:
    expected = {f"{_PREFIX}{name}.lora_{side}.weight" for name in plan for side in "AB"}
    if missing := sorted(expected - found):
        raise AdapterError(
            f"The adapter {path} does not fit the model: it lacks {len(missing)} tensors, for example "
            f"{missing[0]}. Use an adapter trained on this model."
        )
    if unknown := sorted(found - expected):
        raise AdapterError(
            f"The adapter {path} does not fit the model: {len(unknown)} of its tensors belong to no layer of "
            f"the model, for example {unknown[0]}. Use an adapter trained on this model."
        )


def _tensor(file: Path, tensors: Any, name: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    found = tuple(tensors.get_slice(name).get_shape())
    if found != shape:
        raise AdapterError(
            f"The adapter {file.parent} does not fit the model: {name} has shape {found}, the model needs "
            f"{shape}. Use an adapter trained on this model."
        )
    kind = tensors.get_slice(name).get_dtype()
    if kind not in {"F32", "F16", "BF16"}:
        raise AdapterError(f"{name} in {file} has type {kind}; only 16- and 32-bit floats are supported.")
    values: npt.NDArray[np.float32] = tensors.get_tensor(name).astype(np.float32)
    if not np.isfinite(values).all():
        raise AdapterError(f"{name} in {file} has values that are not finite (NaN or infinity).")
    return values


def _shown(targets: Any) -> str:
    return ", ".join(map(str, targets[:8])) if isinstance(targets, list) else str(targets)[:80]
