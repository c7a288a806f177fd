"""The GPUs of this machine for `midfill doctor`: what they are, what torch was built for, what to install.

A GPU that the installed torch cannot use is found too: by the driver's own program for NVIDIA's, by the
system's list of PCI devices on Linux. Imports torch only to look for devices.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from midfill.engine.torch.devices import Build, Device
from midfill.system.programs import find_program

_PCI = Path("/sys/bus/pci/devices")
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY_CLASS = "0x03"
_TIMEOUT_S = 10

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")

_PYTORCH = "https://pytorch.org/get-started/locally/"
_INDEX = "https://download.pytorch.org/whl"
_KIND_OF = {"NVIDIA": "cuda", "AMD": "rocm", "Intel": "xpu"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """A GPU of this machine, whether torch can use it or not.

    Attributes:
        vendor: "NVIDIA", "AMD" or "Intel".
        name: the product, if the driver says it.
        total_bytes: its memory; 0 if not known.
        capability: NVIDIA's compute capability, or None.
    """

    vendor: str
    name: str = ""
    total_bytes: int = 0
    capability: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """Name and memory, for the user."""
        memory = f", {self.total_bytes / 1e9:.1f} GB" if self.total_bytes else ""
        return f"{self.name or f'{self.vendor} GPU'}{memory}"


def find_hardware(pci: Path = _PCI, ask_driver: Callable[[], str] | None = None) -> list[Hardware]:
    """Return the GPUs of this machine.

    Args:
        pci: the folder where Linux lists PCI devices.
        ask_driver: returns the output of `nvidia-smi`, "" if there is none; by default it is run.
    """
    driven = read_driver((ask_driver or _ask_driver)())
    found = list(driven)
    for device in sorted(pci.glob("*")) if pci.is_dir() else []:
        vendor = _VENDORS.get(_read(device / "vendor"))
        display = _read(device / "class").startswith(_DISPLAY_CLASS)
        if vendor is not None and display and not (vendor == "NVIDIA" and driven):
            found.append(Hardware(vendor, total_bytes=_video_memory(device)))
    return found


def read_driver(text: str) -> list[Hardware]:
    """Return the GPUs in the output of `nvidia-smi`: a line of name, MiB and compute capability for each."""
    found = []
    for line in text.splitlines():
        if fields := re.fullmatch(r"(.+?), *(\d+), *(\d+)\.(\d+)", line.strip()):
            name, memory, major, minor = fields.groups()
            found.append(Hardware("NVIDIA", name, int(memory) << 20, (int(major), int(minor))))
    return found


def _ask_driver() -> str:
    program = find_program(_NVIDIA_SMI[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            (program, *_NVIDIA_SMI[1:]), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _video_memory(device: Path) -> int:
    """Return the memory of a GPU, as AMD's driver says it, or 0."""
    text = _read(device / "mem_info_vram_total")
    return int(text) if text.isdecimal() else 0


def install_command(vendor: str, platform: str = sys.platform) -> str:
    """Return the command that installs a torch for this vendor's GPUs."""
    torch = f"pip install --force-reinstall '{required_torch()}'"
    if vendor == "NVIDIA":
        # On Linux the Python package index has the builds for CUDA; elsewhere it has those for the CPU.
        return torch if platform == "linux" else f"{torch} --index-url {_INDEX}/cu130"
    if vendor == "Intel":
        return f"{torch} --index-url {_INDEX}/xpu"
    return f"the command for ROCm on {_PYTORCH}, with '{required_torch()}'"


def required_torch() -> str:
    """Return the versions of torch that midfill admits, as pip reads them."""
    wanted = (
        re.match(r"torch\s*([<>=!~][^;]*)", one) for one in importlib.metadata.requires("midfill") or ()
    )
    return next((f"torch{found[1].strip()}" for found in wanted if found), "torch")


@dataclass(frozen=True, slots=True)
class Finding:
    """What the doctor says of one GPU: "ok" or "warning", the finding, and the remedy or ""."""

    status: str
    found: str
    remedy: str = ""


def examine_gpus(
    hardware: Sequence[Hardware], devices: Sequence[Device], build: Build, platform: str = sys.platform
) -> list[Finding]:
    """Return a finding for each GPU: those that torch sees, then those that only the system sees."""
    torch = f"torch {build.version}, built for {build.title}"
    findings = []
    for device in devices:
        shown = f"{device.torch_name}: {device.whole_name}, {device.free_bytes() / 1e9:.1f} of "
        shown += f"{device.total_bytes / 1e9:.1f} GB free"
        if device.has_kernels:
            findings.append(Finding("ok", f"{shown}; {', '.join(device.automatic)}; {torch}"))
        else:
            findings.append(
                Finding(
                    "warning",
                    f"{shown}; {torch}, has code for {', '.join(device.built_for)} only",
                    f"Use the CPU (device = auto does), or look for an older CUDA build on {_PYTORCH}",
                )
            )
    for one in hardware:
        if any(device.kind == _KIND_OF[one.vendor] for device in devices):
            continue
        # A processor's own graphics has no memory of its own; nobody has to hear of it at each check.
        small = one.vendor != "NVIDIA" and not one.total_bytes
        told = f"{one.title}: not used by {torch}"
        if small:
            findings.append(Finding("ok", told))
        elif build.cuda and one.vendor == "NVIDIA":
            findings.append(Finding("warning", told, "Install NVIDIA's driver, or a newer one, and restart."))
        else:
            findings.append(Finding("warning", told, f"Run: {install_command(one.vendor, platform)}"))
    return findings or [Finding("ok", f"none found; {torch}")]
