"""The llama.cpp runner beside transformers; that its tokens equal generate's is in `test_generate.py`."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import threading
import time
import tomllib
import weakref
from pathlib import Path

import gguf
import passes
import pytest
import tiny
import tiny_gguf
from passes import chosen, chunk, expected, prompts

from midfill.engine.api import EngineSpec
from midfill.engine.llamacpp import bindings, context, devices
from midfill.engine.llamacpp import runner as llamacpp_runner
from midfill.engine.llamacpp.context import Span
from midfill.engine.llamacpp.devices import Gpu
from midfill.engine.loading import load as load_model
from midfill.engine.scheduler import Chunk, SequenceState
from midfill.errors import EngineError, ModelError
from midfill.models.gguf_file import GGUFFile, TensorInfo, open_gguf
from midfill.training.verdict import served_model

KEPT = 400  # tokens of the context of the model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("llamacpp") / "model"
    return tiny.as_gguf(tiny.write_model("qwen2", path, max_position_embeddings=KEPT))


def load(path, **options):
    with open_gguf(path) as file:
        header = file
    return llamacpp_runner.load(header, **{"device": "cpu", "dtype": "float32", "num_threads": 1, **options})


@pytest.fixture
def runner(model):
    return load(model.path)


def compute(runner, ids, slot):
    """The choice after a prompt that is longer than a pass."""
    for start in range(0, len(ids), runner.chunk_tokens):
        part = ids[start : start + runner.chunk_tokens]
        last = start + len(part) == len(ids)
        [choices] = runner.forward([Chunk(SequenceState(None, ids), slot, start, part, last)], [None])
    return choices[0].id


def test_sequences_of_one_pass_do_not_see_each_other(model, runner):
    passes.check_that_sequences_of_one_pass_do_not_see_each_other(model, runner, (30, 1, 33), 23)


def test_a_part_of_a_prompt_chooses_nothing(model, runner):
    passes.check_that_a_part_of_a_prompt_chooses_nothing(model, runner)


def test_a_copied_past_stays_when_its_source_changes(model, runner):
    ids, others = prompts(3, 60, 40)
    runner.forward([chunk(ids, 0)], [None])
    branch = [*ids[:40], 5]
    pass_ = [chunk(branch, 1, 40, copy_from=0), chunk([*ids[:20], *others[:4]], 0, 20)]
    found = runner.forward(pass_, [None] * 2)
    assert chosen(found) == [expected(model, branch), expected(model, [*ids[:20], *others[:4]])]
    runner.drop([0])
    longer = [*branch, 8]
    assert chosen(runner.forward([chunk(longer, 1, 41)], [None])) == [expected(model, longer)]


@pytest.mark.parametrize("kept", ["all in a pool that grows", "the latest"])
def test_what_the_pool_has_no_room_for_is_computed_again(model, monkeypatch, kept):
    monkeypatch.setattr(context, "_FIRST_CELLS", 512)
    monkeypatch.setattr(context, "_KEPT_CELLS", 2048 if kept == "all in a pool that grows" else 512)
    runner = load(model.path)
    documents = prompts(4, 350, 340, 330, 320)
    for slot, ids in enumerate(documents):
        assert compute(runner, ids, slot) == expected(model, ids)
    held = runner._context.held[:4]
    if kept == "all in a pool that grows":
        assert held == [350, 340, 330, 320]
        assert runner._context.num_cells >= sum(held)
    else:
        assert held == [0, 0, 0, 320]
        assert runner._context.num_cells == 512
    # The first is continued, whatever is left of it; then all at once, for which the pool has to grow.
    continued = [*documents[0], 3]
    assert chosen(runner.forward([chunk(continued, 0, 350)], [None])) == [expected(model, continued)]
    longer = [[*ids, 9] for ids in documents]
    pass_ = [chunk(ids, slot, len(ids) - 1) for slot, ids in enumerate(longer)]
    assert chosen(runner.forward(pass_, [None] * 4)) == [expected(model, ids) for ids in longer]


def test_an_aborted_pass_changes_nothing(model, runner):
    ids, other = prompts(5, 60, 30)
    runner.forward([chunk(ids[:20], 0), chunk(other, 1)], [None] * 2)
    pass_ = [chunk(ids, 0, 20), chunk([*other, 4], 1, 30)]
    assert runner.forward(pass_, [None] * 2, lambda: True) is None
    assert runner._context.held[:2] == [20, 30]
    found = runner.forward(pass_, [None] * 2, lambda: False)
    assert chosen(found) == [expected(model, ids), expected(model, [*other, 4])]


@pytest.mark.parametrize("same", ["the same", "other tokens", "another user", "freed slots"])
def test_an_aborted_pass_continues_after_its_finished_parts(model, runner, same):
    [ids] = prompts(12, 90)
    held = runner._context.held
    runner._part_tokens = 32
    # The second part begins once the first is computed.
    assert runner.forward([chunk(ids, 0)], [None], lambda: held[0] >= 32) is None
    assert held[0] == 32
    assert runner._part_tokens == 16
    if same == "freed slots":
        runner.drop([0])
    if same == "other tokens":
        ids[20] ^= 1
    next_ = chunk(ids, 0)
    if same == "another user":
        next_.sequence.user = "other"
    begins = []
    assert runner.forward([next_], [None], lambda: begins.append(held[0])) is not None
    assert begins[0] == {"the same": 32, "other tokens": 20}.get(same, 0)
    runner._part_tokens = 128
    assert chosen(runner.forward([chunk(ids, 0)], [None])) == [expected(model, ids)]


def test_a_finished_part_is_what_the_whole_would_have_computed(model, runner):
    ids, other = prompts(13, 60, 30)
    held = runner._context.held
    runner._part_tokens = 16
    pass_ = [chunk(ids, 0), chunk(other, 1)]
    for at in (16, 32, 48):
        assert runner.forward(pass_, [None] * 2, lambda at=at: held[0] >= at) is None
    found = runner.forward(pass_, [None] * 2, lambda: False)
    assert chosen(found) == [expected(model, ids), expected(model, other)]
    assert held[:2] == [60, 30]


def test_a_pass_is_aborted_in_its_middle(tmp_path):
    model = tiny.as_gguf(
        tiny.write_model(
            "llama", tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=8
        )
    )
    runner = load(model.path)
    [ids] = prompts(6, 64)
    for _ in range(100):
        asked = []
        # Not before the pass, but as soon as the thread asks; on a busy machine that may be after the pass.
        if (
            runner.forward([chunk(ids, 0)], [None], lambda asked=asked: len(asked) > 0 or asked.append(1))
            is None
        ):
            break
        runner.drop([0])
    else:
        pytest.fail("no pass was aborted")
    assert runner._context.held[0] == 0
    assert chosen(runner.forward([chunk(ids, 0)], [None])) == [expected(model, ids)]


def test_the_callback_is_native_and_reads_the_flag(runner):
    flag = runner._context._flag
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(flag.function.value)
    assert callback(flag.address) is False
    flag._text[0] = b"\1"
    assert callback(flag.address) is True


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, 1, [5])],
        [Span(0, 0, [5]), Span(0, 0, [6])],
        [Span(0, 0, [])],
        [Span(0, 0, [-1])],
        [Span(0, 0, [tiny.VOCAB_SIZE])],
        [Span(0, 0, [5] * 129)],
        [Span(0, 0, [5] * 20, 9)],
        [],
    ],
)
def test_what_would_end_the_process_is_refused(runner, spans):
    with pytest.raises(ValueError, match=r"span|tokens|token id"):
        runner._context.compute(spans, None, None)


def test_no_place_in_the_pool_is_a_memory_error_and_the_past_stays(model, runner, monkeypatch):
    ids, other = prompts(7, 40, 20)
    runner.forward([chunk(ids, 0)], [None])
    monkeypatch.setattr(runner._model.library, "llama_decode", lambda *_: bindings.NO_CELLS)
    with pytest.raises(MemoryError):
        runner.forward([chunk(other, 1)], [None])
    monkeypatch.undo()
    assert runner._context.held[:2] == [40, 0]
    longer = [*ids, 6]
    assert chosen(runner.forward([chunk(longer, 0, 40)], [None])) == [expected(model, longer)]


def test_threads_are_set_and_do_not_spin_when_idle(model):
    runner = load(model.path, num_threads=2)
    [ids] = prompts(8, 60)
    runner.forward([chunk(ids, 0)], [None], lambda: False)
    # What spins, spins for some milliseconds after a pass; then the whole process uses less than a tenth.
    deadline = time.monotonic() + 60
    while True:
        used_s, began = time.process_time(), time.monotonic()
        threading.Event().wait(0.2)
        if time.process_time() - used_s < 0.1 * (time.monotonic() - began):
            break
        assert time.monotonic() < deadline


def test_a_model_that_is_not_used_any_more_is_freed(model):
    runner = load(model.path)
    [ids] = prompts(9, 20)
    runner.forward([chunk(ids, 0)], [None], lambda: False)
    gone = weakref.ref(runner._model)
    thread = runner._context._flag._watch._thread
    del runner
    gc.collect()
    thread.join(60)
    assert gone() is None
    assert not thread.is_alive()


def test_the_extra_pins_the_version_whose_layouts_are_known():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["llamacpp"] == [f"{bindings.PACKAGE}=={bindings.VERSION}"]


def test_a_library_that_is_missing_or_another_is_one_sentence(monkeypatch):
    bindings.library.cache_clear()
    versions = {"xllamacpp": "2026.9.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EngineError, match=r"2026\.9\.1 is installed.*pip install"):
        bindings.library()
    versions.clear()
    with pytest.raises(EngineError, match=r"needs the package xllamacpp.*pip install"):
        bindings.library()


@pytest.mark.parametrize(("name", "value"), [("n_batch", 4096), ("kv_unified", True), ("type_k", 30)])
def test_another_layout_is_refused(name, value):
    params = bindings.library().llama_context_default_params()
    bindings._check_defaults(Path("lib.so"), params, bindings._CONTEXT_DEFAULTS)
    setattr(params, name, value)
    with pytest.raises(EngineError, match=f"its default for {name}"):
        bindings._check_defaults(Path("lib.so"), params, bindings._CONTEXT_DEFAULTS)


def test_files_that_cannot_be_used_are_one_sentence(tmp_path, model):
    with pytest.raises(EngineError, match=r'no device "cuda", but no GPU\. Use device auto or cpu'):
        load(model.path, device="cuda")
    with pytest.raises(EngineError, match="use dtype auto, not bfloat16"):
        load(model.path, dtype="bfloat16")
    tiny_gguf.write_qwen2(tmp_path / "q.gguf", quants={"blk.0.ffn_up.weight": "Q8_0"})
    with pytest.raises(EngineError, match="types F32, Q8_0; use dtype auto"):
        load(tmp_path / "q.gguf")
    assert load(tmp_path / "q.gguf", dtype="auto").vocab_size == tiny_gguf.VOCAB_SIZE
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "qwen2")
    tiny_gguf.add_vocabulary(writer)
    tiny_gguf.write(tmp_path / "v.gguf", writer)
    with pytest.raises(ModelError, match="no weights"):
        load(tmp_path / "v.gguf")
    tiny_gguf.write_qwen2(tmp_path / "m.gguf", change={"blk.1.attn_q.weight": None})
    with pytest.raises(ModelError, match=r"cannot load .*tensor 'blk\.1\.attn_q\.weight' not found"):
        load(tmp_path / "m.gguf", dtype="auto")


@pytest.mark.parametrize("kv_dtype", ["float16", "q8_0"])
def test_keys_and_values_in_fewer_bits_change_little(tmp_path, kv_dtype):
    model = tiny.as_gguf(
        tiny.write_model("qwen2", tmp_path / "model", hidden_size=128, num_attention_heads=4)
    )
    exact, rounded = load(model.path), load(model.path, dtype="auto", kv_dtype=kv_dtype)
    [ids] = prompts(10, 60)
    difference = abs(exact.probe(ids, None) - rounded.probe(ids, None)).max()
    assert 0 < difference < 0.3


def test_the_pool_is_limited_by_the_context(model, runner):
    [ids] = prompts(11, KEPT)
    compute(runner, ids, 0)
    with pytest.raises(ValueError, match="beyond the context"):
        runner._context.compute([Span(0, KEPT, [1])], None, None)


def test_a_folder_is_no_gguf_file(tmp_path):
    model = tiny.write_model("qwen2", tmp_path / "model")
    with pytest.raises(ModelError, match=r"needs a GGUF file; .*model is a folder"):
        load_model(EngineSpec(model, runner="llamacpp"), lambda *_: None)


def test_an_adapter_is_judged_on_the_form_that_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path))
    folder = tiny.LocalModel("qwen2.5-coder-0.5b", tmp_path / "folder")
    assert served_model(folder, "torch") == (folder, "torch")
    assert served_model(folder, "llamacpp") == (folder, "auto")
    file = tmp_path / "gguf" / "qwen2.5-coder-0.5b.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    served, runner = served_model(folder, "llamacpp")
    assert (served.path, runner) == (file, "llamacpp")


GPUS = [
    Gpu("Vulkan0", "A processor's own", 3 << 30, 4 << 30),
    Gpu("CUDA0", "A card", 5 << 30, 6 << 30),
    Gpu("CUDA1", "Another card", 7 << 30, 8 << 30),
]


def test_the_device_with_the_most_memory_is_chosen_or_the_one_that_is_named():
    assert devices.choose("auto", []) is None
    assert devices.choose("cpu", GPUS) is None
    assert devices.choose("auto", GPUS).name == "CUDA1"
    assert devices.choose("cuda", GPUS).name == "CUDA0"
    assert devices.choose("cuda:1", GPUS).name == "CUDA1"
    with pytest.raises(EngineError, match=r'"cuda:2", but Vulkan0, CUDA0, CUDA1\.'):
        devices.choose("cuda:2", GPUS)
    assert str(GPUS[1]) == "CUDA0 (A card), 5.4 of 6.4 GB free"


@pytest.mark.parametrize(
    ("free", "layers"),
    [(24 << 30, 29), (6 << 30, 28), (4 << 30, 16), (1 << 30, 0), (0, 0)],
)
def test_as_many_layers_as_fit_beside_the_reserve(tmp_path, free, layers):
    # A 7B in 4 bits, without its weights: 4.56 GB, and 0.47 GB of keys and values, so 173 MB for each
    # of 29 layers; 1.49 GB are kept free.
    tensors = {"all": TensorInfo("all", (1 << 20, 4352), "Q4_0", 0, 4352)}
    metadata = {
        "general.architecture": "qwen2",
        "qwen2.block_count": 28,
        "qwen2.embedding_length": 3584,
        "qwen2.attention.head_count": 28,
        "qwen2.attention.head_count_kv": 4,
    }
    file = GGUFFile(tmp_path, metadata, tensors, None)
    assert devices.layers_that_fit(Gpu("CUDA0", "", free, free), file, bindings.F16) == layers
