"""The runner for CPUs: a decoder as an OpenVINO graph with int8 weights."""
