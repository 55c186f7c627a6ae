"""What an architecture folder declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isomorph.checkpoint import Checkpoint, Tensor
    from isomorph.port.table import Layout


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a tokenizer that is learned for an architecture, by name, in the order of their ids.

    `ends` end an answer, the first of them is EOS; `begins` says whether BOS begins what is tokenized. Texts to train
    on are separated by `<|endoftext|>`, which pads as well.
    """

    names: tuple[str, ...] = ("<|endoftext|>",)
    bos: str = "<|endoftext|>"
    ends: tuple[str, ...] = ("<|endoftext|>",)
    begins: bool = True


@dataclass(frozen=True)
class Architecture:
    """One architecture of our own: where its parts are and what its checkpoints look like.

    `layouts` are the forms a checkpoint has; `defaults` the one each target of `convert --to` writes; `native` the
    one each framework's model file is filled from; `parameters(config)` the canonical tensors and their shapes.
    `check_dropped(config, tensors)` raises InputError when a tensor that its layout drops says something else than the
    config; `unstated(config)` gives, where a config.json leaves them open, values that are not the class's defaults,
    each with the reason; `foreign(config)` says why a config.json of another model_type is not whole, None when it is;
    `special_tokens` are what a tokenizer learned for it has.
    """

    model_type: str
    config_class: type
    layouts: Mapping[str, Layout]
    defaults: Mapping[str, str]
    native: Mapping[str, str]
    detect: Callable[[Checkpoint], str]
    infer_config: Callable[[Mapping[str, Tensor]], tuple[dict[str, Any], list[str]]]
    parameters: Callable[[Any], dict[str, tuple[int, ...]]]
    role: Callable[[str], str | None]
    folder: str
    check_dropped: Callable[[Any, Mapping[str, Tensor]], None] = lambda config, tensors: None
    unstated: Callable[[Mapping[str, Any]], dict[str, tuple[Any, str]]] = lambda config: {}
    foreign: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    special_tokens: SpecialTokens = SpecialTokens()

    def module(self, name: str) -> ModuleType:
        """Import one of the folder's files, e.g. `modeling_torch`."""
        from importlib import import_module

        return import_module(f"isomorph.architectures.{self.folder}.{name}")
