"""The devices that torch can use: what the engine uses of each kind, and which device a setting means.

`KINDS` is the table. A `Device` is a description, so that everything that follows from it can be tested on
any machine. AMD's GPUs are "cuda" for torch, and a kind of their own here. What is not an NVIDIA GPU runs
plain operations. Imports torch only to look for devices. Any thread.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from midfill.errors import EngineError

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
"""Every number format of weights, as the setting `dtype` names it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What the engine uses of a kind of device.

    Attributes:
        title: its name for the user.
        graphs: passes are captured as graphs; otherwise they are plain operations.
        fused: layers with the same input are computed as one, see `fuse`.
        dtypes: the formats that can be asked for.
        automatic: those that `dtype = "auto"` chooses from, the best first: the first that fits is taken.
        chunk_tokens: tokens per forward pass.
    """

    title: str
    graphs: bool
    fused: bool
    dtypes: tuple[str, ...]
    automatic: tuple[str, ...]
    chunk_tokens: int


_ON_GPUS = ("bfloat16", "float16", "int8", "int4", "float32")

KINDS = {
    "cpu": Kind("CPU", False, False, DTYPES, ("int8", "float32"), 64),
    # int8 is not chosen: torch has no fast product with it, so a token would take longer than with bfloat16.
    "cuda": Kind("NVIDIA GPU", True, True, _ON_GPUS, ("bfloat16", "float16", "int4"), 512),
    "rocm": Kind("AMD GPU", False, True, _ON_GPUS, ("bfloat16", "float16", "int8", "int4"), 512),
    "mps": Kind(
        "Apple GPU", False, True, ("float16", "int8", "int4", "float32"), ("float16", "int8", "int4"), 256
    ),
    "xpu": Kind("Intel GPU", False, True, _ON_GPUS, ("bfloat16", "float16", "int8", "int4"), 256),
}
"""Each kind of device. Only "cpu" has been measured; the others are executed on a CPU by the tests."""

_NATIVE_BFLOAT16 = (8, 0)
"""Compute capability from which NVIDIA's GPUs compute with bfloat16; older ones emulate it."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device, as torch and its driver describe it.

    Attributes:
        torch_name: for example "cuda:0".
        kind: a key of `KINDS`.
        name: the product's name.
        total_bytes: its memory.
        free_bytes: returns the memory that is free now.
        capability: NVIDIA's compute capability.
        architecture: AMD's name of it, for example "gfx1100".
        built_for: the architectures that this build of torch has kernels for; empty if it does not say.
    """

    torch_name: str
    kind: str
    name: str = ""
    total_bytes: int = 0
    free_bytes: Callable[[], int] = lambda: 0
    capability: tuple[int, int] | None = None
    architecture: str = ""
    built_for: tuple[str, ...] = ()

    @property
    def has_kernels(self) -> bool:
        """Return whether this build of torch has kernels for the device."""
        if self.kind == "rocm":
            return not self.built_for or self.architecture in self.built_for
        if self.capability is None or not self.built_for:
            return True
        return any(_runs(entry, self.capability) for entry in self.built_for)

    @property
    def half(self) -> str:
        """The 16-bit format that the device computes with."""
        if self.kind == "mps" or (self.capability is not None and self.capability < _NATIVE_BFLOAT16):
            return "float16"
        return "bfloat16"

    @property
    def has_flash(self) -> bool:
        """Return whether flash attention, which keeps no products of queries and keys, can be expected."""
        return self.kind == "cuda" and (self.capability or (0, 0)) >= _NATIVE_BFLOAT16

    @property
    def packed_products(self) -> bool:
        """Return whether torch has products with 4-bit weights for the device."""
        return self.kind == "cuda" and (self.capability or (0, 0)) >= _NATIVE_BFLOAT16

    @property
    def automatic(self) -> tuple[str, ...]:
        """The formats that `dtype = "auto"` chooses from, the best first."""
        other = "float16" if self.half == "bfloat16" else "bfloat16"
        return tuple(one for one in KINDS[self.kind].automatic if one != other)

    @property
    def whole_name(self) -> str:
        """Its name and what it is, for the user."""
        if self.capability is not None:
            return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"
        return f"{self.name} ({self.architecture})" if self.architecture else self.name


CPU = Device("cpu", "cpu")


def _runs(entry: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an entry of torch's list, as "sm_86" or "compute_90", runs on a capability.

    Compiled kernels run on later devices of the same generation, PTX code on all later ones.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry)
    if found is None:
        return False
    target = int(found[2]), int(found[3])
    if found[4] == "a":  # for this very architecture
        return capability == target
    if found[1] == "compute":
        return capability >= target
    return capability[0] == target[0] and capability[1] >= target[1]


def choose(wanted: str, devices: Sequence[Device]) -> tuple[Device, str]:
    """Return the device that a value of the setting `device` means, and why "auto" passed over a GPU, or "".

    Args:
        wanted: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
        devices: the GPUs that torch sees, see `torch_devices`.

    Raises:
        EngineError: there is no such device, or torch cannot use it.
    """
    if wanted == "cpu":
        return CPU, ""
    if wanted == "auto":
        # Others have to be asked for: nobody has measured that they are faster than the processor.
        gpus = [device for device in devices if device.kind in ("cuda", "rocm")]
        usable = [device for device in gpus if device.has_kernels]
        if usable:
            return usable[0], ""
        return CPU, f"{_no_kernels(gpus[0])} The model runs on the CPU." if gpus else ""
    kind, _, number = wanted.partition(":")
    if kind not in ("cuda", "mps", "xpu") or not (number or "0").isdecimal():
        raise EngineError(f'There is no device "{wanted}"; use auto, cpu, cuda, cuda:N, mps or xpu.')
    same = [device for device in devices if device.torch_name.partition(":")[0] == kind]
    index = int(number or 0)
    if index >= len(same):
        raise EngineError(
            f'Device "{wanted}" was not found; torch sees {len(same)} {kind} devices. '
            "`midfill doctor` shows what this build of torch can use."
        )
    if not same[index].has_kernels:
        raise EngineError(f'{_no_kernels(same[index])} Set device to "cpu" or "auto".')
    return same[index], ""


def _no_kernels(device: Device) -> str:
    return (
        f"This build of torch has no code for the {device.whole_name}, only for "
        f"{', '.join(device.built_for)}."
    )


def check_dtype(wanted: str, device: Device) -> str:
    """Return a value of the setting `dtype`, if the device can have it; "auto" stays.

    Raises:
        EngineError: there is no such format, or not for this device.
    """
    if wanted == "auto":
        return wanted
    if wanted not in DTYPES:
        raise EngineError(f'There is no dtype "{wanted}"; use auto, {", ".join(DTYPES)}.')
    kind = KINDS[device.kind]
    if wanted not in kind.dtypes:
        raise EngineError(f"{wanted} is not used on an {kind.title}; use {', '.join(kind.dtypes)} or auto.")
    return wanted


@dataclass(frozen=True, slots=True)
class Build:
    """What the installed torch was built for: versions, or "" for none.

    Attributes:
        version: of torch, for example "2.13.0+cu130".
        cuda, hip, xpu: of NVIDIA's, AMD's and Intel's libraries.
    """

    version: str
    cuda: str = ""
    hip: str = ""
    xpu: str = ""

    @property
    def title(self) -> str:
        """What it was built for, in words."""
        if self.hip:
            return f"AMD's ROCm {self.hip}"
        if self.cuda:
            return f"NVIDIA's CUDA {self.cuda}"
        return (
            f"Intel GPUs ({self.xpu})" if self.xpu else "the CPU" + " and Apple's GPU" * _is_apple_silicon()
        )


def _is_apple_silicon() -> bool:
    import platform

    return sys.platform == "darwin" and platform.machine() == "arm64"


def installed_build() -> Build:
    """Return what the installed torch was built for, from its files: importing it takes a second or two."""
    spec = importlib.util.find_spec("torch")
    version = importlib.metadata.version("torch") if spec is not None else ""
    if spec is None or spec.origin is None:
        return Build(version)
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return Build(version)
    return read_build(version, text)


def read_build(version: str, text: str) -> Build:
    """Return what a torch was built for, from the text of its file `version`."""
    found = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*= *'([^'\n]*)'", text, flags=re.MULTILINE))
    return Build(version, **found)


def may_have_gpu(build: Build, *, loads: Callable[[str], bool] | None = None) -> bool:
    """Return whether "auto" may find a GPU, from the build of torch and the driver, without importing torch.

    Args:
        build: see `installed_build`.
        loads: whether the system has a library; by default it is loaded.
    """
    loads = loads or _loads
    if build.hip:
        return Path("/dev/kfd").exists() or loads(
            "amdhip64.dll" if sys.platform == "win32" else "libamdhip64.so"
        )
    return bool(build.cuda) and loads("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def find_gpus(wanted: str) -> list[Device]:
    """Return the GPUs to choose from for a value of the setting `device`.

    Imports torch, except for "cpu", and for "auto" without a driver.
    """
    if wanted == "cpu" or (wanted == "auto" and not may_have_gpu(installed_build())):
        return []
    return torch_devices()


def torch_devices() -> list[Device]:
    """Return the GPUs that torch sees. Imports torch."""
    import torch

    found = []
    if torch.cuda.is_available():
        found += [_cuda_device(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(_apple_device())
    if torch.xpu.is_available():
        found += [_xpu_device(index) for index in range(torch.xpu.device_count())]
    return found


def _cuda_device(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    return Device(
        f"cuda:{index}",
        "rocm" if amd else "cuda",
        properties.name,
        properties.total_memory,
        lambda: torch.cuda.mem_get_info(index)[0],
        capability=None if amd else (properties.major, properties.minor),
        architecture=properties.gcnArchName.partition(":")[0] if amd else "",
        built_for=tuple(torch.cuda.get_arch_list()),
    )


def _apple_device() -> Device:
    import torch

    total = torch.mps.recommended_max_memory()
    return Device("mps", "mps", "Apple GPU", total, lambda: total - torch.mps.driver_allocated_memory())


def _xpu_device(index: int) -> Device:
    import torch

    properties = torch.xpu.get_device_properties(index)
    return Device(
        f"xpu:{index}",
        "xpu",
        properties.name,
        properties.total_memory,
        lambda: torch.xpu.mem_get_info(index)[0],
    )


def empty_cache(kind: str) -> None:
    """Return the memory that torch holds without using it to a GPU."""
    import torch

    if kind in ("cuda", "rocm"):
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
    elif kind == "xpu":
        torch.xpu.empty_cache()
