"""Reading and writing checkpoints as streams of lazily named tensors, so that memory is bounded by the largest one."""

from isomorph.checkpoint.container import safetensors_files, torch_container
from isomorph.checkpoint.source import Checkpoint, open_checkpoint
from isomorph.checkpoint.target import check_target
from isomorph.checkpoint.tensor import NUMPY_DTYPES, Tensor, from_array
from isomorph.checkpoint.writer import file_identity, write_folder

__all__ = [
    "NUMPY_DTYPES",
    "Checkpoint",
    "Tensor",
    "check_target",
    "file_identity",
    "from_array",
    "open_checkpoint",
    "safetensors_files",
    "torch_container",
    "write_folder",
]
