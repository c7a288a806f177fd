"""The registry: adapters come whole or not at all, and stay as they were."""

import json
import subprocess
import sys

import pytest
from planted_adapters import change_tensors, write_adapter, write_base

from midfill.adapters.registry import Evaluation, Registry
from midfill.errors import AdapterError


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "adapters")


def test_an_adapter_is_added_found_and_removed(registry, base, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "notes.txt").write_text("not ours")
    entry = registry.add(folder, name="mine", base=base, source="a test")
    assert registry.entries() == [entry]
    assert (
        registry.get("mine")
        == registry.get(entry.digest)
        == registry.get("sha256:" + entry.digest[:12])
        == entry
    )
    assert (entry.base, entry.rank, entry.evaluation) == ("base", 2, Evaluation())
    assert sorted(path.name for path in entry.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    registry.check(entry, base)
    json.dumps(entry.as_dict())
    registry.remove("mine")
    assert registry.entries() == []
    assert not entry.path.exists()


def test_what_is_not_there_is_said(registry):
    assert registry.entries() == []
    with pytest.raises(AdapterError, match="no adapter 'mine'"):
        registry.get("mine")
    with pytest.raises(AdapterError, match="no adapter 'mine'"):
        registry.remove("mine")


def test_an_adapter_that_does_not_fit_leaves_nothing(registry, base, tmp_path):
    folder = write_adapter(tmp_path / "a", r=3)
    with pytest.raises(AdapterError, match="does not fit"):
        registry.add(folder, name="mine", base=base)
    assert [path.name for path in registry.root.iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "x" * 65, "deadbeefdeadbeef", "ä"])
def test_names_that_are_none(registry, base, tmp_path, name):
    with pytest.raises(AdapterError, match="is not a valid adapter name"):
        registry.add(write_adapter(tmp_path / "a"), name=name, base=base)


def test_a_name_is_taken_once(registry, base, tmp_path):
    first = write_adapter(tmp_path / "a")
    entry = registry.add(first, name="mine", base=base)
    assert registry.add(first, name="mine", base=base) == entry
    with pytest.raises(AdapterError, match="taken"):
        registry.add(write_adapter(tmp_path / "b", seed=1), name="mine", base=base)
    with pytest.raises(AdapterError, match="registered already, as 'mine'"):
        registry.add(first, name="other", base=base)
    assert registry.entries() == [entry]


def test_evaluations(registry, base, tmp_path):
    rejected = Evaluation("rejected", ("worse",), details={"nll_gain": -0.1})
    entry = registry.add(write_adapter(tmp_path / "a"), name="mine", base=base, evaluation=rejected)
    assert registry.get("mine").evaluation == rejected
    assert not entry.evaluation.usable
    assert registry.force("mine").evaluation == Evaluation(
        "rejected", ("worse",), forced=True, details={"nll_gain": -0.1}
    )
    assert registry.get("mine").evaluation.usable
    registry.set_evaluation("mine", Evaluation("enabled"))
    assert registry.get("mine").evaluation == Evaluation("enabled")
    assert Evaluation().usable
    assert not Evaluation("inconclusive").usable
    with pytest.raises(AdapterError, match="no verdict"):
        Evaluation("fine")


def test_files_that_changed_are_noticed(registry, base, tmp_path):
    entry = registry.add(write_adapter(tmp_path / "a"), name="mine", base=base)
    (entry.path / "adapter_model.safetensors").chmod(0o644)
    change_tensors(entry.path, x=None)
    registry.check(entry)
    write_adapter(entry.path.parent / "other", seed=1).joinpath("adapter_model.safetensors").replace(
        entry.path / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="have changed"):
        registry.check(entry)


def test_another_model_of_the_same_shape_is_noticed(registry, base, tmp_path):
    entry = registry.add(write_adapter(tmp_path / "a"), name="mine", base=base)
    with pytest.raises(AdapterError, match="another model"):
        registry.check(entry, write_base(tmp_path / "other", seed=1))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 9}', '{"format": 1, "adapters": [{}]}'])
def test_an_index_that_cannot_be_read(registry, text):
    registry.root.mkdir()
    (registry.root / "index.json").write_text(text)
    with pytest.raises(AdapterError, match=r"index\.json"):
        registry.entries()


def test_an_index_names_no_folder_elsewhere(registry, base, tmp_path):
    registry.add(write_adapter(tmp_path / "a"), name="mine", base=base)
    index = registry.root / "index.json"
    content = json.loads(index.read_text())
    content["adapters"][0]["digest"] = "../../home"
    index.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="names a folder"):
        registry.remove("mine")


def test_processes_that_add_at_once_all_find_their_adapter(registry, base, tmp_path):
    for number in range(4):
        write_adapter(tmp_path / str(number), seed=number)
    code = (
        "import sys; sys.path.insert(0, sys.argv[5])\n"
        "from pathlib import Path\n"
        "from planted_adapters import Base\n"
        "from midfill.adapters.registry import Registry\n"
        "base = Base('base', Path(sys.argv[2]))\n"
        "Registry(Path(sys.argv[1])).add(Path(sys.argv[3]), name=sys.argv[4], base=base)\n"
    )
    here = str(__import__("pathlib").Path(__file__).parent)
    command = [sys.executable, "-c", code, str(registry.root), str(base.path)]
    processes = [
        subprocess.Popen([*command, str(tmp_path / str(number)), f"n{number}", here]) for number in range(4)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert sorted(entry.name for entry in registry.entries()) == ["n0", "n1", "n2", "n3"]
