"""Other engines in processes of their own: what a comparison that cannot be made says."""

import os

import psutil
import pytest

from midfill.bench.baselines import GENERATE, LLAMA_CPP, BaselineError, BaselineProcess

pytestmark = pytest.mark.programs


async def test_a_folder_without_a_model_is_a_reason(tmp_path):
    with pytest.raises(BaselineError, match=r"^generate: \w+: "):
        await BaselineProcess.start(GENERATE, tmp_path, "cpu")


async def test_a_file_that_is_no_model_is_a_reason(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(BaselineError, match=r"llama\.cpp"):
        await BaselineProcess.start(LLAMA_CPP, tmp_path / "bad.gguf", "cpu")


async def test_nothing_is_left_running(tmp_path):
    with pytest.raises(BaselineError):
        await BaselineProcess.start(GENERATE, tmp_path, "cpu")
    assert not [p for p in psutil.Process(os.getpid()).children() if "midfill.bench.baselines" in p.cmdline()]
