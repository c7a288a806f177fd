"""`midfill bench gpu` on a machine without a GPU; its measurements are tested in tests/gpu."""

import pytest
import torch
from click.testing import CliRunner

from midfill.bench import gpu
from midfill.cli.main import cli
from midfill.errors import MidfillError


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    result = CliRunner().invoke(cli, ["bench", "gpu", "--out", str(tmp_path)])
    assert isinstance(result.exception, MidfillError)
    assert "sees no CUDA GPU on this machine" in str(result.exception)
    assert not (tmp_path / gpu.FILE).exists()


def test_an_unknown_shape_is_answered_with_the_list(tmp_path):
    result = CliRunner().invoke(cli, ["bench", "gpu", "--shapes", "gpt-5"])
    assert "There is no shape 'gpt-5'. Use one of: tiny_starcoder_py, " in str(result.exception)
