"""LoRA adapters on disk: their format and checks, the registry, bindings. Runs no model."""
