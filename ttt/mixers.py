"""What the framework knows of each mixer, without JAX: the one place where mixers are told apart.

A mixer mixes the tokens of a sequence: one per layer, as `model.layer_types` names them. Its
description gives weights, state, work and reach as numbers; costs, memory plan, sharding, names on
disk, validation and labels read it. The mathematics is a module of `ttt.model`.

Letters: T tokens, C chunk, W window, D width, H query heads, G key/value heads, K head dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

COLUMNS, ROWS = ("data", "state"), ("state", "data")
"""Mesh axes of a matrix [in, out] that is cut by its outputs, and of one cut by its inputs."""


class Weight(NamedTuple):
    """One parameter of a mixer."""

    shape: tuple[int, ...]
    stage: int
    """Weights of one stage read the same input, and each stage reads what the one before wrote."""
    axes: tuple[str | None, ...] = ()
    """Mesh axis that may divide each axis of the shape; none: every device has all of it."""


@dataclass(frozen=True)
class Mixer(ABC):
    """The description of one mixer at given sizes."""

    name: ClassVar[str]
    """As `layer_types` names it."""
    short: ClassVar[str]
    """As `seq_modeling_block` names a network of it alone."""
    label: ClassVar[str]
    """Of a network of it alone, in records."""
    title: ClassVar[str]
    """The same for readers."""
    train_modes: ClassVar[tuple[str, ...]]
    """Values of `training.train_mode` that it can be trained in."""
    grows: ClassVar[bool]
    """Whether its state grows with the context."""
    family: ClassVar[str]
    """Mixers of one family have the same weights, under the same names on disk."""
    backward: ClassVar[float]
    """Work of the backward pass between tokens, in forward passes."""

    @classmethod
    @abstractmethod
    def of(cls, model: Any) -> "Mixer":
        """At the sizes of a `ttt.knobs.ModelConfig`."""

    @property
    @abstractmethod
    def window(self) -> int | None:
        """Tokens that a query sees at most, itself included; None: all before it."""

    @abstractmethod
    def weights(self) -> dict[str, Weight]:
        """Name within the mixer -> weight."""

    @abstractmethod
    def state_size(self, context: int) -> int:
        """Numbers in the state of one sequence of `context` tokens."""

    @abstractmethod
    def flops(self, length: int) -> float:
        """Operations between tokens, per token, of a forward pass: mean over `length` tokens.

        Only products; those with weights stand apart.
        """

    @abstractmethod
    def flops_in_blocks(self, length: int, block: int) -> float:
        """The same as the program runs it, `block` tokens at a time."""

    @abstractmethod
    def gradient_flops(self, length: int, chunk: int) -> float:
        """The activation gradients of `flops`, where `chunk` tokens read a state as an input."""

    @abstractmethod
    def scores(self, length: int, block: int | None) -> int:
        """Numbers that exist for pairs of tokens at once, `block` tokens at a time; None: all."""

    @property
    @abstractmethod
    def result(self) -> int:
        """Numbers per token of what the last product reads."""

    @abstractmethod
    def intermediates(self) -> tuple[int, int]:
        """Numbers per token that its backward pass reads: in the compute dtype, in float32."""


@dataclass(frozen=True)
class _Attention(Mixer):
    """Softmax attention: H query heads share G heads of keys and values."""

    family = "attention"
    backward = 2.5  # 5 products against 2, for the scores are computed again

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    qk_norm: bool

    def weights(self) -> dict[str, Weight]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = {"wq.weight": Weight((self.width, queries), 0, COLUMNS)}
        weights |= {f"{w}.weight": Weight((self.width, keys), 0, COLUMNS) for w in ("wk", "wv")}
        if self.bias:
            sizes = {"wq": queries, "wk": keys, "wv": keys}
            weights |= {f"{w}.bias": Weight((size,), 0, ("state",)) for w, size in sizes.items()}
        if self.qk_norm:
            weights |= {f"{n}.weight": Weight((self.head_dim,), 1) for n in ("q_norm", "k_norm")}
        return weights | {"wo.weight": Weight((queries, self.width), 2, ROWS)}

    def state_size(self, context: int) -> int:
        positions = context if self.window is None else self.window
        return 2 * positions * self.kv_heads * self.head_dim

    def flops(self, length: int) -> float:
        return 4 * self.heads * self.head_dim * self.keys(length)

    def flops_in_blocks(self, length: int, block: int) -> float:
        return 4 * self.heads * self.head_dim * self.keys_of_block(length, block)

    def gradient_flops(self, length: int, chunk: int) -> float:
        return self.flops(length) + self.flops(min(chunk, length))  # by queries; by own keys

    def scores(self, length: int, block: int | None) -> int:
        pairs = length * length if block is None else block * self.keys_of_block(length, block)
        return self.heads * pairs

    @property
    def result(self) -> int:
        return self.heads * self.head_dim

    def intermediates(self) -> tuple[int, int]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * queries + 2 * keys, 5 * queries + 5 * keys

    def keys(self, length: int) -> float:
        """Keys that a query sees, itself included: mean over a sequence of `length` tokens."""
        window = length if self.window is None else min(self.window, length)
        return window - window * (window - 1) / (2 * length)

    def keys_of_block(self, length: int, block: int) -> int:
        """Keys that `block` queries meet together."""
        return length if self.window is None else self.window + block


@dataclass(frozen=True)
class FullAttention(_Attention):
    """Every token before the query, and itself."""

    name, short, label, title = "full_attention", "self_attention", "fa", "full attention"
    train_modes = ("pretrain",)
    grows = True

    @classmethod
    def of(cls, model: Any) -> "FullAttention":  # noqa: D102 (the base says it)
        return cls(**_attention_sizes(model))

    @property
    def window(self) -> None:  # noqa: D102
        return None


@dataclass(frozen=True)
class SlidingAttention(_Attention):
    """The last W tokens."""

    name, short, label, title = "sliding_attention", "SWA", "swa", "sliding window"
    train_modes = ("pretrain", "meta")
    grows = False

    size: int = 0

    @classmethod
    def of(cls, model: Any) -> "SlidingAttention":  # noqa: D102
        return cls(**_attention_sizes(model), size=model.sliding_window_size)

    @property
    def window(self) -> int:  # noqa: D102
        return self.size


def _attention_sizes(model: Any) -> dict[str, Any]:
    return {
        "width": model.hidden_size,
        "heads": model.num_attention_heads,
        "kv_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "bias": model.attention_bias,
        "qk_norm": model.qk_norm,
    }


MIXERS: dict[str, type[Mixer]] = {kind.name: kind for kind in (FullAttention, SlidingAttention)}
"""Name -> description: a new mixer is entered here, and in `ttt.model.pattern`."""
SHORT_NAMES = {kind.short: kind.name for kind in MIXERS.values()}
"""Values of `seq_modeling_block` -> the name."""
HYBRID = "hybrid"
"""The label of a network of several mixers."""
LABELS = {kind.label: kind.title for kind in MIXERS.values()} | {HYBRID: "hybrid", "e2e": "TTT-E2E"}
"""Method -> the method for readers."""


# ---- of a whole network --------------------------------------------------------------------


def cycle(seq_modeling_block: str, layer_types: Sequence[str]) -> tuple[str, ...]:
    """The names that are repeated over the layers."""
    return tuple(layer_types) or (SHORT_NAMES[seq_modeling_block],)


def layer_types(model: Any) -> tuple[str, ...]:
    """The name of every layer's mixer."""
    names = cycle(model.seq_modeling_block, model.layer_types)
    return tuple(names[i % len(names)] for i in range(model.num_hidden_layers))


def layers(model: Any) -> tuple[Mixer, ...]:
    """The description of every layer's mixer."""
    kinds = {name: MIXERS[name].of(model) for name in cycle_of(model)}
    return tuple(kinds[name] for name in layer_types(model))


def cycle_of(model: Any) -> tuple[str, ...]:
    """`cycle` of a model's configuration."""
    return cycle(model.seq_modeling_block, model.layer_types)


def period(names: Sequence[str]) -> int:
    """The least number of layers after which `names` repeat, up to their end."""
    return next(p for p in range(1, len(names) + 1) if all(map(str.__eq__, names, names[p:])))


def window(model: Any) -> int | None:
    """Tokens that a query of the network sees directly; None: all before it."""
    windows = [mixer.window for mixer in layers(model)]
    return None if None in windows else max(w for w in windows if w is not None)


def grows(model: Any) -> bool:
    """Whether the state of a sequence grows with the context."""
    return any(mixer.grows for mixer in layers(model))


def windows_apart(model: Any) -> bool:
    """Whether plain training attends each window of C tokens on its own (METHOD.md section 2)."""
    return all(mixer.grows for mixer in layers(model))


def train_modes(names: Sequence[str]) -> tuple[str, ...]:
    """Modes that all of the mixers can be trained in."""
    shared = [set(MIXERS[name].train_modes) for name in names]
    return tuple(mode for mode in MIXERS[names[0]].train_modes if all(mode in s for s in shared))


def method(seq_modeling_block: str, layer_types: Sequence[str], train_mode: str) -> str:
    """The label of a network trained so: `fa`, `swa`, `hybrid`, … or `e2e` where it learns."""
    if train_mode == "meta":
        return "e2e"
    kinds = set(cycle(seq_modeling_block, layer_types))
    return MIXERS[kinds.pop()].label if len(kinds) == 1 else HYBRID
