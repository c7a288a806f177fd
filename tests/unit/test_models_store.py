import json
import os

import pytest
import tiny_gguf

from midfill.errors import ModelError
from midfill.models import fetch, store
from midfill.models.gguf import convert


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def silent(message, share):
    pass


def build(folder):
    """A model folder, complete but for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}.gguf"
    tiny_gguf.write_qwen2(source)
    convert(source, folder, silent)
    source.unlink()
    return folder


def install(name, family="qwen2.5-coder"):
    key = store.key_of(name)
    with store.new_folder(key) as building:
        build(building)
        return store.publish(building, key, name=name, family=family, source="a test")


def test_what_is_published_is_found_by_name_and_hub_id(cache):
    made = install("qwen2.5-coder-0.5b")
    assert made.path == cache / "models" / "qwen2.5-coder-0.5b"
    for name in ("qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-Coder-0.5B"):
        assert store.find(name) == made
    assert store.installed() == [made]
    assert store.read_config(made.path)["model_type"] == "qwen2"
    assert [path.name for path in (cache / "models").iterdir()] == ["qwen2.5-coder-0.5b"]


def test_nothing_is_found_in_an_empty_cache():
    assert store.find("qwen2.5-coder-0.5b") is None
    assert store.find("someone/something") is None
    assert store.find("no such thing \0") is None
    assert store.installed() == []


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json", "midfill.json"])
def test_a_folder_that_lacks_a_file_is_not_found(missing):
    made = install("qwen2.5-coder-0.5b")
    (made.path / missing).unlink()
    assert store.find("qwen2.5-coder-0.5b") is None
    assert store.installed() == []


def test_a_folder_with_a_short_file_is_not_found():
    made = install("qwen2.5-coder-0.5b")
    os.truncate(made.path / "model.safetensors", 100)
    assert store.find("qwen2.5-coder-0.5b") is None


def test_a_folder_that_is_being_built_is_not_found(cache):
    with store.new_folder("qwen2.5-coder-0.5b") as building:
        build(building)
        assert store.find("qwen2.5-coder-0.5b") is None
        assert store.installed() == []
    assert not building.exists()


def test_publishing_replaces_what_was_incomplete():
    made = install("qwen2.5-coder-0.5b")
    (made.path / "model.safetensors").unlink()
    assert install("qwen2.5-coder-0.5b") == made
    assert store.find("qwen2.5-coder-0.5b") == made


def test_an_incomplete_folder_is_not_published():
    with store.new_folder("x") as building:
        build(building)
        (building / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            store.publish(building, "x", name="x", family=None, source="")
    assert store.installed() == []


def test_a_folder_of_the_user_is_used_as_it_is(tmp_path):
    folder = build(tmp_path / "mine")
    before = sorted(path.name for path in folder.iterdir())
    found = store.find(str(folder))
    assert (found.path, found.family) == (folder, None)
    assert fetch.pull(str(folder), silent) == found
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_in_the_current_directory_never_stands_in_for_a_known_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "qwen2.5-coder-0.5b")
    build(tmp_path / "someone" / "model")
    assert store.find("qwen2.5-coder-0.5b") is None
    assert store.find("someone/model") is None
    assert store.find("./someone/model").path == tmp_path / "someone" / "model"


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer\.json.*save_pretrained"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pickle.*refuses it.*save_pretrained",
        ),
        (lambda folder: (folder / "model.safetensors").rename(folder / "m.gguf"), r"name it: .*m\.gguf"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
            ),
            "incomplete: the weights model-00001",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../secret.safetensors"}})
            ),
            "outside",
        ),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_wrong(tmp_path, break_it, complaint):
    folder = build(tmp_path / "mine")
    break_it(folder)
    with pytest.raises(ModelError, match=complaint):
        store.find(str(folder))


def test_a_complete_snapshot_of_the_hub_library_is_found(tmp_path):
    repository = tmp_path / "hub" / "models--Qwen--Qwen2.5-Coder-0.5B"
    build(repository / "snapshots" / "abc")
    assert store.find("qwen2.5-coder-0.5b") is None
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    found = store.find("qwen2.5-coder-0.5b")
    assert (found.path, found.family) == (repository / "snapshots" / "abc", "qwen2.5-coder")
    (found.path / "model.safetensors").unlink()
    assert store.find("qwen2.5-coder-0.5b") is None


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path):
    path = tmp_path / "Tiny.gguf"
    tiny_gguf.write_qwen2(path)
    assert store.find(str(path)) is None
    first = fetch.pull(str(path), silent)
    assert store.find(str(path)) == first
    assert fetch.pull(str(path), lambda message, _: pytest.fail(message)) == first
    os.utime(path, (1, 1))
    assert store.find(str(path)) is None
    assert path.exists()
