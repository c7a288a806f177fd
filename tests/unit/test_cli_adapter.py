"""`midfill adapter`, in this process: what is typed, what comes back."""

import json
import os
import re
import subprocess
import sys

import planted_hub
import pytest
from click.testing import CliRunner
from planted_adapters import LAYERS, change_tensors, write_adapter, write_base

from midfill.adapters.bindings import Bindings
from midfill.adapters.registry import Evaluation, Registry
from midfill.cli.main import cli
from midfill.errors import MidfillError


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base model that is the user's; nothing else is there."""
    base = write_base(tmp_path / "model")
    (base.path / "config.json").write_text('{"model_type": "llama"}')
    (base.path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIDFILL_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text(f'model = "{base.path}"\n')
    (tmp_path / "project" / ".git").mkdir(parents=True)
    (tmp_path / "project" / "src").mkdir()
    monkeypatch.chdir(tmp_path / "project" / "src")
    return base


def midfill(*arguments):
    result = CliRunner().invoke(cli, ["adapter", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, MidfillError), result.exception
        return str(result.exception)
    return result.output


def test_an_adapter_from_import_to_removal(base, tmp_path):
    assert "No adapters yet" in midfill("list")
    assert "Imported mine" in midfill("import", write_adapter(tmp_path / "a"), "--name", "mine")
    [listed] = json.loads(midfill("list", "--json"))["adapters"]
    assert (listed["name"], listed["rank"], listed["evaluation"]["verdict"], listed["used"]) == (
        "mine",
        2,
        "none",
        [],
    )
    assert "not evaluated" in midfill("list")
    assert f"mine is now used in {tmp_path / 'project'}." in midfill("use", "mine")
    assert Bindings().read().resolve(tmp_path / "project" / "x.py", "python") == listed["digest"]
    assert f"workspace {tmp_path / 'project'}" in midfill("show", listed["digest"][:12])
    assert "is in use (workspace" in midfill("rm", "mine")
    assert "Exported mine to" in midfill("export", "mine", tmp_path / "out")
    assert "already exists" in midfill("export", "mine", tmp_path / "out")
    assert "No problems found" in midfill("doctor")
    assert "Deleted mine" in midfill("rm", "mine", "--force")
    assert "Imported mine" in midfill("import", tmp_path / "out", "--name", "mine")
    assert Registry().get("mine").digest == listed["digest"]
    assert Bindings().read().uses(listed["digest"]) == []


def test_places(base, tmp_path):
    midfill("import", write_adapter(tmp_path / "a"), "--name", "mine")
    assert "for python" in midfill("use", "mine", "--language", "python")
    assert "for all files without an adapter of their own" in midfill("use", "mine", "--global")
    assert "Give only one of" in midfill("use", "mine", "--global", "--language", "python")
    assert "No adapter is used in" in midfill("off")
    assert Bindings().read().resolve(tmp_path / "project" / "x.py", "python") is None
    assert "everywhere else: mine" in midfill("rollback")
    assert Bindings().read().resolve(tmp_path / "project" / "x.py", "python") == Registry().get("mine").digest
    midfill("off", "--language", "python")
    assert Bindings().read().languages == {}
    for _ in range(3):
        midfill("rollback")
    assert "no change" in midfill("rollback")


def test_one_that_was_rejected_is_used_by_force_only(base, tmp_path):
    midfill("import", write_adapter(tmp_path / "a"), "--name", "mine")
    Registry().set_evaluation("mine", Evaluation("rejected", ("It was worse than the base.",)))
    refusal = midfill("use", "mine")
    assert "verdict 'rejected'" in refusal
    assert "worse than the base" in refusal
    assert Bindings().read().workspaces == {}
    assert "mine is now used" in midfill("use", "mine", "--force")
    assert "rejected, forced" in midfill("list")
    assert json.loads(midfill("show", "mine", "--json"))["evaluation"]["forced"] is True


def test_what_is_wrong_is_said(base, tmp_path):
    assert "no adapter 'other'" in midfill("use", "other")
    assert "'./nowhere' is neither a folder nor" in midfill("import", "./nowhere")
    pickled = write_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "pickled" in midfill("import", pickled)
    other = write_adapter(tmp_path / "other", base_model_name_or_path="bigcode/starcoder2-3b")
    assert "trained for bigcode/starcoder2-3b" in midfill("import", other)
    midfill("import", write_adapter(tmp_path / "a"), "--name", "mine")
    midfill("use", "mine", "--global")
    entry = Registry().get("mine")
    (entry.path / "adapter_model.safetensors").chmod(0o644)
    change_tensors(entry.path, x=entry.path.stat().st_size * __import__("numpy").ones(1, "float32"))
    assert "have changed" in midfill("doctor")
    assert "have changed" in midfill("use", "mine")
    Registry().remove("mine")
    assert "is not on this machine any more" in midfill("doctor")


CODE = {"README.md": b"hello", "modeling.py": b"raise SystemExit", "optimizer.pt": b"pickle"}


@pytest.fixture
def hub(base, tmp_path):
    """A hub with adapters good and bad; `base` is the user's model."""

    def files(name, **config):
        folder = write_adapter(tmp_path / "hub" / name, **config)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    good = files("good")
    pickled = {"adapter_config.json": good["adapter_config.json"], "adapter_model.bin": b"pickle"}
    with planted_hub.running() as hub:
        hub.repositories = {
            "someone/good": good | CODE | {"adapter_model.bin": b"pickle"},
            "someone/pickled": pickled | CODE,
            "someone/no-adapter": {"config.json": b"{}", "model.safetensors": b"x"},
            "someone/for-another": files("for-another", base_model_name_or_path="Qwen/Qwen2.5-Coder-7B"),
            "someone/of-another-shape": files("shape", layers=dict.fromkeys(LAYERS, (4, 4))),
            "someone/lying": good,
            "someone/gated": None,
        }
        hub.lying = {"someone/lying"}
        yield hub


def import_from(hub, name):
    """By a process of its own, because the hub library reads its settings when it is imported."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "midfill", "adapter", "import", name, "--json"],
        env=os.environ | {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def test_an_adapter_comes_from_the_hub(hub, tmp_path):
    status, output = import_from(hub, "someone/good")
    assert status == 0, output
    entry = Registry().get("good")
    assert json.loads(output)["digest"] == entry.digest
    assert (entry.source, entry.evaluation.verdict) == ("someone/good of the hub", "none")
    # Neither code nor pickles came along, nor were they asked for.
    assert hub.fetched == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in entry.path.iterdir()} == hub.fetched
    original = tmp_path / "hub" / "good" / "adapter_model.safetensors"
    assert (entry.path / "adapter_model.safetensors").read_bytes() == original.read_bytes()


@pytest.mark.programs
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("someone/pickled", "has no adapter_model.safetensors.*pickled weights are refused"),
        ("someone/no-adapter", "has no adapter_config.json"),
        ("someone/for-another", "was trained for Qwen/Qwen2.5-Coder-7B, not for"),
        ("someone/of-another-shape", "does not fit"),
        ("someone/lying", "wrong SHA-256"),
        ("someone/gated", "accept its licence at"),
        ("someone/nothing", "is not on the hub, or is private"),
    ],
)
def test_what_is_on_the_hub_and_no_good_is_refused(hub, name, reason):
    status, output = import_from(hub, name)
    assert status == 1
    assert re.search(reason, " ".join(output.split())), output
    assert "Traceback" not in output
    assert not Registry().entries()
    assert not [file for file in hub.fetched if not file.startswith("adapter_")]
    assert "adapter_model.bin" not in hub.fetched
