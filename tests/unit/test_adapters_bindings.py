"""Where adapters are used: the narrowest binding counts, and every change can be taken back."""

import os
from pathlib import Path

import pytest

from midfill.adapters.bindings import OFF, Bindings, Bound, asked_by
from midfill.errors import AdapterError

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def bindings(tmp_path):
    return Bindings(tmp_path / "adapters")


def test_the_narrowest_binding_counts(bindings):
    bindings.bind(A)
    bindings.bind(B, language="python")
    bindings.bind(C, workspace=Path("/work"))
    bindings.bind(OFF, workspace=Path("/work/vendor"))
    bound = bindings.read()
    assert bound.resolve(Path("/home/x.rs"), "rust") == A
    assert bound.resolve(None, "rust") == A
    assert bound.resolve(Path("/home/x.py"), "python") == B
    assert bound.resolve(Path("/work/x.py"), "python") == C
    assert bound.resolve(Path("/work/vendor/x.py"), "python") is None
    assert bound.resolve(Path("/workshop/x.rs"), "rust") == A
    assert bound.uses(B) == ["language python"]
    assert bound.uses(A) == ["everywhere"]


def test_a_binding_is_taken_away(bindings):
    bindings.bind(A)
    bindings.bind(OFF, workspace=Path("/work"))
    bindings.bind(None, workspace=Path("/work"))
    assert bindings.read().resolve(Path("/work/x.py"), "python") == A
    bindings.bind(None)
    assert bindings.read() == Bound()


def test_changes_are_taken_back_one_by_one(bindings):
    bindings.bind(A)
    bindings.bind(B)
    bindings.bind(B)  # no change
    bindings.release(B)
    assert bindings.read().everywhere is None
    assert [bindings.rollback().everywhere for _ in range(3)] == [B, A, None]
    with pytest.raises(AdapterError, match="no change"):
        bindings.rollback()


def test_what_was_refused_is_remembered(bindings):
    bindings.refuse(Path("/work"), A)
    bindings.refuse(Path("/work"), B)
    bindings.refuse(Path("/work"), B)
    assert bindings.read().refused == {"/work": (A, B)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 2}',
        '{"format": 1, "now": {"everywhere": "../x", "languages": {}, "workspaces": {}}}',
    ],
)
def test_a_file_that_cannot_be_read(bindings, text):
    bindings.root.mkdir()
    bindings.path.write_text(text)
    with pytest.raises(AdapterError, match=r"bindings\.json"):
        bindings.read()


def test_what_a_workspace_asks_for(tmp_path):
    file = tmp_path / ".midfill.toml"
    assert asked_by(tmp_path) is None
    file.write_text(f'adapter = "sha256:{A}"\n')
    assert asked_by(tmp_path) == A
    # As Notepad and PowerShell write it.
    file.write_bytes(b"\xef\xbb\xbf# ours\r\n" + f'adapter = "sha256:{A}"\r\n'.encode())
    assert asked_by(tmp_path) == A


def test_a_request_in_utf_16_is_named_in_the_log(tmp_path, caplog):
    (tmp_path / ".midfill.toml").write_bytes(f'adapter = "sha256:{A}"\r\n'.encode("utf-16"))
    assert asked_by(tmp_path) is None
    assert ".midfill.toml is ignored: it is in UTF-16. Save it as UTF-8." in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_bindings_that_were_mended_with_notepad_are_read(tmp_path, encoding):
    bindings = Bindings(tmp_path)
    bindings.bind(A, language="python")
    bindings.path.write_text(bindings.path.read_text(), encoding=encoding)
    assert bindings.read().languages == {"python": A}


@pytest.mark.parametrize(
    "text",
    [
        'adapter = "./adapter"',
        'adapter = "https://example.org/x"',
        'adapter = "mine"',
        f'adapter = "sha256:{A[:12]}"',
        f'adapter = ["sha256:{A}"]',
        f'adapter = "sha256:{A}"\nx = "{"y" * 5000}"',
        "adapter",
        "\xff",
    ],
)
def test_a_workspace_asks_by_digest_only(tmp_path, text):
    (tmp_path / ".midfill.toml").write_text(text, encoding="latin-1")
    assert asked_by(tmp_path) is None


def test_what_is_no_file_asks_for_nothing(tmp_path):
    (tmp_path / "elsewhere").write_text(f'adapter = "sha256:{A}"\n')
    (tmp_path / ".midfill.toml").symlink_to(tmp_path / "elsewhere")
    assert asked_by(tmp_path) is None
    (tmp_path / ".midfill.toml").unlink()
    os.mkfifo(tmp_path / ".midfill.toml")
    assert asked_by(tmp_path) is None
