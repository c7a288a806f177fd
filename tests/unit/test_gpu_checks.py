"""What `midfill doctor` and `midfill model list` say of GPUs, for machines that are described here."""

from __future__ import annotations

import pytest

from midfill.cli.doctor_checks import _device, _memory
from midfill.cli.gpu_checks import (
    Hardware,
    examine_gpus,
    find_hardware,
    install_command,
    read_driver,
    required_torch,
)
from midfill.cli.model import _memory_of, _memory_text
from midfill.engine.torch.devices import CPU, Build, Device
from midfill.models import catalogue
from midfill.settings import Settings

ON_CPU = Build("2.13.0+cpu")
ON_CUDA = Build("2.13.0+cu130", cuda="13.0")
ON_ROCM = Build("2.13.0+rocm", hip="7.1")
SMI = "NVIDIA GeForce RTX 4060 Laptop GPU, 8188, 8.9\nNVIDIA GeForce GTX 1080, 8192, 6.1\n"
LAPTOP = Hardware("NVIDIA", "NVIDIA GeForce RTX 4060 Laptop GPU", 8188 << 20, (8, 9))


def seen(capability=(8, 9), free=7e9, built_for=("sm_75", "sm_86"), index=0):
    return Device(f"cuda:{index}", "cuda", "RTX", 8 << 30, lambda: int(free), capability, built_for=built_for)


def pci_device(folder, address, vendor, kind, memory=None):
    device = folder / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    if memory is not None:
        (device / "mem_info_vram_total").write_text(f"{memory}\n")


def test_the_drivers_program_names_the_gpus():
    first, second = read_driver(SMI)
    assert first == LAPTOP
    assert first.title == "NVIDIA GeForce RTX 4060 Laptop GPU, 8.6 GB"
    assert (second.name, second.capability) == ("NVIDIA GeForce GTX 1080", (6, 1))
    assert read_driver("NVIDIA-SMI has failed because it couldn't communicate with the driver.") == []


def test_linux_lists_gpus_of_which_there_is_no_driver(tmp_path):
    pci_device(tmp_path, "0000:00:02.0", "0x8086", "0x030000")
    pci_device(tmp_path, "0000:00:1f.3", "0x8086", "0x040300")  # sound
    pci_device(tmp_path, "0000:01:00.0", "0x10de", "0x030200")
    pci_device(tmp_path, "0000:03:00.0", "0x1002", "0x030000", memory=17_163_091_968)
    found = find_hardware(tmp_path, lambda: "")
    assert [one.title for one in found] == ["Intel GPU", "NVIDIA GPU", "AMD GPU, 17.2 GB"]
    # The driver knows more of the same card.
    assert [one.vendor for one in find_hardware(tmp_path, lambda: SMI)] == [
        "NVIDIA",
        "NVIDIA",
        "Intel",
        "AMD",
    ]
    assert find_hardware(tmp_path / "no-such-folder", lambda: "") == []


@pytest.mark.parametrize(
    ("vendor", "platform", "command"),
    [
        ("NVIDIA", "linux", "pip install --force-reinstall '{torch}'"),
        (
            "NVIDIA",
            "win32",
            "pip install --force-reinstall '{torch}' --index-url https://download.pytorch.org/whl/cu130",
        ),
        (
            "Intel",
            "linux",
            "pip install --force-reinstall '{torch}' --index-url https://download.pytorch.org/whl/xpu",
        ),
        ("AMD", "linux", "the command for ROCm on https://pytorch.org/get-started/locally/, with '{torch}'"),
    ],
)
def test_one_command_gets_the_right_torch(vendor, platform, command):
    assert required_torch().startswith(("torch>=", "torch<"))
    assert install_command(vendor, platform) == command.format(torch=required_torch())


def test_a_gpu_that_torch_uses_is_ok():
    [found] = examine_gpus([LAPTOP], [seen()], ON_CUDA)
    assert (found.status, found.remedy) == ("ok", "")
    assert found.found == (
        "cuda:0: RTX (compute capability 8.9), 7.0 of 8.6 GB free; bfloat16, int4; torch 2.13.0+cu130, built "
        "for NVIDIA's CUDA 13.0"
    )


def test_a_gpu_beside_a_torch_for_the_cpu_gets_the_command():
    [found] = examine_gpus([LAPTOP], [], ON_CPU, "win32")
    assert found.status == "warning"
    assert found.found == (
        "NVIDIA GeForce RTX 4060 Laptop GPU, 8.6 GB: not used by torch 2.13.0+cpu, built for the CPU"
    )
    assert found.remedy == f"Run: {install_command('NVIDIA', 'win32')}"


def test_a_gpu_that_a_torch_for_it_does_not_see_lacks_its_driver():
    [found] = examine_gpus([Hardware("NVIDIA")], [], ON_CUDA)
    assert (found.status, "driver" in found.remedy) == ("warning", True)


def test_a_gpu_that_torch_has_no_code_for():
    [found] = examine_gpus([], [seen((6, 1))], ON_CUDA)
    assert found.status == "warning"
    assert "has code for sm_75, sm_86 only" in found.found


def test_a_processors_own_graphics_is_no_warning():
    [found] = examine_gpus([Hardware("Intel")], [], ON_CPU)
    assert (found.status, found.remedy) == ("ok", "")
    [amd] = examine_gpus([Hardware("AMD", total_bytes=16 << 30)], [], ON_CUDA)
    assert (amd.status, "ROCm" in amd.remedy) == ("warning", True)


def test_a_machine_without_a_gpu():
    [found] = examine_gpus([], [], ON_ROCM)
    assert found.found == "none found; torch 2.13.0+rocm, built for AMD's ROCm 7.1"


def test_the_device_of_the_settings_is_checked():
    assert _device(Settings(device="auto"), [seen()]).found.startswith("cuda:0: RTX")
    assert "no code for the RTX" in _device(Settings(device="auto"), [seen((6, 1))]).found
    missing = _device(Settings(device="cuda:1"), [seen()])
    assert (missing.status, 'Device "cuda:1" was not found' in missing.found) == ("error", True)
    assert "gpu.md" in missing.remedy


def test_the_memory_of_the_processor_counts_where_it_runs_the_model():
    assert "GB free" in _memory(Settings(device="cpu", model="no-such-model"), [seen()]).found


@pytest.mark.parametrize(
    ("name", "free", "text"),
    [
        ("qwen2.5-coder-7b", 23e9, "16.7 GB bfloat16"),
        ("qwen2.5-coder-7b", 7.5e9, "6.0 GB int4"),
        ("qwen2.5-coder-7b", 3e9, "6.0 GB too large"),
        ("qwen2.5-coder-0.5b", 3e9, "2.2 GB bfloat16"),
    ],
)
def test_the_list_of_models_has_the_memory_on_this_machines_device(name, free, text):
    row = _memory_of(catalogue.entries()[name], seen(free=free), Settings())
    assert _memory_text(row) == text
    assert _memory_of(catalogue.entries()[name], CPU, Settings()) == {
        "memory_mb": catalogue.entries()[name].memory_mb
    }
    assert _memory_text({}) == ""
