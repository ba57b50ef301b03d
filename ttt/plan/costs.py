"""Parameters, floating-point operations and bytes in closed form, from a configuration alone.

A multiply-add is 2 operations; only matrix products count (norms, softmax, rotation and the
optimizer do not). FLOPs are per token, as a mean over the sequence, unless a name says otherwise.
Two notions stand apart:

model FLOPs     what the mathematics needs: attention inside its band only, nothing computed twice,
                no inner gradient below the first fast weight. MFU is measured against these.
hardware FLOPs  what the program runs: attention in whole blocks, the inner gradient through every
                suffix block, and all that is recomputed in the backward pass.

The letters are those of the method: T tokens, C chunk, W window, N = T/C chunks, L layers, S of
them suffix, D width, F MLP width, H heads, V vocabulary; B sequences at a time on one device.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

from ttt.errors import UserError
from ttt.globs import matches
from ttt.knobs import Config, ModelConfig, TrainingConfig
from ttt.plan.sharding import shares

BYTES = {"fp32": 4, "bf16": 2}


# ---- parameters ------------------------------------------------------------------------

_MODEL = "language_model.model"
_SUFFIX = f"{_MODEL}.h.suffix_blocks"
# Products of a block in their order; those of one stage read the same input.
_ATTENTION_IN = ("seq_modeling_block.wq", "seq_modeling_block.wk", "seq_modeling_block.wv")
_QK_NORMS = ("seq_modeling_block.q_norm", "seq_modeling_block.k_norm")
_STAGES: tuple[tuple[str, ...], ...] = (
    ("seq_norm",),
    _ATTENTION_IN,
    _QK_NORMS,
    ("seq_modeling_block.wo",),
    ("seq_post_norm",),
    ("ffn_prime_norm",),
    ("feed_forward_prime.w1", "feed_forward_prime.w3"),
    ("feed_forward_prime.w2",),
    ("ffn_prime_post_norm",),
    ("ffn_norm",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
    ("ffn_post_norm",),
)


def _block_sizes(model: ModelConfig, *, prime: bool) -> dict[str, int]:
    """Numbers in each weight of one block, by name within the block."""
    width, inner = model.hidden_size, model.intermediate_size
    mlps = ("feed_forward", "feed_forward_prime") if prime else ("feed_forward",)
    sizes = {f"seq_modeling_block.{w}": width * width for w in ("wq", "wk", "wv", "wo")}
    sizes |= {f"{mlp}.{w}": width * inner for mlp in mlps for w in ("w1", "w2", "w3")}
    if model.qk_norm:
        sizes |= dict.fromkeys(_QK_NORMS, width // model.num_attention_heads)
    normed = ("seq", "ffn", "ffn_prime") if prime else ("seq", "ffn")
    if model.pre_norm:
        sizes |= {f"{part}_norm": width for part in normed}
    if model.post_norm:
        sizes |= {f"{part}_post_norm": width for part in normed}
    return sizes


def parameter_sizes(model: ModelConfig) -> dict[str, int]:
    """Numbers in every parameter, by its dotted name in the model."""
    width, vocab, suffix = model.hidden_size, model.vocab_size, model.suffix_len
    stacks = {"prefix": model.num_hidden_layers - suffix, "suffix": suffix}
    sizes = {f"{_MODEL}.wte.weight": vocab * width, f"{_MODEL}.ln_f.weight": width}
    if not model.tie_word_embeddings:
        sizes["language_model.lm_head.weight"] = width * vocab
    for stack, layers in stacks.items():
        block = _block_sizes(model, prime=model.prime and stack == "suffix")
        for name, size in block.items() if layers else ():
            sizes[f"{_MODEL}.h.{stack}_blocks.{name}.weight"] = layers * size
    return sizes


@dataclass(frozen=True)
class Parameters:
    """Numbers in the parameters, by part."""

    embedding: int
    head: int
    """0 where it is the embedding."""
    prefix: int
    suffix: int
    """Without the prime MLPs."""
    prime: int
    """Prime MLPs and their norms."""
    final_norm: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def parameters(model: ModelConfig) -> Parameters:
    """What the model consists of."""
    sizes = parameter_sizes(model)
    suffix = _count(sizes, ["**.suffix_blocks.**"])
    prime = _count(sizes, ["**.feed_forward_prime.**", "**.ffn_prime_*.**"])
    return Parameters(
        embedding=_count(sizes, ["**.wte.**"]),
        head=_count(sizes, ["**.lm_head.**"]),
        prefix=_count(sizes, ["**.prefix_blocks.**"]),
        suffix=suffix - prime,
        prime=prime,
        final_norm=_count(sizes, ["**.ln_f.**"]),
    )


def fast_parameters(model: ModelConfig, spec_inner: Iterable[str]) -> int:
    """Numbers in the fast weights of one sequence."""
    return sum(_fast(model, tuple(spec_inner)).values())


@cache  # a plan asks for many programs of one model
def _fast(model: ModelConfig, spec_inner: tuple[str, ...]) -> dict[str, int]:
    return _selected(parameter_sizes(model), spec_inner)


def _selected(sizes: dict[str, int], globs: Iterable[str]) -> dict[str, int]:
    globs = tuple(globs)
    return {name: n for name, n in sizes.items() if any(matches(glob, name) for glob in globs)}


def _count(sizes: dict[str, int], globs: Iterable[str]) -> int:
    return sum(_selected(sizes, globs).values())


# ---- floating-point operations -----------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Operations per token, by part: products with parameters, and attention's between tokens."""

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
        return Flops(
            self.prefix_weights * weights,
            self.prefix_attention * attention,
            self.suffix_weights * weights,
            self.suffix_attention * attention,
            self.head * head,
        )

    def __mul__(self, times: float) -> "Flops":
        return self.scaled(times, times, times)


def keys_in_band(model: ModelConfig, length: int) -> float:
    """Keys that a query sees, itself included: mean over a sequence of `length` tokens."""
    if model.seq_modeling_block == "self_attention":
        length = min(length, model.mini_batch_size)  # each window is attended on its own
        return (length + 1) / 2
    window = min(model.sliding_window_size, length)
    return window - window * (window - 1) / (2 * length)


def keys_in_block(model: ModelConfig, length: int) -> int:
    """Keys that a query meets where a block of queries shares one block of keys."""
    if model.seq_modeling_block == "self_attention":
        return min(model.mini_batch_size, length)
    return model.sliding_window_size + _queries(model, length)


def _queries(model: ModelConfig, length: int) -> int:
    """Queries whose scores are computed together."""
    return min(model.attention_block or model.mini_batch_size, length)


def forward_flops(model: ModelConfig, length: int, *, blocks: bool = False) -> Flops:
    """One forward pass over `length` tokens, logits included.

    Attention counts the pairs inside the band, or, with `blocks`, all pairs of the blocks.
    """
    keys = keys_in_block(model, length) if blocks else keys_in_band(model, length)
    attention = 4 * model.hidden_size * keys
    prefix = model.num_hidden_layers - model.suffix_len
    return Flops(
        prefix_weights=2 * prefix * _matrices(model, prime=False),
        prefix_attention=prefix * attention,
        suffix_weights=2 * model.suffix_len * _matrices(model, prime=model.prime),
        suffix_attention=model.suffix_len * attention,
        head=2 * model.hidden_size * model.vocab_size,
    )


def _matrices(model: ModelConfig, *, prime: bool) -> int:
    """Numbers in the matrices of a block."""
    sizes = _block_sizes(model, prime=prime)
    return sum(size for name, size in sizes.items() if "norm" not in name)


def inner_gradient_flops(model: ModelConfig, spec_inner: Iterable[str], length: int) -> Flops:
    """The gradient of the fast weights, beyond the forward pass, as the mathematics needs it.

    Activation gradients reach down to the first fast weight, weight gradients are those of the
    fast weights. The cache is an input: of cached keys and values no gradient is taken. The last
    chunk's step is counted, although no later chunk reads it.
    """
    fast = _fast(model, tuple(spec_inner))
    head = forward_flops(model, length).head
    head_gradients = bool(fast) + ("language_model.lm_head.weight" in fast)
    stages = [
        i for i, names in enumerate(_STAGES) if any(f"{_SUFFIX}.{n}.weight" in fast for n in names)
    ]
    if not stages:
        return Flops(head=head * head_gradients)
    crossed = model.suffix_len - 1  # blocks with a fast weight in the block below
    below_attention = stages[0] < _STAGES.index(("seq_modeling_block.wo",))
    activation = crossed * _products(model, _STAGES) + _products(model, _STAGES[stages[0] + 1 :])
    return Flops(
        suffix_weights=activation + 2 * _fast_matrices(model, spec_inner),
        suffix_attention=(crossed + below_attention) * _inner_attention(model, length),
        head=head * head_gradients,
    )


def _products(model: ModelConfig, stages: Iterable[Iterable[str]]) -> int:
    """Operations of one token with the matrices of a suffix block's `stages`."""
    sizes = _block_sizes(model, prime=model.prime)
    return 2 * sum(sizes.get(n, 0) for names in stages for n in names if "norm" not in n)


def _fast_matrices(model: ModelConfig, spec_inner: Iterable[str]) -> int:
    """Numbers in the fast matrices of the suffix blocks."""
    fast = _fast(model, tuple(spec_inner))
    return sum(n for name, n in fast.items() if "_blocks." in name and "norm" not in name)


def _inner_attention(model: ModelConfig, length: int) -> float:
    """Gradients of one layer's attention by its queries, and by the chunk's own keys and values."""
    own = keys_in_band(model, min(model.mini_batch_size, length))
    return 4 * model.hidden_size * (keys_in_band(model, length) + own)


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
    return reading_flops(model, training.seq_length, _learned(training)) * 3


def _learned(training: TrainingConfig) -> tuple[str, ...]:
    return training.spec_inner if training.train_mode == "meta" else ()


# What a remat policy runs again of a block: (products with weights, attention).
_RECOMPUTED = {
    "none": (0, 0),
    "dots": (0, 0),
    "attention": (1, 0),
    "block": (1, 1),
    "chunk": (1, 1),
}
# Attention forward and backward, in forward passes: 2 products, then 5, for the backward pass
# computes the scores again.
_ATTENTION = 3.5


def hardware_flops(model: ModelConfig, training: TrainingConfig) -> Flops:
    """A training step as the program runs it, all that is computed twice included."""
    forward = forward_flops(model, training.seq_length, blocks=True)
    weights, attention = _RECOMPUTED[model.remat_prefix]
    # The plain loss runs its head again, lest it keep what lies between hidden states and loss.
    plain = forward.scaled(3 + weights, _ATTENTION + attention, 4 + _logits_twice(model))
    if training.train_mode == "pretrain":
        return plain
    prefix = {"prefix_weights": plain.prefix_weights, "prefix_attention": plain.prefix_attention}
    return replace(_learning_flops(model, training, forward), **prefix)


def _learning_flops(model: ModelConfig, training: TrainingConfig, forward: Flops) -> Flops:
    """Suffix and head of a `meta` step: the chunks' test-time steps and their derivative."""
    weights, attention = _RECOMPUTED[model.remat_suffix]
    logits = _logits_twice(model)
    attention += _ATTENTION
    fast = Flops(suffix_weights=2 * _fast_matrices(model, training.spec_inner))
    if "language_model.lm_head.weight" in _fast(model, training.spec_inner):
        fast = replace(fast, head=forward.head)
    # Forward pass and activation gradients; weight gradients of the fast weights alone.
    step = forward.scaled(2 + weights, attention, 2 + logits) + fast
    if training.inner_gradient == "reverse_over_reverse":
        return step * (4 + (training.inner_remat_freq > 1))
    # The step without weight gradients, and its tangent: a product of two moving factors has a
    # tangent of two products, and slow weights do not move, but have gradients.
    primal = forward.scaled(2 + weights, attention, 2 + logits)
    tangent = forward.scaled(4 + weights, 2 * attention, 4 + logits)
    moving = fast.scaled(2 + weights, 0, 2)
    again = 1 - 1 / training.inner_remat_freq  # of the states in a group, those recomputed
    return step * (1 + again) + primal + tangent + moving


def _logits_twice(model: ModelConfig) -> bool:
    """Whether the loss computes its logits again in its backward pass."""
    return 0 < model.loss_block < model.vocab_size


# ---- bytes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device. Of the last three, one is needed at a time."""

    parameters: int
    optimizer: int
    """Both moments."""
    gradients: int
    """Of the outer loop: sum and latest part."""
    gathered: int
    """Weights made whole for use where devices share them, and the gradients of those."""
    kept_blocks: int
    """What the blocks that see the whole sequence keep for their backward pass."""
    block: int
    """The backward pass of one such block."""
    loss: int
    """Logits, and their gradients, of the tokens that are scored together (`pretrain`)."""
    learning: int
    """The chunks of `meta`: stored states, and the derivative of one chunk."""

    @property
    def total(self) -> int:
        """At the peak."""
        return sum(self.at_peak().values())

    def at_peak(self) -> dict[str, int]:
        """The parts that are in memory together when most is."""
        parts = asdict(self)
        passing = ("block", "loss", "learning")
        most = max(passing, key=parts.__getitem__)
        return {name: size for name, size in parts.items() if name not in passing or name == most}

    def largest(self) -> str:
        """The part of the peak that takes most."""
        parts = self.at_peak()
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class Learning:
    """Bytes that learning while reading takes on one device, for its sequences."""

    fast_weights: int
    """One copy."""
    caches: int
    """Keys and values of the suffix, one copy."""
    states: int
    """Copies of both that the backward pass keeps: one a group, and those within one group."""
    sequence: int
    """The prefix's output and its gradient."""
    working: int
    """Fast weights before and after the step, their gradient and cotangents."""
    chunk: int
    """What the suffix keeps of a chunk, the backward pass of a block, and logits."""

    @property
    def total(self) -> int:
        """Stored and in work."""
        return self.states + self.sequence + self.working + self.chunk


def state_memory(model: ModelConfig, spec_inner: Iterable[str]) -> tuple[int, int]:
    """Bytes of (fast weights, key/value caches) of one sequence in the suffix."""
    fast = fast_parameters(model, spec_inner) * BYTES[model.state_dtype]
    positions = 2 * model.sliding_window_size * model.hidden_size
    return fast, model.suffix_len * positions * BYTES[model.compute_dtype]


@dataclass(frozen=True)
class Devices:
    """Devices that share a training step, and how: `backend.sharding` and `state_parallel`."""

    count: int = 1
    sharding: str = "replicated"
    state_parallel: int = 1

    @property
    def data(self) -> int:
        """Those among which sequences are divided; UserError unless `state_parallel` divides."""
        if self.count % self.state_parallel:
            raise UserError(
                f"backend.state_parallel={self.state_parallel} does not divide {self.count} "
                "devices: choose a divisor"
            )
        return self.count // self.state_parallel

    def held(self, sizes: Mapping[str, int], *, whole: bool = False) -> int:
        """Numbers of parameters that each holds; `whole`: while it uses them."""
        data, how = (1, "replicated") if whole else (self.data, self.sharding)
        return sum(
            size // shares(name, how, data=data, state=self.state_parallel)
            for name, size in sizes.items()
        )


ONE = Devices()


def memory(model: ModelConfig, training: TrainingConfig, devices: Devices = ONE) -> Memory:
    """The predicted peak of a training step on each of `devices`.

    Parameters, moments and gradients are divided as the sharding says. Of the rest,
    `state_parallel` divides fast weights and caches here, and no more: the prediction is high.

    Intermediates are as XLA's CPU compiler lays them out: on small shapes the peak is within a
    quarter of its own figure (tests/test_costs.py). A GPU's compiler fuses more of them; the
    prediction has not been compared with one.

    Raises UserError if the devices do not divide a microbatch.
    """
    sequences = _sequences(training, devices)
    tokens = sequences * training.seq_length
    meta = training.train_mode == "meta"
    prefix = model.num_hidden_layers - model.suffix_len
    sizes = parameter_sizes(model)
    trained = devices.held(_selected(sizes, training.spec_outer))
    # Under `chunk` a block that sees the whole sequence keeps its input alone.
    policy = "block" if model.remat_prefix == "chunk" else model.remat_prefix
    kept = prefix * _kept(model, policy, prime=False)
    if not meta:
        kept += model.suffix_len * _kept(model, policy, prime=model.prime)
    whole = prefix if meta else model.num_hidden_layers
    prime = model.prime and model.suffix_len > 0 and not meta
    return Memory(
        parameters=devices.held(sizes) * BYTES[model.param_dtype],
        optimizer=trained
        * (
            BYTES["bf16" if training.optimizer_outer.bf16_momentum else "fp32"]
            + BYTES[model.param_dtype]
        ),
        gradients=trained * BYTES[model.param_dtype] * (1 + (training.accum_steps > 1 or meta)),
        gathered=_gathered(model, training, sizes, devices),
        kept_blocks=tokens * kept,
        block=_block_work(model, model.remat_prefix, tokens, sequences, prime=prime)
        if whole
        else 0,
        loss=0 if meta else _loss_work(model, training, sequences),
        learning=learning_memory(model, training, sequences, devices.state_parallel).total
        if meta
        else 0,
    )


def _gathered(
    model: ModelConfig, training: TrainingConfig, sizes: dict[str, int], devices: Devices
) -> int:
    """Bytes of weights that are whole while they are used, and of their gradients.

    For all of a microbatch: embedding and head, and the suffix where it runs chunk by chunk. For
    its turn: one block of the others.
    """
    if devices.sharding != "fsdp" or devices.data == 1:
        return 0
    meta = training.train_mode == "meta"
    by_turns = ("prefix_blocks",) if meta else ("prefix_blocks", "suffix_blocks")
    stacks = {stack: _selected(sizes, [f"**.{stack}.**"]) for stack in by_turns}
    layers = {
        "prefix_blocks": model.num_hidden_layers - model.suffix_len,
        "suffix_blocks": model.suffix_len,
    }
    all_along = {n: s for n, s in sizes.items() if not any(n in stack for stack in stacks.values())}
    one = (devices.held(s, whole=True) // max(1, layers[k]) for k, s in stacks.items())
    numbers = devices.held(all_along, whole=True) + max(one)
    return 2 * numbers * BYTES[model.param_dtype]


# In the backward pass of a chunk: copies of fast weights (before and after the step, their
# gradient, cotangents), of caches and of logits; and how often the intermediates are there: values
# and tangents, or values, what the inner gradient keeps, and both again for its own derivative.
_FAST_COPIES = 5
_CACHE_COPIES = 2
_LOGIT_COPIES = 3
_INTERMEDIATES = {"forward_over_reverse": 2, "reverse_over_reverse": 4}


def learning_memory(
    model: ModelConfig, training: TrainingConfig, sequences: int, state_parallel: int = 1
) -> Learning:
    """What `meta` adds for `sequences` sequences at a time."""
    chunks, group = training.seq_length // model.mini_batch_size, training.inner_remat_freq
    state = state_memory(model, training.spec_inner)
    fast, caches = (sequences * size // state_parallel for size in state)
    tokens = sequences * model.mini_batch_size
    stream = sequences * training.seq_length * model.hidden_size * BYTES[model.compute_dtype]
    policy = model.remat_suffix
    kept = model.suffix_len * _kept(model, policy, prime=model.prime)
    work = _block_work(model, policy, tokens, sequences, prime=model.prime)
    return Learning(
        fast_weights=fast,
        caches=caches,
        states=(fast + caches) * (-(-chunks // group) + (group - 1)),
        sequence=2 * stream,
        working=_FAST_COPIES * fast + _CACHE_COPIES * caches,
        chunk=_INTERMEDIATES[training.inner_gradient] * (tokens * kept + work)
        + _LOGIT_COPIES * _logits(model, tokens),
    )


def _sequences(training: TrainingConfig, devices: Devices) -> int:
    """Sequences of a microbatch on one device."""
    microbatch = training.global_batch_size // training.accum_steps
    if devices.count < 1 or microbatch % devices.data:
        raise UserError(
            f"devices={devices.count}: they share {microbatch} sequences at a time "
            "(global_batch_size / accum_steps); take a number of devices that divides it, or "
            "change the batch"
        )
    return microbatch // devices.data


# Numbers per token that lie within a block, by half, as the slopes by depth of what XLA's CPU
# compiler reserves show: those in the compute dtype, as wide as the model or as an MLP, and those
# that are float32 (norms, rotation), as wide as the model.
_IN_ATTENTION = {"model": 7, "mlp": 0, "wide": 14}
_IN_AN_MLP = {"model": 0, "mlp": 6, "wide": 5}


def _kept(model: ModelConfig, policy: str, *, prime: bool) -> int:
    """Bytes per token that a block keeps for its backward pass."""
    width, inner, mlps = model.hidden_size, model.intermediate_size, 1 + prime
    if policy == "none":
        return sum(_intermediates(model, prime=prime))
    narrow = {
        "dots": (6 + mlps) * width + 2 * inner * mlps,
        "attention": 2 * width,
        "block": width,
        "chunk": 2 * width,
    }[policy]
    return narrow * BYTES[model.compute_dtype]


def _intermediates(model: ModelConfig, *, prime: bool) -> tuple[int, int]:
    """Bytes per token of all that lies within (attention, MLPs), scores aside."""

    def size(of: dict[str, int]) -> int:
        narrow = of["model"] * model.hidden_size + of["mlp"] * model.intermediate_size
        wide = of["wide"] * model.hidden_size
        return narrow * BYTES[model.compute_dtype] + wide * BYTES["fp32"]

    return size(_IN_ATTENTION), (1 + prime) * size(_IN_AN_MLP)


def _block_work(
    model: ModelConfig, policy: str, tokens: int, sequences: int, *, prime: bool
) -> int:
    """Bytes of one block's backward pass over `tokens` of whole sequences, or of chunks.

    All of its intermediates and one block of scores; with the policy `chunk`, those of the MLPs for
    one chunk alone.
    """
    attention, mlps = _intermediates(model, prime=prime)
    scores = 2 * _scores(model, tokens // sequences, sequences)
    chunk = sequences * model.mini_batch_size
    return tokens * attention + (chunk if policy == "chunk" else tokens) * mlps + scores


def _scores(model: ModelConfig, length: int, sequences: int) -> int:
    """Bytes of the scores that are in memory together, over `length` tokens of each sequence."""
    queries, keys = _queries(model, length), keys_in_block(model, length)
    if length > model.mini_batch_size or model.seq_modeling_block == "self_attention":
        if model.attention == "cudnn":  # never leave the chip
            return 0
        if model.attention == "naive":
            windowed = model.seq_modeling_block == "self_attention"
            queries = keys = min(model.mini_batch_size, length) if windowed else length
    return sequences * model.num_attention_heads * queries * keys * BYTES["fp32"]


def _loss_work(model: ModelConfig, training: TrainingConfig, sequences: int) -> int:
    """Bytes of the plain loss and its backward pass, at most 1024 tokens of a sequence at a time.

    With the vocabulary in blocks, the gradient of the table is there three times.
    """
    logits = _logits(model, sequences * min(1024, training.seq_length))
    if not _logits_twice(model):
        return 2 * logits
    table = model.vocab_size * model.hidden_size * BYTES[model.param_dtype]
    return 4 * logits + 3 * table


def _logits(model: ModelConfig, tokens: int) -> int:
    """Bytes of the logits of so many tokens that are in memory together."""
    return tokens * min(model.loss_block or model.vocab_size, model.vocab_size) * BYTES["fp32"]


# ---- a run -------------------------------------------------------------------------------


def devices_of(config: Config, count: int) -> Devices:
    """So many devices, shared as the configuration says."""
    return Devices(count, config.backend.sharding, config.backend.state_parallel)


def summary(
    config: Config, count: int = 1, *, beside: Config | None = None
) -> dict[str, dict[str, Any]]:
    """Section -> name -> value of a run on `count` devices: FLOPs, memory in bytes on each.

    `beside` is a run with full attention whose training FLOPs are shown for comparison. Raises
    UserError as `memory` does.
    """
    model, training = config.model, config.training
    tokens = training.global_batch_size * training.seq_length
    step, program = model_flops(model, training), hardware_flops(model, training)
    flops = {
        "forward": forward_flops(model, training.seq_length).total,
        "evaluation": reading_flops(model, training.seq_length, _learned(training)).total,
        "training": step.total,
        "training, as run": program.total,
    }
    if beside is not None and model.seq_modeling_block != "self_attention":
        other = model_flops(beside.model, beside.training).total
        flops |= {"training, full attention": other, "of full attention": step.total / other}
    devices = devices_of(config, count)
    used = memory(model, training, devices)
    sections = {
        "run": {
            "name": training.exp_name,
            "model": model.name,
            "mode": training.train_mode,
            "mixer": model.seq_modeling_block,
        },
        "parameters": asdict(parameters(model)) | {"total": parameters(model).total},
        "tokens": {
            "per sequence": training.seq_length,
            "per step": tokens,
            "steps": training.total_steps,
            "in total": tokens * training.total_steps,
        },
        "FLOPs per token": flops,
        "FLOPs per token of training, by part": {k: float(v) for k, v in asdict(step).items()},
        "FLOPs": {
            "per step": tokens * step.total,
            "per step, as run": tokens * program.total,
            "in total": tokens * training.total_steps * step.total,
        },
        "memory per device": asdict(used) | {"peak": used.total},
    }
    if training.train_mode == "meta":
        learning = learning_memory(
            model, training, _sequences(training, devices), devices.state_parallel
        )
        sections["parameters"]["fast"] = fast_parameters(model, training.spec_inner)
        sections["memory per device, learning by part"] = asdict(learning)
    return sections


def readable(section: str, value: Any) -> str:
    """A value of `summary` for a reader: bytes as MB, counts with commas, FLOPs in short."""
    if section.startswith("memory"):
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


# ---- accelerators ------------------------------------------------------------------------

# Dense bf16 operations per second as the makers state them, by what a device's kind contains; the
# first that matches.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,  # GH200 too
    "B200": 2.25e15,  # GB200 too
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def speed(
    model: ModelConfig, training: TrainingConfig, seconds: float, devices: int, kind: str
) -> dict[str, float]:
    """Of a training step that takes so long: model TFLOP/s of a device, and MFU if it is known.

    kind: of the devices, as in `peak_flops`.
    """
    tokens = training.global_batch_size * training.seq_length
    rate = tokens * model_flops(model, training).total / seconds / devices
    peak = peak_flops(kind, model.compute_dtype)
    return {"model_tflops_per_second": rate / 1e12} | ({"mfu": rate / peak} if peak else {})


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations per second that a device can do in `dtype`, such as bf16; None if not known.

    `device_kind` is what JAX calls the device, such as "NVIDIA H200".
    """
    known = (peak for name, peak in _PEAKS.items() if name in device_kind)
    return next(known, None) if dtype == "bf16" else None
