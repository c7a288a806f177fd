"""What each kind of device can do, which one a setting means, and that models run within its limits."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stepping import Sequences, prompts
from torch.utils._python_dispatch import TorchDispatchMode

from midfill.engine import loading as engine_loading
from midfill.engine.api import EngineSpec
from midfill.engine.torch import devices
from midfill.engine.torch.devices import CPU, KINDS, Device, choose
from midfill.engine.torch.loading import choose_format, load_runner
from midfill.errors import EngineError
from midfill.settings import Settings
from midfill.training.verdict import start_alike

WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
"""What torch's CUDA 13 wheels list."""


def nvidia(major, minor, index=0, built_for=WHEEL, free=8e9):
    name = f"GPU {major}.{minor}"
    return Device(
        f"cuda:{index}", "cuda", name, 8 << 30, lambda: int(free), (major, minor), built_for=built_for
    )


AMD = Device("cuda:0", "rocm", "Radeon", 16 << 30, lambda: 15 << 30, architecture="gfx1100")
APPLE = Device("mps", "mps", "Apple GPU", 16 << 30, lambda: 12 << 30)
INTEL = Device("xpu:0", "xpu", "Arc", 16 << 30, lambda: 15 << 30)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), False),  # Pascal
        ((7, 0), False),  # Volta
        ((7, 5), True),
        ((8, 9), True),  # by sm_86
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),
        ((12, 1), True),
        ((13, 0), True),  # by compute_120
    ],
)
def test_kernels_are_known_from_what_torch_was_built_for(capability, expected):
    assert nvidia(*capability).has_kernels == expected


def test_kernels_for_one_architecture_serve_no_other():
    assert nvidia(9, 0, built_for=("sm_90a",)).has_kernels
    assert not nvidia(10, 0, built_for=("sm_90a",)).has_kernels
    assert nvidia(12, 0, built_for=("sm_50", "compute_50")).has_kernels
    assert Device("cuda:0", "rocm", architecture="gfx1100", built_for=("gfx90a", "gfx1100")).has_kernels
    assert not Device("cuda:0", "rocm", architecture="gfx1036", built_for=("gfx90a",)).has_kernels


def test_auto_takes_the_first_gpu_that_torch_has_code_for():
    old, new = nvidia(6, 1), nvidia(8, 9, index=1)
    assert choose("auto", [new]) == (new, "")
    assert choose("auto", [old, new]) == (new, "")
    assert choose("auto", [AMD]) == (AMD, "")
    assert choose("auto", []) == (CPU, "")


def test_auto_stays_on_the_cpu_where_torch_has_no_code_and_says_so():
    device, why = choose("auto", [nvidia(6, 1)])
    assert device == CPU
    assert why == (
        "This build of torch has no code for the GPU 6.1 (compute capability 6.1), only for sm_75, sm_80, "
        "sm_86, sm_90, sm_100, sm_120, compute_120. The model runs on the CPU."
    )


@pytest.mark.parametrize("device", [APPLE, INTEL])
def test_apples_and_intels_gpus_have_to_be_asked_for(device):
    assert choose("auto", [device]) == (CPU, "")
    assert choose(device.kind, [device]) == (device, "")


@pytest.mark.parametrize(
    ("wanted", "found", "message"),
    [
        ("cuda", [], 'Device "cuda" was not found; torch sees 0 cuda devices.'),
        ("cuda:1", [nvidia(8, 0)], 'Device "cuda:1" was not found; torch sees 1 cuda devices.'),
        ("mps", [AMD], 'Device "mps" was not found'),
        ("cuda", [nvidia(6, 1)], 'Set device to "cpu" or "auto"'),
        ("abacus", [], 'There is no device "abacus"; use auto, cpu, cuda, cuda:N, mps or xpu.'),
        ("cuda:x", [AMD], 'There is no device "cuda:x"'),
    ],
)
def test_a_device_that_cannot_be_had_is_named_with_the_remedy(wanted, found, message):
    with pytest.raises(EngineError, match=re.escape(message)):
        choose(wanted, found)


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:3", "mps", "xpu", "xpu:1"])
def test_the_setting_admits_what_can_be_chosen(value):
    assert Settings(device=value).device == value


@pytest.mark.parametrize(
    ("device", "formats"),
    [
        (nvidia(8, 9), ("bfloat16", "int4")),
        (nvidia(7, 5), ("float16", "int4")),
        (AMD, ("bfloat16", "int8", "int4")),
        (APPLE, ("float16", "int8", "int4")),
        (INTEL, ("bfloat16", "int8", "int4")),
    ],
)
def test_each_device_has_its_formats(device, formats):
    assert device.automatic == formats
    assert set(formats) <= set(KINDS[device.kind].dtypes)
    assert device.half == formats[0]
    with pytest.raises(EngineError, match="There is no dtype"):
        devices.check_dtype("int3", device)


def test_a_format_that_a_device_does_not_have_is_refused():
    with pytest.raises(EngineError, match="bfloat16 is not used on an Apple GPU; use float16, int8"):
        devices.check_dtype("bfloat16", APPLE)


VERSION = """
__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'rocm', 'xpu']
__version__ = '2.13.0+x'
cuda: Optional[str] = {cuda}
hip: Optional[str] = {hip}
rocm: Optional[str] = None
xpu: Optional[str] = {xpu}
"""


@pytest.mark.parametrize(
    ("cuda", "hip", "xpu", "title", "library"),
    [
        ("'13.0'", "None", "None", "NVIDIA's CUDA 13.0", "cuda"),
        ("None", "'6.4.4'", "None", "AMD's ROCm 6.4.4", "amdhip64"),
        ("None", "None", "'20250302'", "Intel GPUs (20250302)", None),
    ],
)
def test_the_build_of_torch_is_read_without_importing_it(cuda, hip, xpu, title, library):
    build = devices.read_build("2.13.0", VERSION.format(cuda=cuda, hip=hip, xpu=xpu))
    assert build.title == title
    asked = []
    assert not devices.may_have_gpu(build, loads=lambda name: bool(asked.append(name)))
    assert [library in name for name in asked] == ([True] if library else [])
    assert devices.may_have_gpu(build, loads=lambda _: True) == (library is not None)


def test_the_installed_torch_is_described_as_it_describes_itself():
    build = devices.installed_build()
    assert build.version == torch.__version__
    assert (build.cuda or None, build.hip or None) == (torch.version.cuda, torch.version.hip)


class Limits(TorchDispatchMode):
    """Fails on what a device does not have."""

    def __init__(self, *missing):
        super().__init__()
        self._missing = missing

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in [*args, result]:
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype not in self._missing, f"{operation} with {tensor.dtype}"
        assert "quantized" not in str(operation), "fbgemm's kernels are for CPUs"
        assert "pack_mm" not in str(operation), "packed products are for NVIDIA's GPUs"
        return result


EMULATED = {
    # On a CPU, with what the GPU lacks forbidden.
    "mps": (Device("cpu", "mps", "Apple GPU", 8 << 30, lambda: 4 << 30), (torch.bfloat16, torch.float64)),
    "xpu": (Device("cpu", "xpu", "Arc", 8 << 30, lambda: 4 << 30), (torch.float16, torch.float64)),
    "rocm": (Device("cpu", "rocm", "Radeon", 8 << 30, lambda: 4 << 30), (torch.float16, torch.float64)),
}


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_bigcode", "gemma"])
@pytest.mark.parametrize("name", list(EMULATED))
def test_a_model_runs_within_the_limits_of_a_device(tmp_path, name, kind, dtype):
    device, missing = EMULATED[name]
    wide = {"n_embd": 64} if kind == "gpt_bigcode" else {"hidden_size": 64, "intermediate_size": 128}
    path = tiny.write_model(kind, tmp_path, **wide).path
    runner, _ = load_runner(
        path, device=device, dtype=dtype, num_threads=1, report=lambda _: None, meanwhile=lambda: None
    )
    assert runner.chunk_tokens == KINDS[name].chunk_tokens
    assert runner.dtype == (device.half if dtype == "auto" else dtype)
    reference = tiny.reference(path)
    [prompt] = prompts(1, 70)
    running = Sequences(runner, [prompt])
    with Limits(*missing):
        for _ in range(4):
            running.step([0])
    with torch.inference_mode():
        exact = reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        mine = torch.from_numpy(runner.probe(prompt, None)).log_softmax(-1)
    # In nats; random weights with few bits are far coarser than a trained model's.
    assert float((exact - mine).abs().mean()) < {"auto": 0.15, "int8": 0.3, "int4": 3.0}[dtype]
    assert len(running.tokens[0]) == 74


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, 512), (1 << 20, 256)])
def test_the_context_of_a_gpu_without_graphs_is_what_fits(tmp_path, free, expected):
    device = Device("cpu", "xpu", "Arc", 8 << 30, lambda: free)
    path = tiny.write_model("llama", tmp_path).path
    runner, _ = load_runner(
        path, device=device, dtype="auto", num_threads=1, report=lambda _: None, meanwhile=lambda: None
    )
    assert runner.context == expected


async def test_auto_runs_on_the_cpu_what_does_not_fit_into_the_gpu_and_says_why(tmp_path, caplog):
    small = Device("cuda:0", "cuda", "GTX 1", 1 << 30, lambda: 1 << 29, (8, 6))
    load = partial(engine_loading.load, find_gpus=lambda _wanted: [small])
    model = tiny.write_model("llama", tmp_path)
    caplog.set_level(logging.WARNING)
    async with tiny.running(model, device="auto", dtype="float32", load_model=load) as engine:
        assert engine.model.device == "cpu"
    assert "tiny-llama needs 1.2 GB of the GTX 1's memory in float32" in caplog.text
    assert "The model runs on the CPU." in caplog.text
    with pytest.raises(EngineError, match=r"and 0\.5 GB are free; no model of the catalogue fits"):
        async with tiny.running(model, device="cuda", dtype="float32", load_model=load):
            pass


def test_the_format_is_the_best_that_fits(tmp_path):
    model = tiny.write_model("llama", tmp_path)

    def chosen(free, **options):
        device = Device("cuda:0", "cuda", "RTX", 8 << 30, lambda: int(free), (8, 9))
        return choose_format(model, device, "auto", prompt_tokens=256, adapters=False, **options)

    assert chosen(4e9) == "bfloat16"
    with pytest.raises(EngineError, match="RTX's memory in int4"):
        chosen(1e9)


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (1e5, False)])
async def test_a_model_whose_values_leave_the_range_of_float16_is_refused(tmp_path, scale, fits):
    model = tiny.write_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] *= scale
    save_file(tensors, tmp_path / "model.safetensors")
    refused = pytest.raises(
        EngineError, match=r"tiny-llama computes values that float16 cannot hold on cpu\."
    )
    with nullcontext() if fits else refused:
        async with tiny.running(model, device="cpu", dtype="float16"):
            pass


class Started:
    """An engine that is on the device that it is told, or does not start."""

    def __init__(self, device, dtype, error=None):
        self.model = SimpleNamespace(device=device, dtype=dtype)
        self.error = error
        self.closed = False

    async def start(self, _progress):
        if self.error is not None:
            raise self.error

    async def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("second", "alike"),
    [
        (("cuda:0", "bfloat16"), True),
        (("cuda:0", "int4"), False),
        (("cpu", "int8"), False),
        (("cuda:0", "", EngineError("it needs 2 GB")), False),
    ],
)
async def test_the_engines_of_a_verdict_are_on_one_device_in_one_format(tmp_path, second, alike):
    given = [Started("cuda:0", "bfloat16"), Started(*second)]
    made = []

    def make(spec):
        made.append((spec.device, given.pop(0) if given else Started("cpu", "int8")))
        return made[-1][1]

    specs = [EngineSpec(tiny.LocalModel("tiny", tmp_path), adapter=one) for one in (None, tmp_path)]
    engines = await start_alike(specs, make)
    assert [engine.model.device for engine in engines] == ["cuda:0" if alike else "cpu"] * 2
    assert [device for device, _ in made] == ["auto", "auto"] + ["cpu", "cpu"] * (not alike)
    assert [engine.closed for _, engine in made] == [not alike] * 2 + [False, False] * (not alike)


async def test_an_engine_that_does_not_start_on_the_cpu_either_is_an_error(tmp_path):
    broken = Started("cpu", "int8", EngineError("no such runner"))
    with pytest.raises(EngineError, match="no such runner"):
        await start_alike([EngineSpec(tiny.LocalModel("tiny", tmp_path), device="cpu")], lambda _: broken)
    assert broken.closed


async def test_4_bits_on_a_cpu_are_asked_for_by_name(tmp_path):
    model = tiny.write_model("qwen2", tmp_path, hidden_size=64, intermediate_size=128)
    async with tiny.running(model, dtype="int4") as engine:
        assert (engine.model.device, engine.model.dtype) == ("cpu", "int4")
        assert len(await tiny.collect_ids(engine, list(range(40)))) > 0
