"""Bytes of a training step in closed form, from a configuration alone. No JAX."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from ttt.knobs import ModelConfig, TrainingConfig
from ttt.mixers import Mixer
from ttt.plan.flops import block_of_queries, logits_twice, mixed_together
from ttt.plan.parameters import (
    BlockKind,
    Parameter,
    block_kinds,
    block_weights,
    count,
    parameters,
    selected,
)
from ttt.plan.sharding import ONE_DEVICE, DeviceSharding

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device. Of the last three, one is needed at a time."""

    parameters: int
    optimizer: int
    """Both moments of AdamW; of matrices that Muon trains, the one."""
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


@dataclass(frozen=True)
class LearningMemory:
    """Bytes that learning while reading takes on one device, for its sequences."""

    fast_weights: int
    """One copy."""
    caches: int
    """The states of the suffix's mixers, one copy."""
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


def memory(
    model: ModelConfig, training: TrainingConfig, devices: DeviceSharding = ONE_DEVICE
) -> Memory:
    """The predicted peak of a training step on each of `devices`.

    Parameters, moments and gradients are divided as the sharding says. Of the rest,
    `state_parallel` divides fast weights and caches here, and no more: the prediction is high.

    Intermediates are as XLA's CPU compiler lays them out: on small shapes the peak is within a
    quarter of its own figure (tests/test_costs.py). A GPU's compiler fuses more of them; the
    prediction has not been compared with one.

    Raises UserError if the devices do not divide a microbatch.
    """
    sequences = devices.sequences(training)
    tokens = sequences * training.seq_length
    meta = training.train_mode == "meta"
    by_turns = [kind for kind in block_kinds(model) if not meta or kind.stack == "prefix"]
    outer, chosen = training.optimizer_outer, selected(model, training.spec_outer)
    trained = devices.held(chosen)
    squared = devices.held(p for p in chosen if outer.optimizer_type != "muon" or not p.in_muon)
    # Under `chunk` a block that sees the whole sequence keeps its input alone.
    policy = "block" if model.remat_prefix == "chunk" else model.remat_prefix
    # Nothing is kept of blocks before the first trained weight: no gradient goes there.
    behind = (".suffix_blocks.", ".ln_f.", ".lm_head.")
    frozen = all(any(part in p.name for part in behind) for p in chosen)
    kept = [kind for kind in by_turns if kind.stack == "suffix" or not frozen]
    size = _BYTES[model.param_dtype]
    moment = _BYTES["bf16" if outer.bf16_momentum else "fp32"]
    return Memory(
        parameters=devices.held(parameters(model)) * size,
        optimizer=trained * moment + squared * size,
        gradients=trained * size * (1 + (training.accum_steps > 1 or meta)),
        gathered=_gathered(model, by_turns, devices),
        kept_blocks=tokens * sum(kind.layers * _kept(model, policy, kind) for kind in kept),
        block=max(
            (_block_work(model, model.remat_prefix, kind, tokens, sequences) for kind in by_turns),
            default=0,
        ),
        loss=0 if meta else _loss_work(model, training, sequences),
        learning=learning_memory(model, training, devices).total if meta else 0,
    )


def _gathered(model: ModelConfig, by_turns: list[BlockKind], devices: DeviceSharding) -> int:
    """Bytes of weights that are whole while they are used, and of their gradients.

    For its turn: one block of `by_turns`. For all of a microbatch: all other weights.
    """
    if devices.sharding != "fsdp" or devices.data == 1:
        return 0
    stacks = {f".{kind.stack}_blocks." for kind in by_turns}
    others = [p for p in parameters(model) if not any(stack in p.name for stack in stacks)]
    one = (
        devices.held(
            (Parameter(name, w) for name, w in block_weights(model, kind).items()), whole=True
        )
        for kind in by_turns
    )
    numbers = devices.held(others, whole=True) + max(one, default=0)
    return 2 * numbers * _BYTES[model.param_dtype]


# ---- learning while reading ----------------------------------------------------------------

# In the backward pass of a chunk: copies of fast weights (before and after the step, their
# gradient, cotangents), of caches and of logits; and how often the intermediates are there: values
# and tangents, or values, what the inner gradient keeps, and both again for its own derivative.
_FAST_COPIES = 5
_CACHE_COPIES = 2
_LOGIT_COPIES = 3
_INTERMEDIATES = {"forward_over_reverse": 2, "reverse_over_reverse": 4}


def state_memory(model: ModelConfig, spec_inner: Iterable[str], context: int) -> tuple[int, int]:
    """Bytes of (fast weights, mixer states) of one sequence of `context` tokens in the suffix."""
    fast = count(selected(model, tuple(spec_inner))) * _BYTES[model.state_dtype]
    states = sum(
        kind.layers * kind.mixer.state_size(context)
        for kind in block_kinds(model)
        if kind.stack == "suffix"
    )
    return fast, states * _BYTES[model.compute_dtype]


def learning_memory(
    model: ModelConfig, training: TrainingConfig, devices: DeviceSharding = ONE_DEVICE
) -> LearningMemory:
    """What `meta` adds on each of `devices`."""
    sequences = devices.sequences(training)
    length, policy, group = training.seq_length, model.remat_suffix, training.inner_remat_freq
    chunks, tokens = length // model.mini_batch_size, sequences * model.mini_batch_size
    state = state_memory(model, training.spec_inner, length)
    fast, caches = (sequences * size // devices.state_parallel for size in state)
    suffix = [kind for kind in block_kinds(model) if kind.stack == "suffix"]
    kept = tokens * sum(kind.layers * _kept(model, policy, kind) for kind in suffix)
    work = max(_block_work(model, policy, kind, tokens, sequences) for kind in suffix)
    return LearningMemory(
        fast_weights=fast,
        caches=caches,
        states=(fast + caches) * (-(-chunks // group) + (group - 1)),
        sequence=2 * sequences * length * model.hidden_size * _BYTES[model.compute_dtype],
        working=_FAST_COPIES * fast + _CACHE_COPIES * caches,
        chunk=_INTERMEDIATES[training.inner_gradient] * (kept + work)
        + _LOGIT_COPIES * _logits(model, tokens),
    )


# ---- reading -------------------------------------------------------------------------------

# While a model reads, memory is the weights and little more: bounds for what a chunk's gradient
# keeps, and for the logits and the queries that are in work together.
_KEPT_WHILE_READING = 64_000_000
_SHARE_WHILE_READING = 1 / 8
_LOGITS_WHILE_READING = 1 << 25
_QUERIES_WHILE_READING = 512


def for_reading(model: ModelConfig, *, learns: bool) -> ModelConfig:
    """The settings of memory with which a model reads a chunk, one sequence at a time.

    The same function in a little more than its weights: of the suffix's policies the one that
    recomputes least among those that keep at most 64 MB, or an eighth of the parameters; logits in
    blocks of at most 32 MB; 512 queries at a time unless the model states a block.
    """
    chunk = model.mini_batch_size
    most = int(_LOGITS_WHILE_READING / (chunk * _BYTES["fp32"]))
    block = min(model.loss_block or model.vocab_size, most)
    return replace(
        model,
        remat_prefix="none",
        remat_suffix=_policy_for_reading(model) if learns else "none",
        attention_block=model.attention_block or math.gcd(chunk, _QUERIES_WHILE_READING),
        loss_block=0 if block >= model.vocab_size else max(1, block),
    )


def _policy_for_reading(model: ModelConfig) -> str:
    size = count(parameters(model)) * _BYTES[model.param_dtype]
    most = max(_KEPT_WHILE_READING, _SHARE_WHILE_READING * size)
    suffix = [kind for kind in block_kinds(model) if kind.stack == "suffix"]

    def kept(policy: str) -> int:
        return model.mini_batch_size * sum(k.layers * _kept(model, policy, k) for k in suffix)

    policies = ("none", "dots", "attention")
    return next((policy for policy in policies if kept(policy) <= most), "block")


# ---- blocks and loss -----------------------------------------------------------------------


def _kept(model: ModelConfig, policy: str, kind: BlockKind) -> int:
    """Bytes per token that a block keeps for its backward pass."""
    if policy == "none":
        return sum(_intermediates(model, kind))
    width = model.hidden_size
    products = (w.shape[-1] for w in block_weights(model, kind).values() if len(w.shape) > 1)
    narrow = {
        "dots": width + kind.mixer.result + sum(products),
        "attention": width + kind.mixer.result,
        "block": width,
        "chunk": 2 * width,
    }[policy]
    return narrow * _BYTES[model.compute_dtype]


def _intermediates(model: ModelConfig, kind: BlockKind) -> tuple[int, int]:
    """Bytes per token of all that lies within (mixer and its norms, MLPs and theirs), scores aside.

    How many there are is what the slopes by depth of the memory show that XLA's CPU compiler
    reserves; the norms compute in float32.
    """
    width, inner = model.hidden_size, model.intermediate_size
    compute, wide = _BYTES[model.compute_dtype], _BYTES["fp32"]
    own, own_wide = kind.mixer.intermediates()
    mixer = (3 * width + own) * compute + (4 * width + own_wide) * wide
    return mixer, (1 + kind.prime) * (6 * inner * compute + 5 * width * wide)


def _block_work(
    model: ModelConfig, policy: str, kind: BlockKind, tokens: int, sequences: int
) -> int:
    """Bytes of one block's backward pass over `tokens` of whole sequences, or of chunks.

    All of its intermediates and one block of scores; with the policy `chunk`, those of the MLPs for
    one chunk alone.
    """
    mixer, mlps = _intermediates(model, kind)
    scores = 2 * sequences * _scores(model, kind.mixer, tokens // sequences) * _BYTES["fp32"]
    chunk = sequences * model.mini_batch_size
    return tokens * mixer + (chunk if policy == "chunk" else tokens) * mlps + scores


def _scores(model: ModelConfig, mixer: Mixer, length: int) -> int:
    """Numbers in the scores of `length` tokens that are in memory together."""
    together = mixed_together(model, length)
    if length > model.mini_batch_size or mixer.grows:  # whole sequences: any program may serve
        if model.attention == "cudnn":  # its scores never leave the chip
            return 0
        if model.attention == "naive":
            return mixer.scores(together, None)
    return mixer.scores(together, block_of_queries(model, length))


def _loss_work(model: ModelConfig, training: TrainingConfig, sequences: int) -> int:
    """Bytes of the plain loss and its backward pass, at most 1024 tokens of a sequence at a time.

    With the vocabulary in blocks, the gradient of the table is there three times.
    """
    logits = _logits(model, sequences * min(1024, training.seq_length))
    if not logits_twice(model):
        return 2 * logits
    table = model.vocab_size * model.hidden_size * _BYTES[model.param_dtype]
    return 4 * logits + 3 * table


def _logits(model: ModelConfig, tokens: int) -> int:
    """Bytes of the logits of so many tokens that are in memory together."""
    return tokens * min(model.loss_block or model.vocab_size, model.vocab_size) * _BYTES["fp32"]
