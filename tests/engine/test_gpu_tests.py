"""The tests for GPUs start on a machine that has pytest and none of its plugins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.programs
@pytest.mark.slow
def test_they_are_found_without_plugins():
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/gpu"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_cuda.py::test_in_fp32_the_tokens_equal_generate[qwen2]" in found.stdout
    assert "test_bench_gpu.py::test_every_figure" in found.stdout
    assert "warning" not in found.stdout
