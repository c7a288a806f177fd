"""Files of models and adapters that were made to break their reader: one sentence, and little memory."""

import json
import os
import struct
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_adapters import LAYERS, write_adapter
from safetensors.numpy import save

from midfill.adapters import format as peft_format
from midfill.adapters.bindings import Bindings
from midfill.adapters.registry import Registry
from midfill.completion.stats.acceptance import read as read_feedback
from midfill.engine.openvino.graph import UnsupportedError, read_shape
from midfill.errors import AdapterError, MidfillError, ModelError
from midfill.models import hub, store
from midfill.models.gguf_file import open_gguf
from midfill.models.gguf_tokenizer import tokenizer_json
from midfill.models.safetensors_io import find_tensors, shapes_of
from midfill.models.tokenizer import FastTokenizer, load_tokenizer
from midfill.system.json_files import JSONFileError, parse_json

MEMORY_BYTES = 700 << 20

BROKEN_JSON = {
    "nested": b"[" * 200_000,
    "nested in objects": b'{"a":' * 100_000,
    "no text": b"\xff\xfe\x00{",
    "a number of a million digits": b'{"vocab_size": ' + b"9" * 1_000_000 + b"}",
    "empty": b"",
    "cut short": b'{"model": {"vocab": {"a": 1',
    "a list": b"[1, 2]",
    "a text": b'"model"',
    "null": b"null",
    "infinity": b'{"hidden_size": 1e999}',
    "many values": b"[" + b"{}," * 9_000_000 + b"{}]",
    "large": b'"' + b"x" * (70 << 20) + b'"',
    "a lone surrogate": b'{"model_type": "\\ud800"}',
}


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.parent


READERS = {
    "config.json": (ModelError, store.read_config),
    "tokenizer.json": (ModelError, load_tokenizer),
    "model.safetensors.index.json": (ModelError, find_tensors),
    "index.json": (MidfillError, lambda folder: Registry(folder).entries()),
    "bindings.json": (MidfillError, lambda folder: Bindings(folder).read()),
    "feedback.json": (MidfillError, lambda folder: read_feedback(folder / "feedback.json")),
    "adapter_config.json": (AdapterError, peft_format.read_config),
}


@pytest.mark.parametrize("data", BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_json_of_ours_is_one_sentence(tmp_path, name, data):
    error, reader = READERS[name]
    folder = write(tmp_path / name, data)
    if name == "config.json" and data.lstrip().startswith(b'{"') and data.endswith(b"}") and len(data) < 100:
        assert isinstance(reader(folder), dict)
        return
    with little_memory(), pytest.raises(error) as caught:
        reader(folder)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_a_manifest_that_is_none_is_no_model(tmp_path, data):
    with little_memory():
        assert store.read_folder(write(tmp_path / "midfill.json", data)) is None
        store.verify(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "pipe", "a/b", "..", "folder", "\0"])
def test_a_manifest_that_names_other_files_is_no_models(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    manifest = {
        "format": 1,
        "name": "a",
        "family": None,
        "source": "b",
        "files": {name: {"bytes": 0, "sha256": ""}},
    }
    (folder / "midfill.json").write_text(json.dumps(manifest))
    if name not in {"pipe", "folder"}:
        assert store.read_folder(folder) is None
    with pytest.raises(ModelError, match="no file in it"):
        store.verify(folder)


@pytest.mark.parametrize("key", ["name", "family", "source"])
def test_a_manifest_with_other_values_is_no_models(tmp_path, key):
    manifest = {"format": 1, "name": "a", "family": None, "source": "b", "files": {}, key: ["a"]}
    (tmp_path / "midfill.json").write_text(json.dumps(manifest))
    assert store.read_folder(tmp_path) is None


def test_a_pipe_is_not_read(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names here")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError):
        store.read_config(tmp_path)


@pytest.mark.fuzz
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(data):
    try:
        parse_json(data)
    except JSONFileError as error:
        assert str(error)


# --- tokenizers ---

SOUND = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}
IDS = [-1, -1_000_000, 1.5, 1e12, 2**20, 200_000_000, 10**12, 10**400, True, None, "0", [0], {}]


@pytest.mark.parametrize("token", IDS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("where", ["vocab", "added", "special"])
def test_ids_that_no_vocabulary_has_are_refused(tmp_path, where, token):
    description = json.loads(json.dumps(SOUND))
    if where == "vocab":
        description["model"]["vocab"]["c"] = token
    else:
        description["added_tokens"] = [{"content": "<c>", "id": token, "special": where == "special"}]
    write(tmp_path / "tokenizer.json", json.dumps(description).encode())
    with little_memory(), pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 1000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "content": "x" * 1000}]}},
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"String": "a"}, "a" * 10)] * 6}},
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"Regex": ""}, "ab")] * 9}},
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"String": ""}, "ab")] * 9}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 20}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 10_000}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
        {"pre_tokenizer": {"type": "Nothing"}},
        {"pre_tokenizer": 7},
        {"normalizer": [[[]]]},
        {"added_tokens": {"a": 1}},
        {"added_tokens": [7]},
        {"added_tokens": [{"content": ["a"], "id": 1}]},
        {"model": {"type": "Unigram", "vocab": [["a"]]}},
        {"model": {"type": "Unigram", "vocab": [[1, 2]]}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": "ab"}},
        {"model": {"type": "BPE", "vocab": 7}},
        {"model": []},
    ],
    ids=lambda change: str(change)[:120],
)
def test_a_tokenizer_of_another_form_is_one_sentence(tmp_path, change):
    write(tmp_path / "tokenizer.json", json.dumps(SOUND | change).encode())
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_the_steps_that_tokenizers_in_use_have_are_taken(tmp_path):
    steps = [{"type": "Prepend", "prepend": "▁"}, replacing({"String": " "}, "▁")]
    steps += [replacing({"Regex": "\\s+"}, " "), replacing({"String": "``"}, '"'), {"type": "NFC"}]
    change = {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": BYTES}
    write(tmp_path / "tokenizer.json", json.dumps(SOUND | change).encode())
    assert load_tokenizer(tmp_path).num_ids


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def changed(description, path, value):
    """A copy with another value at a place; the place is chosen by the numbers of `path`."""
    copy = json.loads(json.dumps(description))
    node = copy
    for number in path[:-1]:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys or not isinstance(inner := node[keys[number % len(keys)]], dict | list):
            break
        node = inner
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if keys:
        node[keys[path[-1] % len(keys)]] = value
    return copy


WHOLE = SOUND | {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True, "normalized": False}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
}
PLACE = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@pytest.mark.fuzz
@given(path=PLACE, value=ANY_JSON)
def test_any_change_of_a_tokenizer_is_read_or_refused(path, value):
    try:
        tokenizer = FastTokenizer(changed(WHOLE, path, value))
    except (ModelError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return  # all that `load_tokenizer` makes a sentence of
    tokenizer.decode(tokenizer.encode("ab <s>"))
    tokenizer.vocab_bytes()


# --- adapters ---


@pytest.mark.fuzz
@given(path=PLACE, value=ANY_JSON)
def test_any_change_of_an_adapters_configuration_is_read_or_refused(tmp_path_factory, path, value):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-adapter"
    if not folder.exists():
        write_adapter(folder)
        (folder / "sound.json").write_bytes((folder / peft_format.CONFIG).read_bytes())
    sound = json.loads((folder / "sound.json").read_bytes())
    (folder / peft_format.CONFIG).write_text(json.dumps(changed(sound, path, value)))
    try:
        peft_format.read(folder, LAYERS)
    except AdapterError as error:
        assert str(folder) in str(error)


# --- configurations of models ---

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, 1e12, 10**12, 10**400, 1e999, "8", None, [], True, {"a": 1}], ids=str
)
@pytest.mark.parametrize("key", [key for key in LLAMA if key not in {"model_type", "rms_norm_eps"}])
def test_a_size_that_no_model_has_is_refused(tmp_path, key, value):
    write(tmp_path / "config.json", json.dumps(LLAMA | {key: value}).encode())
    if key == "num_key_value_heads" and not value:
        assert read_shape(tmp_path).num_kv_heads == 2
    elif (key, value) == ("max_position_embeddings", 0):
        read_shape(tmp_path)
    else:
        with pytest.raises(UnsupportedError, match="not as expected"):
            read_shape(tmp_path)


@pytest.mark.fuzz
@given(path=PLACE, value=ANY_JSON)
def test_any_change_of_a_configuration_is_read_or_refused(tmp_path_factory, path, value):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changed(LLAMA, path, value)))
    try:
        assert read_shape(folder).num_layers <= 1000
    except UnsupportedError as error:
        assert len(str(error)) < 400


# --- safetensors ---


def test_a_header_of_another_size_than_any_models_is_not_read(tmp_path):
    write(tmp_path / "model.safetensors", struct.pack("<Q", 50 << 20) + b"{" + b" " * (50 << 20))
    with little_memory(), pytest.raises(ModelError, match="header"):
        find_tensors(tmp_path)


def test_a_tensor_with_an_endless_name_is_refused(tmp_path):
    data = save({"x" * 1000: np.zeros((2, 2), np.float32)})
    write(tmp_path / "model.safetensors", data)
    with pytest.raises(ModelError, match="a name of 1000 characters"):
        find_tensors(tmp_path)


@pytest.mark.fuzz
@given(
    header=st.one_of(st.binary(max_size=80), ANY_JSON.map(lambda value: json.dumps(value).encode())),
    rest=st.binary(max_size=40),
)
def test_any_header_of_safetensors_is_read_or_refused(tmp_path_factory, header, rest):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-tensors"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + rest)
    try:
        shapes_of(find_tensors(folder))
        peft_format.layers_of(folder)
        peft_format.fingerprint_of(folder)
    except ModelError as error:
        assert str(folder) in str(error)


def test_an_adapter_with_a_large_header_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / peft_format.WEIGHTS).write_bytes(struct.pack("<Q", 50 << 20) + b"{" + b" " * (50 << 20))
    with little_memory(), pytest.raises(AdapterError, match="header"):
        peft_format.read(folder, LAYERS)


# --- GGUF ---


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(*pairs, num_keys=None, num_tensors=0):
    """A GGUF file of these keys: (name, type, bytes)."""
    body = b"".join(text(name) + struct.pack("<I", kind) + data for name, kind, data in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, len(pairs) if num_keys is None else num_keys) + body


def array(kind, count, data):
    return struct.pack("<IQ", kind, count) + data


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: gguf(("a", 9, array(0, 100_000_000, bytes(100_000_000)))),
        lambda: gguf(*((f"a{number}", 9, array(0, 1 << 21, bytes(1 << 21))) for number in range(20))),
        lambda: gguf(*((f"a{number}", 9, array(8, 200_000, text("") * 200_000)) for number in range(30))),
        lambda: gguf(*((f"a{number}", 8, text("x" * (100 << 20))) for number in range(3))),
        lambda: gguf(*((f"a{number}", 0, b"\0") for number in range(70_000))),
    ],
    ids=["one list", "many lists", "many texts", "long texts", "many keys"],
)
def test_a_gguf_file_does_not_take_many_times_its_size(tmp_path, make):
    path = tmp_path / "a.gguf"
    path.write_bytes(make())
    with little_memory(), pytest.raises(ModelError, match="damaged"), open_gguf(path):
        pass


def sentencepiece(tokens):
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.scores": [0.0] * len(tokens),
    }


@pytest.mark.parametrize(
    "tokens",
    [
        ["a", "a" * 60_000],
        ["x" * length for length in range(1, 1000)],
        [chr(65 + n % 26) * 400 for n in range(9999)],
    ],
    ids=["one", "a staircase", "many"],
)
def test_long_tokens_do_not_take_long(tokens):
    unique = list(dict.fromkeys(tokens)) + [f"{n}{'y' * 500}" for n in range(600)]
    with pytest.raises(ModelError, match="a token has"):
        tokenizer_json(sentencepiece(unique), "a.gguf")


@pytest.mark.fuzz
@given(
    pairs=st.lists(st.tuples(st.text(max_size=6), st.integers(0, 13), st.binary(max_size=30)), max_size=4),
    num_keys=st.integers(0, 5),
    num_tensors=st.integers(0, 3),
)
def test_any_header_of_gguf_is_read_or_refused(tmp_path_factory, pairs, num_keys, num_tensors):
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(gguf(*pairs, num_keys=num_keys, num_tensors=num_tensors))
    try:
        with open_gguf(path) as file:
            assert len(file.metadata) <= num_keys
    except ModelError as error:
        assert str(path) in str(error)


@pytest.mark.fuzz
@given(
    values=st.dictionaries(
        st.sampled_from(
            [
                f"tokenizer.ggml.{name}"
                for name in ("model", "tokens", "token_type", "scores", "merges", "pre", "add_space_prefix")
            ]
        ),
        st.one_of(
            ANY_JSON,
            st.sampled_from(["llama", "gpt2"]),
            st.lists(st.text(max_size=4), max_size=5),
            st.lists(st.integers(0, 7), max_size=5),
        ),
    )
)
def test_any_vocabulary_of_gguf_is_read_or_refused(values):
    try:
        FastTokenizer(tokenizer_json(values, "a.gguf"))
    except ModelError as error:
        assert str(error)


# --- the hub ---


class _File:
    lfs = None

    def __init__(self, name, size=1):
        self.rfilename, self.size = name, size


class _Info:
    sha = "main"

    def __init__(self, *names):
        self.siblings = [_File(name) for name in names]


def test_a_name_that_leads_out_of_the_folder_is_not_fetched(monkeypatch):
    names = (
        *("model/../../x.safetensors", "model/x.safetensors", "../model.safetensors", "/model.safetensors"),
        *("model*.safetensors", "model[a].safetensors", "model?.safetensors", "model\\..\\..\\x.safetensors"),
        *("modelC:x.safetensors", "model\n.safetensors", ".model.safetensors", "..safetensors"),
    )
    monkeypatch.setattr(hub, "_ask", lambda _: _Info("config.json", "model.safetensors", *names))
    assert set(hub.look_up("a/b").sizes) == {"config.json", "model.safetensors"}
    monkeypatch.setattr(hub, "_ask", lambda _: _Info("config.json", *names))
    with pytest.raises(ModelError, match="no safetensors weights"):
        hub.look_up("a/b")


def test_a_configuration_of_gigabytes_is_not_fetched(monkeypatch):
    info = _Info("model.safetensors")
    info.siblings.append(_File("tokenizer.json", 3 << 30))
    monkeypatch.setattr(hub, "_ask", lambda _: info)
    with pytest.raises(ModelError, match=r"tokenizer\.json of a/b has 3072 MB"):
        hub.look_up("a/b")
