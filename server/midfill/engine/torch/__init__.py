"""The runner for GPUs, and for every architecture that transformers knows."""
