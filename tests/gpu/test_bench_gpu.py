"""`midfill bench gpu` from its first to its last line; on an emulated device where there is no other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from midfill.bench import gpu as bench

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SHAPE = "qwen2.5-coder-0.5b"


@pytest.fixture
def plan(gpu):
    """Small models on a real device too: this is a test of the program."""
    return bench.GpuPlan(
        shapes=(SHAPE,),
        prompt_tokens=64,
        long_tokens=300,
        rounds=2,
        capture_s=1.0,
        copy_bytes=1 << 16,
        changes={kind: gpu.small(kind) for kind in ("qwen2", "gpt_bigcode")},
    )


def test_every_figure_is_a_line_as_soon_as_it_is_there(gpu, plan, tmp_path):
    told = []

    def tell(line):
        # It is in the file already, so that it is not lost with what comes after it.
        assert json.loads((tmp_path / bench.FILE).read_text().splitlines()[-1]) == line
        told.append(line)

    lines = bench.bench_gpu(plan, tmp_path, tell)
    assert told == lines
    assert [line for line in lines if "error" in line or "skipped" in line] == [lines[-1]]
    assert (lines[-1]["failed"], lines[-1]["skipped"]) == ([], [])
    found = {line["what"]: line for line in lines}
    for kind in ("qwen2", "gpt_bigcode"):
        assert found[f"float32 {kind}"]["tokens_equal_generate"] == [True, True, True]
        assert found[f"float32 {kind}"]["graphs"] > 0
    assert found["machine"]["gpu"] == gpu.name
    for what, figure in (("copy", "tb_per_s"), ("small kernel in a graph", "us")):
        assert found[what][figure] > 0 or gpu.emulated
    assert found[f"{SHAPE}: captured"]["attention"] in ("flash", "plain")
    for what, figure in (
        ("generate", "ms_per_token"),
        ("decode after 64 tokens", "ms_per_token"),
        ("decode after 64 tokens", "ms_first_token_after_a_key"),
        ("decode after 64 tokens", "ms_after_64_tokens"),
        ("cold prompt of 300 tokens", "ms"),
        ("2 sequences", "ms_per_step"),
        ("4 sequences", "ms_per_step"),
        ("engine", "ms_per_token"),
        ("adapter of rank 16", "ms_per_token"),
        ("adapter of rank 16", "ms_per_token_of_the_base_beside_it"),
    ):
        value = found[f"{SHAPE}: {what}"][figure]
        # A difference of two times on an emulated device may be that of the machine's other work.
        assert value > 0 or (gpu.emulated and isinstance(value, float))
    compared = found[f"{SHAPE}: captured and called"]
    assert 0 < compared["same_tokens"] <= compared["of"]


def test_a_part_that_fails_does_not_end_the_others_and_what_has_no_time_is_named(plan, tmp_path):
    # More than any device has.
    lines = bench.bench_gpu(replace(plan, copy_bytes=1 << 50, shapes=()), tmp_path, lambda _line: None)
    assert lines[-1]["failed"] == ["machine"]
    assert any(line["what"] == "float32 qwen2" for line in lines)
    lines = bench.bench_gpu(replace(plan, budget_s=0.001), tmp_path, lambda _line: None)
    assert lines[-1]["skipped"] == ["machine", "float32", SHAPE]
    assert "0 s are left" in lines[0]["skipped"]
