"""The parameters of a network, in closed form, from its configuration alone. No JAX."""

import math
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from ttt import mixers
from ttt.globs import matches
from ttt.knobs import ModelConfig
from ttt.mixers import COLUMNS, ROWS, Mixer, Weight

HEAD = "language_model.lm_head.weight"
"""Name of the head, where it is not the embedding."""
_MODEL = "language_model.model"


class BlockKind(NamedTuple):
    """The blocks of one stack that have the same mixer."""

    stack: str
    """`prefix` or `suffix`."""
    mixer: Mixer
    prime: bool
    """Whether they have prime MLPs."""
    layers: int = 1

    def full_name(self, name: str) -> str:
        """The dotted name in the model of a weight with this name within a block."""
        return f"{_MODEL}.h.{self.stack}_blocks.{name}"


class Parameter(NamedTuple):
    """One weight of the network; in blocks, that of all blocks of one kind."""

    name: str
    """Dotted, in the model. Kinds of one stack have the same names."""
    weight: Weight
    """Of one layer."""
    layers: int = 1

    @property
    def size(self) -> int:
        """Numbers in it, over all its layers."""
        return self.layers * math.prod(self.weight.shape)

    @property
    def in_muon(self) -> bool:
        """Whether Muon trains it where it can: a matrix of a block (`ttt.optimizers`)."""
        return "_blocks." in self.name and len(self.weight.shape) == 2


def blocks(model: ModelConfig) -> list[BlockKind]:
    """One kind for each layer, from the first to the last."""
    first = model.num_hidden_layers - model.suffix_len
    return [
        BlockKind("suffix", mixer, model.prime) if i >= first else BlockKind("prefix", mixer, False)
        for i, mixer in enumerate(mixers.layers(model))
    ]


def block_kinds(model: ModelConfig) -> list[BlockKind]:
    """The kinds of blocks, and how many layers have each."""
    return [kind._replace(layers=count) for kind, count in Counter(blocks(model)).items()]


def block_weights(model: ModelConfig, kind: BlockKind) -> dict[str, Weight]:
    """Name within a block -> weight of one layer; stages are counted through the block."""
    width, inner = model.hidden_size, model.intermediate_size
    mlp = {f"{w}.weight": Weight((width, inner), 0, COLUMNS) for w in ("w1", "w3")}
    mlp |= {"w2.weight": Weight((inner, width), 1, ROWS)}
    parts = [("seq", "seq_modeling_block", kind.mixer.weights())]
    parts += [("ffn_prime", "feed_forward_prime", mlp)] if kind.prime else []
    parts += [("ffn", "feed_forward", mlp)]
    weights: dict[str, Weight] = {}
    stage = 0
    for part, module, own in parts:
        if model.pre_norm:
            weights[f"{part}_norm.weight"] = Weight((width,), stage)
        for name, weight in own.items():
            weights[f"{module}.{name}"] = weight._replace(stage=stage + 1 + weight.stage)
        stage += 2 + max(weight.stage for weight in own.values())
        if model.post_norm:
            weights[f"{part}_post_norm.weight"] = Weight((width,), stage)
        stage += 1
    return weights


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters."""
    width, vocab = model.hidden_size, model.vocab_size
    result = [
        Parameter(f"{_MODEL}.wte.weight", Weight((vocab, width), 0, (None, "data"))),
        Parameter(f"{_MODEL}.ln_f.weight", Weight((width,), 0)),
    ]
    if not model.tie_word_embeddings:
        result.append(Parameter(HEAD, Weight((width, vocab), 0, ("data", None))))
    return result + [
        Parameter(kind.full_name(name), weight, kind.layers)
        for kind in block_kinds(model)
        for name, weight in block_weights(model, kind).items()
    ]


@cache  # a memory plan asks for many programs of one model
def selected(model: ModelConfig, globs: tuple[str, ...]) -> tuple[Parameter, ...]:
    """The parameters that any of `globs` selects."""
    return tuple(p for p in parameters(model) if any(matches(glob, p.name) for glob in globs))


def count(parameters: Iterable[Parameter]) -> int:
    """Numbers in all of them."""
    return sum(parameter.size for parameter in parameters)


def parameter_sizes(model: ModelConfig) -> dict[str, int]:
    """Numbers in every parameter, by its dotted name in the model."""
    sizes: Counter[str] = Counter()
    for parameter in parameters(model):
        sizes[parameter.name] += parameter.size
    return dict(sizes)


def counts(model: ModelConfig) -> dict[str, int]:
    """Numbers in the parameters, by part; `head` is 0 where it is the embedding."""
    parts = {"wte": "embedding", "lm_head": "head", "ln_f": "final_norm"}
    sizes = dict.fromkeys(("embedding", "head", "prefix", "suffix", "prime", "final_norm"), 0)
    for name, size in parameter_sizes(model).items():
        stack, _, within = name.partition("_blocks.")
        part = stack.rpartition(".")[2] if within else parts[name.split(".")[-2]]
        sizes["prime" if "_prime" in within else part] += size
    return sizes | {"total": sum(sizes.values())}


def matrices(weights: Iterable[Weight]) -> int:
    """Numbers in the matrices: norms, gains and biases take no products."""
    return sum(math.prod(weight.shape) for weight in weights if len(weight.shape) > 1)
