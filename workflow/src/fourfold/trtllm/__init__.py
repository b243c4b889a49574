"""Checkpoints, engines and servers of NVIDIA TensorRT-LLM."""
