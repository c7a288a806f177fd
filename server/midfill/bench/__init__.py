"""`midfill bench`: how fast.

- `lsp`: everything but the model.
- `index`: the index of a workspace.
- `engine`: the model alone, beside `transformers.generate` and llama.cpp (`rivals`).
- `replay`: a person who types (`trace`, `typist`), through the real server; `plot` draws it.
"""

from midfill.bench.lsp import BusyEngine, bench_lsp

__all__ = ["BusyEngine", "bench_lsp"]
