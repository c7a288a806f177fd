"""`midfill bench adapters` on a tiny model: that it measures, not what."""

import tiny

from midfill.bench.adapters import AdapterPlan, bench_adapters, table
from midfill.engine.api import EngineSpec
from midfill.engine.local import LocalEngine
from midfill.settings import Settings


async def test_what_an_adapter_costs_is_measured(tmp_path):
    model = tiny.write_model("qwen2", tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    result = await bench_adapters(
        Settings(),
        lambda _: LocalEngine(EngineSpec(model, "cpu", "float32", drafts=False)),
        model,
        folder=tmp_path / "adapters",
        plan=AdapterPlan(rank=4, rounds=2, context_tokens=40, decode_tokens=4),
        progress=lambda *_: None,
    )
    assert set(result["decode_ms"]) == set(result["decode_ratio"]) == {"base", "adapter", "base beside it"}
    assert result["tokens"] == dict.fromkeys(result["decode_ms"], 6)
    assert all(value > 0 for value in result["decode_ms"].values())
    assert set(result["swaps"]) == {"first", "second", "none"}
    assert all(swap["wall_ms"] > 0 for swap in result["swaps"].values())
    assert "tiny-qwen2, cpu, float32, rank 4" in table(result)
