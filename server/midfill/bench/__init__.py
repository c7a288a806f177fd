"""`midfill bench`: speed.

- `lsp`: the server without the model.
- `index`: the index of a workspace.
- `engine`: the model alone, beside `baselines` (`transformers.generate`, llama.cpp); `shapes` makes models
  with random weights. `adapters`: the cost of LoRA adapters.
  `shared_engine`: the cost of a separate process.
- `replay`: types sessions (recorded: `trace`; synthetic: `virtual_user`) into the systems under test
  (`backends`, `llama_vim`); `replay_report` computes the figures, `plot` draws them.
- `load`: many virtual users against one engine; `engine_profile` measures service times, from which
  `simulation` and `sizing` predict more users and several engines.
- `soak`: a long session in fast motion: growth of memory, unanswered requests.
"""
