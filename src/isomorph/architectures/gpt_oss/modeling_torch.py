"""gpt-oss in PyTorch is Transformers' own model: nothing to repair."""

from transformers import GptOssConfig, GptOssForCausalLM

__all__ = ["GptOssConfig", "GptOssForCausalLM"]
