"""LoRA adapters in a running engine: which are loaded, and how they are replaced."""
