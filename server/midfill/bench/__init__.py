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

SERVED = 0.8
"""Enough of the requests that are answered with a suggestion before the next key, by what one typist alone
gets. What comes too late is taken back by that key, so that it is missing there and never counts as late.
It stands here because the command line can read it without importing what measures.
"""
