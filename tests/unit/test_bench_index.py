"""`midfill bench index`, on a small folder."""

import json

import pytest
from click.testing import CliRunner

from midfill.cli.main import cli

pytestmark = pytest.mark.programs


def test_a_folder_is_indexed_and_measured(tmp_path):
    for number in range(20):
        (tmp_path / f"file_{number}.py").write_text(
            f"def function_{number}(a):\n    return a + {number}\n" * 10
        )
    (tmp_path / ".env").write_text("A=1\n")
    result = CliRunner().invoke(cli, ["bench", "index", str(tmp_path), "--lookups", "5", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["folder"], found["files"]) == (tmp_path.name, 20)
    assert found["chunks"] >= 20
    assert 0 < found["choose_ms"]["p50"] <= found["choose_ms"]["max"]
    assert found["scan_s"] > 0


def test_a_folder_without_code_is_an_error_that_says_so(tmp_path):
    result = CliRunner().invoke(cli, ["bench", "index", str(tmp_path)])
    assert result.exit_code != 0
    assert "Nothing in" in str(result.exception) + result.output
