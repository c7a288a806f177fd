"""Run a GGUF file with llama.cpp, in process."""
