"""A LoRA adapter from a repository's history, and the proof on later commits that it is better."""
