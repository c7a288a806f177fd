"""`midfill bench`: how fast.

- `lsp`: everything but the model.
- `index`: the index of a workspace.
- `engine`: the model alone, beside `transformers.generate` and llama.cpp (`rivals`); `shapes` makes models.
- `replay`: a person who types (`trace`, `typist`), through the real server and, on the same keys, through
  others (`contenders`, `llama_vim`); `report` has the figures, `plot` draws them.
- `load`: many people who type, against one engine; `service` measures what that takes, and `simulation` and
  `sizing` compute from it what many more and several engines would do.
- `soak`: a long session in fast motion; what grows, and what is not answered.
"""
