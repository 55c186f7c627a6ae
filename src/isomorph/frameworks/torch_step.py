"""A decode step recorded once and replayed without Python: every token of a batch goes through the same operations.

    record   a step runs under a dispatch mode that notes each operation; the next step must note the same
    lower    most operations become instructions of `kernels/csrc/step.h`, the rest calls that fill the same memory
    replay   ids and positions are written where the first step had them; the logits stand where it left them

A model that does anything else (reads values back, has masks or attention of its own, keeps more than keys and values)
is not recorded, and decodes through its module as before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

from isomorph.frameworks.torch_lower import Program
from isomorph.kernels import native
from isomorph.kernels.modules import through_operators

if TYPE_CHECKING:
    from isomorph.frameworks.torch import TorchModel
    from isomorph.frameworks.torch_cache import SlotCache

logger = logging.getLogger(__name__)

ATTENTION = "isomorph_step"

#: What Transformers' code may raise over a cache or an attention that it does not expect.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class NotRecordable(Exception):
    """A step that is not the same operations every time."""


@dataclass(frozen=True)
class Node:
    """One operation as it was called; attention has no `function`."""

    function: Any
    arguments: Sequence[Any]
    options: dict[str, Any]
    result: Any

    def tensors(self) -> Iterator[torch.Tensor]:
        return tensors_in((self.arguments, self.options))

    def reads_values(self) -> bool:
        """Whether what comes out, or its shape, is decided by the values that go in."""
        if self.function is None:
            return False
        if self.function == torch.ops.aten.index.Tensor:
            return any(index.dtype == torch.bool for index in tensors_in(self.arguments[1]))
        return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(self.function.tags))

    def written(self) -> list[torch.Tensor]:
        """The arguments that the operation changes."""
        if self.function is None or not self.function._schema.is_mutable:
            return []
        pairs = zip(self.function._schema.arguments, self.arguments)
        return [value for name, value in pairs if name.alias_info is not None and name.alias_info.is_write]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """The operations of one step of `cache`'s rows, and what went in and out."""

    def __init__(self, cache: SlotCache, starts: np.ndarray) -> None:
        super().__init__()
        self.cache, self.starts = cache, starts
        self.nodes: list[Node] = []
        self.updated: dict[int, int] = {}
        self.inputs: list[torch.Tensor] = []
        self.logits: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nodes.append(Node(func, args, kwargs or {}, result))
        return result

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """Attention [B, 1, H, K] of one query a row over the cache and the new key and value, which join the cache."""
        batch, heads, _, _ = query.shape
        result = torch.empty(batch, 1, heads, value.shape[-1], dtype=query.dtype)
        node = Node(None, (query, key, value), options, result)
        program = Program()
        program.attend(node)
        program.run(self.cache, self.starts)
        self.nodes.append(node)
        return result

    def dependent(self) -> list[Node]:
        """The nodes whose results depend on the inputs, in order; views are left out. Raises NotRecordable."""
        written = {memory(tensor) for node in self.nodes for tensor in node.written()}
        live = {memory(tensor) for tensor in self.inputs}
        nodes = []
        for node in self.nodes:
            given = {memory(tensor) for tensor in node.tensors()}
            made = {memory(tensor) for tensor in tensors_in(node.result) if tensor.numel()}
            changes = bool(node.written())
            if not changes and made and made <= given:  # a view
                continue
            if not (given & live or made & written):  # a constant
                continue
            if node.reads_values():
                raise NotRecordable(f"{node.function} depends on values")
            live |= made | ({memory(tensor) for tensor in node.written()} if changes else set())
            nodes.append(node)
        return nodes

    def check_same(self, other: Recording) -> None:
        """Raises NotRecordable unless `other`, of the next step, is the same but for its inputs' values."""
        if len(self.nodes) != len(other.nodes):
            raise NotRecordable("two steps have different operations")
        live: set[int] = {memory(tensor) for tensor in self.inputs}
        live |= {memory(tensor) for node in self.dependent() for tensor in tensors_in(node.result)}
        for mine, theirs in zip(self.nodes, other.nodes):
            same = mine.function == theirs.function and _same(
                (mine.arguments, mine.options), (theirs.arguments, theirs.options), live
            )
            if not same:
                raise NotRecordable(f"{mine.function} differs between two steps")


def _same(a: Any, b: Any, live: set[int]) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
            return False
        return a.data_ptr() == b.data_ptr() or memory(a) in live or torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, live) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key], live) for key in a)
    return bool(a == b)


_current: ContextVar[Recording | None] = ContextVar("isomorph_recording", default=None)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """The attention function of a step that is recorded, as Transformers calls it."""
    recording = _current.get()
    layer = recording.updated.get(key.data_ptr()) if recording is not None else None
    if recording is None or layer is None or mask is not None or options.get("position_bias") is not None:
        raise NotRecordable("attention over something else than the cache")
    window, kept = options.get("sliding_window"), recording.cache.layers[layer].window
    if window != kept:  # a window that only a mask knows
        raise NotRecordable(f"window {window} where the cache keeps {kept}")
    scale = options.get("scaling")
    sinks = options.get("s_aux")
    chosen = {
        "layer": layer,
        "scale": float(query.shape[-1] ** -0.5 if scale is None else scale),
        "window": int(window or 0),
        "cap": float(options.get("softcap") or 0.0),
        "sinks": None if sinks is None else sinks.float().contiguous(),
    }
    return recording.attend(query, key, value, chosen), None


AttentionInterface.register(ATTENTION, _attention)


class OneToken(DynamicCache):
    """Says how far the cache is filled and notes whose keys are whose; attention itself stores them."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.recording.updated[key_states.data_ptr()] = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.recording.cache.filled


@contextmanager
def altered(config: Any, **values: Any) -> Iterator[None]:
    """`config` with other values while the block runs, of those keys that it has."""
    before = {key: getattr(config, key) for key in values if hasattr(config, key)}
    try:
        for key in before:
            setattr(config, key, values[key])
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def record(model: TorchModel, cache: SlotCache, starts: np.ndarray, ids: np.ndarray) -> Recording:
    """Run one step of `ids` [B, 1] through the module and note it. Raises NotRecordable."""
    if model.cache_layers != model.num_layers:
        raise NotRecordable("the model remembers more than keys and values")
    recording = Recording(cache, starts)
    tokens = torch.from_numpy(ids.copy())
    positions = torch.from_numpy((cache.filled - starts)[:, None])
    recording.inputs = [tokens, positions]
    config = model.module.config.get_text_config()
    token = _current.set(recording)
    try:
        # Without a pad token nobody looks for padding among the ids, which would be reading values.
        changed = altered(config, _attn_implementation=ATTENTION, pad_token_id=None)
        with changed, torch.no_grad(), through_operators(), recording:
            recording.logits = model.module(
                tokens, position_ids=positions, past_key_values=OneToken(recording), use_cache=True
            ).logits
    except REFUSALS as error:
        raise NotRecordable(f"{type(error).__name__}: {error}") from error
    finally:
        _current.reset(token)
    if len(recording.updated) != model.num_layers:
        raise NotRecordable(f"{len(recording.updated)} of {model.num_layers} layers attend in the usual way")
    return recording


class Steps:
    """The recorded steps of one model by number of rows."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        self.refusal = self._refusal()
        self._lock = threading.Lock()
        self._recordings: dict[int, Recording] = {}
        self._programs: dict[int, Callable[[SlotCache, np.ndarray, np.ndarray], np.ndarray]] = {}

    def _refusal(self) -> str | None:
        if self.model.device.type != "cpu":
            return f"steps are recorded on a CPU, not on {self.model.device.type}"
        if native.extension() is None:
            return "the C++ extension is missing"
        if self.model.module.dtype not in native.TYPES:
            return f"no instructions compute in {self.model.module.dtype}"
        return None if "position_ids" in self.model._accepted else "the model takes no position_ids"

    def recorded(self, rows: int) -> bool:
        """Whether steps of so many rows are replayed."""
        return rows in self._programs

    def describe(self, rows: int) -> str:
        """`recorded`, or why steps of so many rows go through the module."""
        return "recorded" if self.recorded(rows) else self.refusal or "too few steps so far"

    def __call__(self, cache: SlotCache, starts: np.ndarray, ids: np.ndarray) -> np.ndarray | None:
        """Logits, float32 [B, 1, V], of one more token a row, `ids` [B, 1]; None where the module has to run."""
        if not (self.refusal is None and cache.filled and self._lock.acquire(blocking=False)):
            return None
        try:
            cache.make_room()
            if (program := self._programs.get(len(ids))) is not None:
                return program(cache, starts, ids)
            recording = record(self.model, cache, starts, ids)
            first = self._recordings.setdefault(len(ids), recording)
            if first is not recording:
                first.check_same(recording)
                self._programs[len(ids)] = replay(first)
                del self._recordings[len(ids)]
            return as_float32(recording.logits)
        except NotRecordable as reason:
            self.refusal = str(reason)
            logger.info("%s decodes through its module: %s", self.model.architecture, reason)
            return None
        finally:
            self._lock.release()


def together(nodes: Sequence[Node]) -> list[list[Node]]:
    """The nodes in order, but products of the same activations (queries, keys and values; gate and up) side by side.

    Results have memory of their own, so that a product may move up unless its activations are written to on the way.
    """
    groups: list[list[Node]] = []
    open_products: dict[Any, list[Node]] = {}
    for node in nodes:
        changed = {memory(tensor) for tensor in node.written()}
        open_products = {key: group for key, group in open_products.items() if key[0] not in changed}
        if node.function != torch.ops.isomorph.quantized_linear.default:
            groups.append([node])
            continue
        x, _, _, _, *settings = node.arguments
        key = memory(x), x.data_ptr(), x.shape, x.stride(), tuple(settings)
        if key in open_products:
            open_products[key].append(node)
        else:
            groups.append(open_products.setdefault(key, [node]))
    return groups


def replay(recording: Recording) -> Callable[[SlotCache, np.ndarray, np.ndarray], np.ndarray]:
    """The recorded step as a function of the cache, the rows' first slots [B] and ids [B, 1]."""
    program = Program()
    for nodes in together(recording.dependent()):
        program.add(*nodes)
    tokens, positions = recording.inputs
    logits = recording.logits

    def run(cache: SlotCache, starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        tokens.copy_(torch.from_numpy(ids))
        positions.copy_(torch.from_numpy((cache.filled - starts)[:, None]))
        program.run(cache, starts)
        return as_float32(logits)

    return run


def as_float32(logits: torch.Tensor | None) -> np.ndarray:
    assert logits is not None
    # A copy: the memory is written again by the next step.
    return logits[:, -1:].to(torch.float32, copy=True).numpy()
