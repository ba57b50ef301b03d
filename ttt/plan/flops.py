"""Floating-point operations in closed form, from a configuration alone. No JAX.

A multiply-add is 2 operations; only matrix products count (norms, softmax, rotation and the
optimizer do not). FLOPs are per token, as a mean over the sequence, unless a name says otherwise.
Two notions stand apart:

model FLOPs     what the mathematics needs: attention inside its band only, nothing computed twice,
                no inner gradient below the first fast weight. MFU is measured against these.
hardware FLOPs  what the program runs: attention in whole blocks, the inner gradient through every
                suffix block, and all that is recomputed in the backward pass.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace

from ttt import mixers
from ttt.knobs import ModelConfig, TrainingConfig
from ttt.mixers import Mixer
from ttt.plan.parameters import HEAD, block_kinds, block_weights, blocks, matrices, selected


@dataclass(frozen=True)
class Flops:
    """Operations per token, by part: products with parameters, and the mixers' between tokens."""

    prefix_weights: float = 0.0
    prefix_attention: float = 0.0
    suffix_weights: float = 0.0
    suffix_attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(asdict(self).values()))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, weights: float, attention: float, head: float) -> "Flops":
        """Each kind of work so many times over."""
        times = {"weights": weights, "attention": attention, "head": head}
        return Flops(**{k: n * times[k.rpartition("_")[2]] for k, n in asdict(self).items()})

    def __mul__(self, times: float) -> "Flops":
        return self.scaled(times, times, times)


# ---- model FLOPs -------------------------------------------------------------------------


def mixed_together(model: ModelConfig, length: int) -> int:
    """Tokens that are mixed in one piece, of a sequence of `length`: a window where they part."""
    return min(length, model.mini_batch_size) if mixers.windows_apart(model) else length


def block_of_queries(model: ModelConfig, length: int) -> int:
    """Tokens whose scores are computed together."""
    return min(model.attention_block or model.mini_batch_size, length)


def forward_flops(model: ModelConfig, length: int, *, blocks: bool = False) -> Flops:
    """One forward pass over `length` tokens, logits included.

    Attention counts the pairs inside the band, or, with `blocks`, all pairs of the blocks.
    """
    if blocks:
        return _forward(model, lambda mixer: _in_blocks(model, mixer, length))
    return _forward(model, lambda mixer: mixer.flops(mixed_together(model, length)))


def _in_blocks(model: ModelConfig, mixer: Mixer, length: int) -> float:
    return mixer.flops_in_blocks(mixed_together(model, length), block_of_queries(model, length))


def _forward(model: ModelConfig, mixing: Callable[[Mixer], float]) -> Flops:
    """A forward pass whose work between tokens, per token and layer, is `mixing`."""
    parts = {"head": 2 * model.hidden_size * model.vocab_size}
    for kind in block_kinds(model):
        products = 2 * matrices(block_weights(model, kind).values())
        for part, work in (("weights", products), ("attention", mixing(kind.mixer))):
            name = f"{kind.stack}_{part}"
            parts[name] = parts.get(name, 0) + kind.layers * work
    return Flops(**parts)


def inner_gradient_flops(model: ModelConfig, spec_inner: Iterable[str], length: int) -> Flops:
    """The gradient of the fast weights, beyond the forward pass, as the mathematics needs it.

    Activation gradients reach down to the first fast weight, weight gradients are those of the
    fast weights. The mixers' states are inputs: of what they hold no gradient is taken. The last
    chunk's step is counted, although no later chunk reads it.
    """
    fast = {parameter.name for parameter in selected(model, tuple(spec_inner))}
    head = 2 * model.hidden_size * model.vocab_size * (bool(fast) + (HEAD in fast))
    activation = attention = 0.0
    reached = False
    for kind in blocks(model)[model.num_hidden_layers - model.suffix_len :]:
        weights = block_weights(model, kind)
        stages = [w.stage for name, w in weights.items() if kind.full_name(name) in fast]
        if not (reached or stages):
            continue
        first = -1 if reached else min(stages)
        activation += 2 * matrices(w for w in weights.values() if w.stage > first)
        mixed = max(weights[f"seq_modeling_block.{name}"].stage for name in kind.mixer.weights())
        if first < mixed:  # the last product of a mixer reads what is mixed
            attention += kind.mixer.gradient_flops(length, model.mini_batch_size)
        reached = True
    return Flops(
        suffix_weights=activation + _fast_products(model, spec_inner),
        suffix_attention=attention,
        head=head,
    )


def _fast_products(model: ModelConfig, spec_inner: Iterable[str]) -> int:
    """Operations of one token with the fast matrices of the suffix."""
    fast = selected(model, tuple(spec_inner))
    return 2 * sum(p.layers * matrices([p.weight]) for p in fast if ".suffix_blocks." in p.name)


def reading_flops(
    model: ModelConfig, length: int, spec_inner: Iterable[str] = (), *, score: bool = True
) -> Flops:
    """Model FLOPs of evaluation or prefill; with `spec_inner`, of learning while reading.

    Without learning, a prefill needs no logits: `score=False` leaves the head out.
    """
    forward = forward_flops(model, length)
    if spec_inner := tuple(spec_inner):
        return forward + inner_gradient_flops(model, spec_inner, length)
    return forward if score else replace(forward, head=0.0)


def model_flops(model: ModelConfig, training: TrainingConfig) -> Flops:
    """A training step: every product of the forward pass, and of the inner gradient, three times.

    The transpose of a product is two products.
    """
    return reading_flops(model, training.seq_length, learned(training)) * 3


def learned(training: TrainingConfig) -> tuple[str, ...]:
    """Globs of the weights that change while reading."""
    return training.spec_inner if training.train_mode == "meta" else ()


# ---- hardware FLOPs ----------------------------------------------------------------------

# What a remat policy runs again of a block: (products with weights, work between tokens).
_RECOMPUTED = {"none": (0, 0), "dots": (0, 0), "attention": (1, 0)}
_RECOMPUTED |= {"block": (1, 1), "chunk": (1, 1)}


def hardware_flops(model: ModelConfig, training: TrainingConfig) -> Flops:
    """A training step as the program runs it, all that is computed twice included."""
    weights, mixing = _RECOMPUTED[model.remat_prefix]
    # The plain loss runs its head again, lest it keep what lies between hidden states and loss.
    head = 4 + logits_twice(model)
    plain = _program(model, training.seq_length, mixing).scaled(3 + weights, 1, head)
    if training.train_mode == "pretrain":
        return plain
    prefix = {"prefix_weights": plain.prefix_weights, "prefix_attention": plain.prefix_attention}
    return replace(_learning_flops(model, training), **prefix)


def _program(model: ModelConfig, length: int, again: int) -> Flops:
    """A forward pass; of the work between tokens, also the backward pass and what runs again."""
    return _forward(
        model, lambda mixer: _in_blocks(model, mixer, length) * (1 + mixer.backward + again)
    )


def _learning_flops(model: ModelConfig, training: TrainingConfig) -> Flops:
    """Suffix and head of a `meta` step: the chunks' test-time steps and their derivative."""
    weights, mixing = _RECOMPUTED[model.remat_suffix]
    logits = logits_twice(model)
    program = _program(model, training.seq_length, mixing)
    fast = Flops(suffix_weights=_fast_products(model, training.spec_inner))
    if any(parameter.name == HEAD for parameter in selected(model, training.spec_inner)):
        fast = replace(fast, head=program.head)
    # Forward pass and activation gradients; weight gradients of the fast weights alone.
    primal = program.scaled(2 + weights, 1, 2 + logits)
    step = primal + fast
    if training.inner_gradient == "reverse_over_reverse":
        return step * (4 + (training.inner_remat_freq > 1))
    # The step without weight gradients, and its tangent: a product of two moving factors has a
    # tangent of two products, and slow weights do not move, but have gradients.
    tangent = program.scaled(4 + weights, 2, 4 + logits)
    moving = fast.scaled(2 + weights, 0, 2)
    again = 1 - 1 / training.inner_remat_freq  # of the states in a group, those recomputed
    return step * (1 + again) + primal + tangent + moving


def logits_twice(model: ModelConfig) -> bool:
    """Whether the loss computes its logits again in its backward pass."""
    return 0 < model.loss_block < model.vocab_size
