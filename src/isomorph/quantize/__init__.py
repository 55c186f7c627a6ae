"""Quantized weights in MLX's format."""
