"""Other engines in processes of their own: what a comparison that cannot be made says."""

import os

import psutil
import pytest

from midfill.bench.rivals import GENERATE, LLAMA_CPP, Rival, RivalError

pytestmark = pytest.mark.programs


async def test_a_folder_without_a_model_is_a_reason(tmp_path):
    with pytest.raises(RivalError, match=r"^generate: \w+: "):
        await Rival.start(GENERATE, tmp_path, "cpu")


async def test_a_file_that_is_no_model_is_a_reason(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(RivalError, match=r"llama\.cpp"):
        await Rival.start(LLAMA_CPP, tmp_path / "bad.gguf", "cpu")


async def test_nothing_is_left_running(tmp_path):
    with pytest.raises(RivalError):
        await Rival.start(GENERATE, tmp_path, "cpu")
    assert not [p for p in psutil.Process(os.getpid()).children() if "midfill.bench.rivals" in p.cmdline()]
