"""LoRA adapters on disk: what one may be, which there are, and where each is to be used. Runs no model."""
