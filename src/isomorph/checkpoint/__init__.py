"""Reading and writing checkpoints as streams of lazily named tensors, so that memory is bounded by the largest one."""

from isomorph.checkpoint.source import Checkpoint, open_checkpoint
from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor, from_array

__all__ = ["NUMPY_DTYPES", "Checkpoint", "Tensor", "from_array", "open_checkpoint"]
