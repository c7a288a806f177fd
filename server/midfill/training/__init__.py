"""Train a LoRA adapter on a repository's history, and evaluate it on later commits."""
