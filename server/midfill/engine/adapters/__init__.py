"""LoRA adapters in a running engine: which are loaded, and how others take their place."""
