"""Every knob of the framework, as frozen dataclasses without JAX.

Hydra composes `configs/` into a DictConfig (`compose`); `resolve` turns it into a `Config` once,
and reports every fault at once. Key names are those that users know from the paper's code; units
and rules stand beside each field, rules between fields in `_RELATIONS`.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttt.errors import UserError
from ttt.globs import is_glob, matches

ATTENTION_BACKENDS = ("auto", "blocks", "naive", "cudnn")
MIXERS = ("self_attention", "SWA")
FEED_FORWARDS = ("swiglu",)
DTYPES = ("fp32", "bf16")
TRAIN_MODES = ("pretrain", "meta")
LOAD_PARTS = ("none", "params", "all")
WIDTH_POLICIES = ("narrow", "full")
PRIME_INITS = ("inherit", "copy", "zero_gain", "zero_down", "small_gain", "small_write", "random")
RUNTIME_MODES = ("jax", "token_stats", "simulate")
INNER_GRADIENTS = ("forward_over_reverse", "reverse_over_reverse")
REMAT_POLICIES = ("none", "dots", "attention", "block", "chunk")
REMAT_CHOICES = ("auto", *REMAT_POLICIES)
PLATFORMS = ("auto", "cpu", "cuda", "tpu")
SHARDINGS = ("replicated", "fsdp")
OUTER_OPTIMIZERS = ("adamw",)
INNER_OPTIMIZERS = ("sgd",)
BENCHMARK_CALLS = (
    *("train_step", "gradient", "prefill", "evaluate"),
    *("decode", "decode_between_steps"),
)
SUITES = ("loss_by_context", "needles", "long_decoding")
NEEDLE_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3")


# ---- rules on one value --------------------------------------------------------------


class Rule(NamedTuple):
    """What a value must satisfy; `says` gives the rule and the remedy."""

    holds: Callable[[Any], bool]
    says: str
    names: Sequence[str] = ()
    """The names that hold, where they are few: a near miss is pointed out."""


def _one_of(names: Sequence[str]) -> Rule:
    return Rule(lambda v: v in names, f"must be one of {', '.join(names)}; choose one", names)


def _some_of(names: Sequence[str]) -> Rule:
    return Rule(
        lambda v: bool(v) and set(v) <= set(names) and len(set(v)) == len(v),
        f"must be some of {', '.join(names)}, each once; choose from them",
    )


def _is_folder_name(name: str) -> bool:
    return name == name.strip() and name not in ("", ".", "..") and not set(name) & set("/\\\0")


_ONE_FOLDER = "must name one folder; give it no '/', no '\\' and no blanks at its ends"
_NOT_NEGATIVE = Rule(lambda v: v >= 0, "must not be negative; raise it to 0 or more")

Count = Annotated[int, Rule(lambda v: v >= 1, "must be at least 1; raise it")]
Natural = Annotated[int, _NOT_NEGATIVE]
Positive = Annotated[float, Rule(lambda v: v > 0, "must be above 0; raise it")]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Share = Annotated[float, Rule(lambda v: 0 < v <= 1, "must lie in (0, 1]; change it")]
Fraction = Annotated[float, Rule(lambda v: 0 <= v < 1, "must lie in [0, 1); change it")]
Step = Annotated[int, Rule(lambda v: v >= -1, "must be a step or -1 (the latest); set it to -1")]
ProcessId = Annotated[int, Rule(lambda v: v >= -1, "must be 0 or more, or -1 for none; set it")]
FolderName = Annotated[str, Rule(_is_folder_name, _ONE_FOLDER)]
MaybeFolderName = Annotated[str, Rule(lambda v: v == "" or _is_folder_name(v), _ONE_FOLDER)]
Globs = Annotated[
    tuple[str, ...],
    Rule(
        lambda globs: bool(globs) and all(map(is_glob, globs)),
        "must be dotted globs of letters, digits, '_' and '*', with '**' on its own; "
        "write them like ['**.feed_forward_prime.**']",
    ),
]
Lengths = Annotated[
    tuple[int, ...],
    Rule(lambda lengths: all(n >= 1 for n in lengths), "must be 1 or more each; raise them"),
]
TokenIds = Annotated[
    tuple[int, ...],
    Rule(lambda ids: all(i >= 0 for i in ids), "must be 0 or more each; raise them"),
]
FolderNames = Annotated[
    tuple[str, ...],
    Rule(
        lambda names: all(map(_is_folder_name, names)) and len(set(names)) == len(names),
        "must name folders, each once, without '/', '\\' and blanks at their ends; correct them",
    ),
]
BenchmarkCalls = Annotated[tuple[str, ...], _some_of(BENCHMARK_CALLS)]
Suites = Annotated[tuple[str, ...], _some_of(SUITES)]
NeedleTasks = Annotated[tuple[str, ...], _some_of(NEEDLE_TASKS)]
Mixer = Annotated[str, _one_of(MIXERS)]
FeedForward = Annotated[str, _one_of(FEED_FORWARDS)]
DType = Annotated[str, _one_of(DTYPES)]
TrainMode = Annotated[str, _one_of(TRAIN_MODES)]
LoadPart = Annotated[str, _one_of(LOAD_PARTS)]
WidthPolicy = Annotated[str, _one_of(WIDTH_POLICIES)]
PrimeInit = Annotated[str, _one_of(PRIME_INITS)]
RuntimeMode = Annotated[str, _one_of(RUNTIME_MODES)]
InnerGradient = Annotated[str, _one_of(INNER_GRADIENTS)]
AttentionBackend = Annotated[str, _one_of(ATTENTION_BACKENDS)]
RematPolicy = Annotated[str, _one_of(REMAT_CHOICES)]
Platform = Annotated[str, _one_of(PLATFORMS)]
Sharding = Annotated[str, _one_of(SHARDINGS)]
EvaluationDType = Annotated[str, _one_of(("model", *DTYPES))]
OuterOptimizer = Annotated[str, _one_of(OUTER_OPTIMIZERS)]
InnerOptimizer = Annotated[str, _one_of(INNER_OPTIMIZERS)]


# ---- the knobs -----------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The network (METHOD.md, section 1)."""

    name: str
    vocab_size: Count
    bos_token_id: Natural
    """Starts a document; a target that equals it is not scored."""
    eos_token_id: Natural
    hidden_size: Count
    intermediate_size: Count
    """Width of every MLP, prime MLPs included."""
    width_policy: WidthPolicy
    """How an E2E model comes by that width (docs/warm_start.md). `narrow`: as many parameters as
    without prime MLPs, as published; `full`: the width of a model without them, so that such a
    parent's function is kept."""
    num_hidden_layers: Count
    num_attention_heads: Count
    mini_batch_size: Count
    """Tokens in a chunk: the span of one test-time step, and of one loss mean."""
    sliding_window_size: Count
    """Keys that a query of `SWA` sees, itself included."""
    seq_modeling_block: Mixer
    suffix_len: Natural
    """Last blocks that run chunk by chunk; they hold the prime MLPs."""
    prime: bool
    """Whether the suffix blocks have prime MLPs."""
    feed_forward_prime: FeedForward
    rope_theta: Positive
    rms_norm_eps: Positive
    initializer_range: Positive
    """Standard deviation of the initial weights."""
    qk_norm: bool
    pre_norm: bool
    post_norm: bool
    tie_word_embeddings: bool
    compute_dtype: DType
    """Of matrix products."""
    param_dtype: DType
    """Of stored parameters."""
    state_dtype: DType
    """Of fast weights and the test-time step."""
    attention: AttentionBackend
    """Program for attention; `auto`: cuDNN for whole sequences where it serves, else blocks."""
    attention_block: Natural
    """Queries whose scores are in memory together; 0: those of a chunk."""
    loss_block: Natural
    """Vocabulary entries whose logits are in memory together; 0: all, and kept."""
    remat_prefix: RematPolicy
    """What a prefix block (any block, in `pretrain`) keeps for its backward pass.

    `auto`, here and below: the cheapest choice whose predicted peak fits (ttt/bench/plan.py)."""
    remat_suffix: RematPolicy
    """What a suffix block keeps for its backward pass within a chunk."""


@dataclass(frozen=True)
class OptimizerInnerConfig:
    """The test-time step (METHOD.md, section 3)."""

    optimizer_type: InnerOptimizer
    lr: Positive
    clip_gradient: NotNegative
    """Bound of the global norm over all fast weights; 0: none."""


@dataclass(frozen=True)
class OptimizerOuterConfig:
    """The training step (METHOD.md, section 4)."""

    optimizer_type: OuterOptimizer
    lr: Positive
    init_lr: NotNegative
    end_lr: NotNegative
    lr_warmup_steps: Natural
    lr_decay_steps: Count
    b1: Fraction
    b2: Fraction
    weight_decay: NotNegative
    emb_wd: bool
    """Whether weight decay takes the embedding too."""
    clip_gradient: NotNegative
    """Bound of the global gradient norm; 0: none."""
    bf16_momentum: bool


@dataclass(frozen=True)
class TrainingConfig:
    """One run: data, schedule, where it starts from, what it leaves behind."""

    exp_folder: FolderName
    exp_name: FolderName
    runtime_mode: RuntimeMode
    """`jax`: train the model; `token_stats`: a count model in its place, on the same data;
    `simulate`: compute nothing, and leave a record and a checkpoint that say so."""
    train_mode: TrainMode
    """`meta`: test-time training inside the loss; `pretrain`: plain next-token prediction."""
    dataset_name: str
    """A key of `deploy_paths.data`."""
    data_split: FolderName
    eval_split: FolderName
    dummy_dataset: bool
    """Seeded random tokens in place of the store, for smoke tests and timings."""
    seq_length: Count
    global_batch_size: Count
    """Sequences per outer step, over all hosts and microbatches."""
    accum_steps: Count
    eval_batch_size: Count
    total_steps: Count
    model_seed: Natural
    data_seed: Natural
    spec_inner: Globs
    """Dotted globs of the fast weights."""
    spec_outer: Globs
    """Dotted globs of the parameters that the outer loop trains."""
    optimizer_inner: OptimizerInnerConfig
    optimizer_outer: OptimizerOuterConfig
    ilr_init: NotNegative
    ilr_warmup_steps: Natural
    inner_gradient: InnerGradient
    """How the outer gradient passes the test-time steps; both are exact."""
    inner_remat_freq: Natural
    """Chunks that share one stored carry in the backward pass; 0: chosen as `auto` is."""
    eval_every_steps: Natural
    """0: only at the end."""
    eval_batches: Natural
    """Batches of the evaluation split to score; 0: all of it."""
    eval_start_batches: Count
    """Batches of the evaluation split to score before the first step, by the parent too."""
    count_model_tokens: Natural
    """A count model of so many tokens, the first of the training order, is scored beside the
    trained model in the end; 0: none is."""
    save_every_steps: Natural
    """0: only at the end."""
    save_every_minutes: NotNegative
    """Minutes between two checkpoints at most; 0: steps alone decide."""
    save_milestone_freq: Natural
    """Every so many steps a checkpoint is kept for good; 0: none."""
    keep_checkpoints: Count
    """Latest checkpoints that stay beside the milestones."""
    skip_bad_steps: Natural
    """Steps in a row to leave out if their loss or gradient is not finite; one more ends it."""
    load_part: LoadPart
    """What to take from `resume_exp_name` at step 0: nothing, the parameters, or all the state."""
    prime_init: PrimeInit
    """How prime MLPs begin that a parent has not (ttt/model/warm_start.py)."""
    resume_exp_folder: FolderName
    resume_exp_name: MaybeFolderName
    resume_step: Step
    """-1: the latest."""
    allow_config_change: bool
    """Continue this run's own checkpoint though settings that change its numbers differ."""
    log_wandb: bool
    wandb_entity: str
    wandb_project: str
    wandb_key: str
    """Prefer the environment variable WANDB_API_KEY; masked in every record."""


@dataclass(frozen=True)
class DeployPathsConfig:
    """Where things lie on this machine."""

    data: Mapping[str, str]
    """Dataset name -> root of its token store."""
    checkpoint: str
    experiments: str


@dataclass(frozen=True)
class BackendConfig:
    """The hardware, and how JAX is started on it."""

    platform: Platform
    distributed: bool
    """Start jax.distributed (one process per host) before the first computation."""
    coordinator_address: str
    """HOST:PORT of process 0, where no cluster tells it (such as Slurm); empty: it does."""
    num_processes: Natural
    """Processes of the run, with `coordinator_address`; 0: none is given."""
    process_id: ProcessId
    """Of this process, from 0, with `coordinator_address`; -1: none is given."""
    sharding: Sharding
    """`replicated`: every device has all parameters and optimizer state; `fsdp`: the devices along
    `data` share them, and gather a layer's weights when they use them."""
    state_parallel: Count
    """Devices that share each tensor of their sequences, fast weights included (the mesh axis
    `state`); the others divide the batch."""
    fake_devices: Natural
    """CPU devices to pretend, for tests of sharding; 0: the real ones."""
    memory_gb: NotNegative
    """What a training step may take on each device, in 1e9 bytes; 0: most of what there is."""
    compilation_cache_dir: str
    """Persistent cache of compiled programs; empty: none."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What the command `benchmark` measures: every variant, call and context."""

    exp_name: FolderName
    """Names the record, in place of `training.exp_name`."""
    variants: Mapping[str, str]
    """Name -> overrides, apart by blanks, on top of the command line's; none: that alone."""
    calls: BenchmarkCalls
    """`gradient`: loss and outer gradient; `train_step`: the optimizer too; `prefill`: reading
    (and learning) up to the last token's prediction; `evaluate`: every token's loss; `decode`:
    writing a chunk's tokens after the context, its step included; `decode_between_steps`: fewer
    tokens, and no step."""
    contexts: Lengths
    """Values of `training.seq_length`; none: the one that it has."""
    tokens: Natural
    """Tokens per call, in as many sequences as they fill; 0: `training.global_batch_size` ones."""
    warmup: Count
    """Calls of each variant that are not timed."""
    repetitions: Count
    """Timed calls of each variant."""


@dataclass(frozen=True)
class LossByContextConfig:
    """Loss by token position, the same text cut into contexts of several lengths."""

    contexts: Lengths
    """Tokens per sequence; none: half of `training.seq_length`, it, and twice it."""
    tokens: Count
    """Held-out tokens, from the split's start, that are scored at every context."""


@dataclass(frozen=True)
class NeedlesConfig:
    """RULER's single needles in a haystack."""

    tasks: NeedleTasks
    lengths: Lengths
    """Tokens of a prompt and its answer together; none: `training.seq_length`."""
    depths: Count
    """Places of the needle, evenly spread from the haystack's start (0 %) to its end (100 %)."""
    samples: Count
    """Prompts per task, length and depth."""
    tokens_to_generate: Count
    haystack: str
    """File with the text of `niah_single_2` and `_3` (plain, or JSON with a `text`); empty: the
    docstrings of the standard library's held-out modules."""


@dataclass(frozen=True)
class LongDecodingConfig:
    """Text that the model goes on writing, judged by an evaluator."""

    prefill: Count
    """Held-out tokens to read."""
    decode: Count
    """Tokens to write after them."""
    sequences: Count
    temperature: NotNegative
    top_p: Share
    repetition_penalty: Positive
    evaluator: str
    """Who judges: a run of `training.exp_folder`, or `hf:FOLDER` of a Hugging Face causal LM;
    empty: the first of the runs."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What the command `evaluate` measures."""

    name: FolderName
    """Names the results."""
    runs: FolderNames
    """Runs in `training.exp_folder`; none: `training.exp_name`."""
    step: Step
    """Of their checkpoints; -1: the latest of each."""
    suites: Suites
    dataset_name: str
    """A key of `deploy_paths.data`: held-out text, and the tokenizer where `tokenizer` is empty."""
    split: FolderName
    tokenizer: str
    """`bytes` or a `tokenizers` JSON file; empty: the one that the token store names."""
    batch_size: Count
    """Sequences in memory together."""
    without_learning: bool
    """Whether a model that learns while it reads is also measured at inner rate 0."""
    compute_dtype: EvaluationDType
    """Of matrix products; `model`: the one that each run was trained with."""
    seed: Natural
    """Of needles, sampling and resampling."""
    resamples: Count
    """Draws of the bootstrap behind each interval."""
    loss_by_context: LossByContextConfig
    needles: NeedlesConfig
    long_decoding: LongDecodingConfig


@dataclass(frozen=True)
class GenerateConfig:
    """What the command `generate` reads and writes."""

    checkpoint: str
    """Another run than `training.exp_folder/exp_name`: FOLDER/NAME in the checkpoint root, or the
    path of a run's or a step's folder."""
    step: Step
    """-1: the latest."""
    tokenizer: str
    """`bytes` or a JSON file; empty: the one that made the dataset's token store."""
    prompt: str
    prompt_file: str
    """`-`: standard input, which is also read where no prompt and no state is given."""
    load_state: str
    """A saved state to go on from, in place of an empty one."""
    save_state: str
    """Where to save the state after all that was read and written; 0 new tokens: the prompt."""
    context: Natural
    """Most tokens under full attention, written ones included; 0: `training.seq_length`."""
    max_new_tokens: Natural
    temperature: NotNegative
    """0: the likeliest token, always."""
    top_k: Natural
    """Choose among so many of the likeliest; 0: all."""
    top_p: Share
    """Choose among the fewest of the likeliest that have this probability together."""
    repetition_penalty: Positive
    """Divides the positive logits of tokens that occurred, multiplies the negative; 1: none."""
    seed: Natural
    stop: TokenIds
    """Token ids after which nothing more is written."""
    learn: bool
    """Take test-time steps while reading and writing, where the model is trained for them."""
    compare: bool
    """Score the prompt without learning too, and again by the learned weights: two more passes."""


@dataclass(frozen=True)
class Config:
    """All of the above."""

    model: ModelConfig
    training: TrainingConfig
    deploy_paths: DeployPathsConfig
    backend: BackendConfig
    benchmark: BenchmarkConfig
    evaluation: EvaluationConfig
    generate: GenerateConfig


# ---- rules between values ------------------------------------------------------------


class Relation(NamedTuple):
    """A rule on the values of `keys` together; `says` gives the rule and the remedy."""

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    says: str


_OUTER = "training.optimizer_outer"
# What runs chunk by chunk and so can be fast; the model tells which of it there is.
_SUFFIX = "language_model.model.h.suffix_blocks"
_CAN_BE_FAST = (
    *(f"{_SUFFIX}.feed_forward_prime.{w}.weight" for w in ("w1", "w2", "w3")),
    *(f"{_SUFFIX}.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")),
    *(f"{_SUFFIX}.seq_modeling_block.{w}.weight" for w in ("wq", "wk", "wv", "wo")),
    *(f"{_SUFFIX}.seq_modeling_block.{norm}.weight" for norm in ("q_norm", "k_norm")),
    *(f"{_SUFFIX}.{part}{side}norm.weight" for part in ("seq_", "ffn_") for side in ("", "post_")),
    *(f"{_SUFFIX}.ffn_prime_{side}norm.weight" for side in ("", "post_")),
    "language_model.model.ln_f.weight",
    "language_model.lm_head.weight",
)


def _learns(mode: str, spec: tuple[str, ...]) -> bool:
    return mode != "meta" or any(matches(glob, name) for glob in spec for name in _CAN_BE_FAST)


_RELATIONS = (
    Relation(
        ("model.hidden_size", "model.num_attention_heads"),
        lambda width, heads: width % (2 * heads) == 0,
        "heads must have one even width; make hidden_size a multiple of 2 x num_attention_heads",
    ),
    Relation(
        ("model.suffix_len", "model.num_hidden_layers"),
        lambda suffix, layers: suffix <= layers,
        "the suffix is a part of the layers; lower suffix_len",
    ),
    *(
        Relation(
            (f"model.{token}_token_id", "model.vocab_size"),
            lambda token, vocab: token < vocab,
            "a token id must be below vocab_size; set both as the tokenizer has them",
        )
        for token in ("bos", "eos")
    ),
    Relation(
        ("training.seq_length", "model.mini_batch_size"),
        lambda length, chunk: length % chunk == 0,
        "a sequence must be whole chunks; make seq_length a multiple of mini_batch_size",
    ),
    Relation(
        ("model.mini_batch_size", "model.attention_block"),
        lambda chunk, block: block == 0 or chunk % block == 0,
        "a chunk must be whole blocks; make attention_block a divisor of mini_batch_size, or 0",
    ),
    Relation(
        ("training.global_batch_size", "training.accum_steps"),
        lambda batch, parts: batch % parts == 0,
        "microbatches must be equal; make global_batch_size a multiple of accum_steps",
    ),
    Relation(
        ("training.runtime_mode", "backend.distributed"),
        lambda mode, distributed: mode == "jax" or not distributed,
        "the light modes run in one process; set backend.distributed=false, or runtime_mode=jax",
    ),
    Relation(
        ("training.train_mode", "model.seq_modeling_block"),
        lambda mode, mixer: mode != "meta" or mixer == "SWA",
        "test-time training runs on sliding-window attention; set model.seq_modeling_block=SWA",
    ),
    Relation(
        ("training.train_mode", "model.suffix_len"),
        lambda mode, suffix: mode != "meta" or suffix > 0,
        "test-time training needs suffix blocks; raise suffix_len, or set train_mode=pretrain",
    ),
    Relation(
        ("training.train_mode", "model.prime"),
        lambda mode, prime: mode != "meta" or prime,
        "test-time training updates the prime MLPs; set model.prime=true, or train_mode=pretrain",
    ),
    Relation(
        ("training.train_mode", "training.spec_inner"),
        _learns,
        "no parameter of the suffix is matched; for the prime MLPs write "
        "['language_model.**.suffix_blocks.feed_forward_prime.**']",
    ),
    Relation(
        (f"{_OUTER}.lr_warmup_steps", f"{_OUTER}.lr_decay_steps"),
        lambda warmup, decay: warmup < decay,
        "the warm-up must end before the decay does; lower lr_warmup_steps or raise lr_decay_steps",
    ),
    *(
        Relation(
            (f"{_OUTER}.{end}", f"{_OUTER}.lr"),
            lambda end, peak: end <= peak,
            "the schedule cannot start or end above its peak; lower it or raise lr",
        )
        for end in ("init_lr", "end_lr")
    ),
    Relation(
        ("training.load_part", "training.resume_exp_name"),
        lambda part, name: (part == "none") == (name == ""),
        "loading needs a part and a run; set load_part=params (or all) and resume_exp_name=NAME, "
        "or load_part=none and resume_exp_name=''",
    ),
    Relation(
        ("training.dataset_name", "training.dummy_dataset", "deploy_paths.data"),
        lambda name, dummy, data: dummy or name in data,
        "this dataset has no place; add +deploy_paths.data.NAME=FOLDER, or name one that has",
    ),
    Relation(
        ("training.log_wandb", "training.wandb_project"),
        lambda log, project: not log or project != "",
        "W&B needs a project; set training.wandb_project=NAME or training.log_wandb=false",
    ),
    Relation(
        ("generate.prompt", "generate.prompt_file"),
        lambda prompt, file: not prompt or not file,
        "there can be one prompt; leave generate.prompt or generate.prompt_file empty",
    ),
    Relation(
        ("generate.stop", "model.vocab_size"),
        lambda ids, vocab: all(i < vocab for i in ids),
        "a stop token must be below vocab_size; write ids of the model's tokenizer",
    ),
    Relation(
        ("backend.fake_devices", "backend.platform"),
        lambda count, platform: count == 0 or platform in ("auto", "cpu"),
        "only CPU devices can be pretended; set backend.platform=cpu or backend.fake_devices=0",
    ),
    Relation(
        ("backend.coordinator_address", "backend.num_processes", "backend.process_id"),
        lambda address, count, number: (
            -1 < number < count if address else (count, number) == (0, -1)
        ),
        "a cluster by hand needs all three, process_id below num_processes; set all or none",
    ),
    Relation(
        ("backend.coordinator_address", "backend.distributed"),
        lambda address, distributed: not address or distributed,
        "processes must join to share a run; set backend.distributed=true",
    ),
    Relation(
        ("backend.state_parallel", "model.num_attention_heads", "model.intermediate_size"),
        lambda state, heads, inner: heads % state == 0 and inner % state == 0,
        "devices that share tensors must get whole heads and equal parts of the MLPs; "
        "make state_parallel a divisor of both",
    ),
)


# ---- from a composed DictConfig to a Config ------------------------------------------


class ConfigError(UserError):
    """All that is wrong with a configuration, fault by fault in `faults`."""

    def __init__(self, faults: Iterable[str]):
        self.faults: tuple[str, ...] = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        count = len(self.faults)
        lines = (f"  {i}. {fault}" for i, fault in enumerate(self.faults, 1))
        return "\n".join([f"{count} fault{'s' * (count > 1)} in the configuration:", *lines])


def resolve(cfg: DictConfig) -> Config:
    """Check `cfg` against every rule and freeze it.

    Raises ConfigError with all unknown or missing keys, wrong types and broken rules, or UserError
    if neither a model nor an experiment is named.
    """
    if all(OmegaConf.select(cfg, key) is None for key in ("model.name", "training.exp_name")):
        raise UserError(
            "no experiment named: add +experiment=NAME, such as "
            "+experiment=tiny/pretrain/pretrain-tiny-e2e; train --help says more. There are:\n"
            + _experiment_list()
        )
    values, faults = _read(cfg)
    for relation in _RELATIONS:
        present = {key: values[key] for key in relation.keys if key in values}
        if len(present) == len(relation.keys) and not relation.holds(*present.values()):
            shown = ", ".join(_show(key, value) for key, value in present.items())
            faults.append(f"{shown}: {relation.says}")
    if faults:
        raise ConfigError(faults)
    return _build(Config, values)


def _leaves(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every field below `section`."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


_LEAVES: dict[str, Any] = dict(_leaves(Config))
_RULE_INPUTS = frozenset({"size"})  # read by the rules in configs/, not by the framework
_SECRETS = frozenset({"training.wandb_key"})
_MASK = "***"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


# What a value must look like in YAML to be taken for a type; 1e6 is a whole number.
_TYPES: dict[Any, Rule] = {
    bool: Rule(lambda v: isinstance(v, bool), "must be true or false; choose one"),
    int: Rule(_is_whole, "must be a whole number; write one"),
    float: Rule(_is_number, "must be a finite number; write one"),
    str: Rule(lambda v: isinstance(v, str), "must be text; quote what looks otherwise: \"'123'\""),
    tuple[str, ...]: Rule(
        lambda v: isinstance(v, list) and _are_texts(v), "must be a list of texts; write [a,b]"
    ),
    tuple[int, ...]: Rule(
        lambda v: isinstance(v, list) and all(map(_is_whole, v)),
        "must be a list of whole numbers; write [1,2]",
    ),
    Mapping[str, str]: Rule(
        lambda v: isinstance(v, dict) and _are_texts(v.values()),
        "must be names with texts; write {a: b}",
    ),
}


class _FaultError(ValueError):
    """Rule and remedy for one value."""


def _read(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """Sound values by dotted key, and a fault for every other."""
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for key, kind in _LEAVES.items():
        try:
            value = OmegaConf.select(cfg, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if value is None:
                faults[key] = f"{key}=???: must be set; add {key}=VALUE"
            else:
                values[key] = _checked(kind, value)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            faults[key] = f"{key}={_raw(cfg, key)}: cannot be derived ({reason}); set it"
        except _FaultError as fault:
            faults[key] = f"{_show(key, value)}: {fault}"
    # Of a faulty setting and those that follow from it, the first alone is worth reading.
    roots = [text for key, text in faults.items() if not _inputs(_raw(cfg, key)) & faults.keys()]
    return values, [*_unknown_keys(cfg, Config), *roots]


def _inputs(raw: Any) -> set[str]:
    """Settings that an interpolation reads."""
    return set(re.findall(r"[a-z_]+(?:\.\w+)+", str(raw))) if "${" in str(raw) else set()


def _raw(cfg: DictConfig, key: str) -> Any:
    """The value at `key` as it is written, interpolations and all; None if there is none."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _checked(kind: Any, value: Any) -> Any:
    """`value` as the type `kind` and within its rules. Raises _FaultError."""
    base, *rules = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if not _TYPES[base].holds(value):
        raise _FaultError(_TYPES[base].says)
    if not isinstance(value, dict):
        value = (get_origin(base) or base)(value)
    for rule in rules:
        if not rule.holds(value):
            raise _FaultError(rule.says + _did_you_mean(value, rule.names))
    return value


def _unknown_keys(node: Any, section: type, prefix: str = "") -> Iterator[str]:
    """Faults of keys that no field answers to, at any depth."""
    kinds = get_type_hints(section)
    for key in node:
        if key in kinds:
            child = None if not is_dataclass(kinds[key]) else OmegaConf.select(node, key)
            if isinstance(child, DictConfig):
                yield from _unknown_keys(child, kinds[key], f"{prefix}{key}.")
        elif prefix or key not in _RULE_INPUTS:
            name = f"{prefix}{key}"
            yield f"{name}: no such setting; remove it" + _did_you_mean(name, _LEAVES)


def _build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    return section(
        **{
            name: _build(kind, values, f"{prefix}{name}.")
            if is_dataclass(kind)
            else values[prefix + name]
            for name, kind in get_type_hints(section).items()
        }
    )


def _show(key: str, value: Any) -> str:
    return f"{key}={_MASK if key in _SECRETS and value else value}"


def _did_you_mean(name: Any, options: Iterable[str]) -> str:
    """The end of a message: the `options` whose last segment is closest to that of `name`."""
    by_last: dict[str, list[str]] = {}
    for option in options:
        by_last.setdefault(option.split(".")[-1], []).append(option)
    close = difflib.get_close_matches(str(name).split(".")[-1], by_last, n=1)
    return f"; did you mean {' or '.join(by_last[close[0]])}?" if close else ""


# ---- records of a Config -------------------------------------------------------------

# Settings that leave a run's numbers as they are: a run may go on under another value of them.
_NEUTRAL = frozenset(
    {
        # where things lie, and what the run is called
        "deploy_paths.**",
        "training.exp_*",
        "training.resume_exp_folder",
        # the hardware: the same mathematics in another order of summation
        "backend.**",
        "training.accum_steps",
        # what is kept for the backward pass and what is computed again
        "model.remat_*",
        "model.loss_block",
        "model.attention*",
        "training.inner_remat_freq",
        "training.inner_gradient",
        # the length of the run: the schedule has its own keys
        "training.total_steps",
        # looking on: logs, evaluations, checkpoints
        "training.log_*",
        "training.wandb_*",
        "training.eval_*",
        "training.count_model_*",
        "training.save_*",
        "training.keep_checkpoints",
        # what to do where the run would end otherwise
        "training.skip_bad_steps",
        "benchmark.**",
        "evaluation.**",
        "generate.**",
        # the permission to differ
        "training.allow_config_change",
    }
)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts and lists for JSON or YAML, secrets masked."""
    return _plain(asdict(config))


def _plain(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in section.items():
        key = prefix + name
        if isinstance(value, Mapping):
            plain[name] = _plain(value, f"{key}.")
        elif isinstance(value, tuple):
            plain[name] = list(value)
        else:
            plain[name] = _MASK if key in _SECRETS and value else value
    return plain


# Which program computes a model: a choice of the machine at hand, not of the one that trained it.
_PROGRAMS = ("attention", "loss_block")


def with_stored(config: Config, stored: Mapping[str, Any]) -> Config:
    """`config` with model and training as a `to_dict` result has them, such as a manifest's.

    What `stored` lacks, and the choice of programs, stays as `config` has it. Raises ConfigError.
    """
    nested = to_dict(config)
    for section in ("model", "training"):
        known = {k: v for k, v in stored.get(section, {}).items() if k in nested[section]}
        nested[section] |= {k: v for k, v in known.items() if k not in _PROGRAMS}
    return resolve(OmegaConf.create(nested))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that change a run's numbers and differ between two `to_dict` results, as (a's, b's).

    A setting that one of them lacks counts as None there.
    """
    left, right = _flat(a), _flat(b)
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not any(matches(glob, key) for glob in _NEUTRAL)
    }


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return flat


# ---- composing -----------------------------------------------------------------------


def config_dir() -> Path:
    """The folder of `config.yaml`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    places = (package / "configs", package.parent / "configs")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise UserError(f"no config.yaml in {places[0]} or {places[1]}; install the package ttt again")


def experiments() -> tuple[str, ...]:
    """Names for `+experiment=NAME`, sorted."""
    return _choices("experiment")


def compose(overrides: Sequence[str]) -> DictConfig:
    """What `train OVERRIDES...` starts from. Raises UserError where Hydra refuses."""
    # A command that Hydra runs has its search path already, and a second start is refused.
    running = GlobalHydra.instance().is_initialized()
    start = hydra.initialize_config_dir
    with nullcontext() if running else start(str(config_dir()), version_base="1.3"):
        try:
            return hydra.compose("config", list(overrides))
        except HydraException as error:
            raise explain(error) from error


def explain(error: HydraException) -> UserError:
    """Hydra's complaint about a command line, with the closest names there are."""
    message = str(error)
    if isinstance(error, MissingConfigException) and "/" in (asked := error.missing_cfg_file or ""):
        group, name = asked.split("/", 1)
        options = _choices(group)
        close = difflib.get_close_matches(name, options, n=3, cutoff=0.5) or options
        return UserError(
            f"{group}={name}: no such choice; take one that exists, such as {', '.join(close)}"
        )
    if found := re.match(
        r"Multiple values for ([\w/]+)\.|([\w/]+) appears more than once", message
    ):
        group = found[1] or found[2]
        return UserError(f"{group} is chosen already; write {group}=NAME, without a +")
    if found := re.match(r"Could not override '([\w.]+)'\.\s+To append", message):
        return UserError(
            f"{found[1]}: no such setting; correct its name" + _did_you_mean(found[1], _LEAVES)
        )
    return UserError(f"{message}\n{error.__cause__}" if error.__cause__ else message)


def _choices(group: str) -> tuple[str, ...]:
    """Names of a config group's files, sorted."""
    folder = config_dir() / group
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return tuple(sorted(path.with_suffix("").as_posix() for path in files))


def _experiment_list() -> str:
    return "\n".join(f"  {name}" for name in experiments())


# ---- rules that the files in configs/ follow -----------------------------------------


def narrowed_width(width: int, layers: int, suffix: int) -> int:
    """MLP width at which `layers + suffix` MLPs cost what `layers` did, rounded up to 128."""
    return math.ceil(width * layers / (layers + suffix) / 128) * 128


def mlp_width(policy: str, width: int, layers: int, suffix: int) -> int:
    """The MLP width of a model with prime MLPs, by its `width_policy`."""
    return width if policy == "full" else narrowed_width(width, layers, suffix)


def full_attention_rope_theta(base: float, seq_length: int) -> float:
    """The paper's rotary base for full attention: `base` up to 8K tokens, growing beyond."""
    growth = {8192: 1, 16384: 2, 32768: 4, 65536: 10}
    return base * next((by for length, by in growth.items() if seq_length <= length), 20)


def extension_batch_size(batch: int, seq_length: int, extended_length: int) -> int:
    """Sequences of `extended_length` tokens that hold twice the tokens of a pretraining batch."""
    return max(1, 2 * batch * seq_length // extended_length)


def share_of_steps(steps: int, share: float) -> int:
    """The whole steps nearest to a share of `steps`, and 1 at least."""
    return max(1, round(steps * share))


def _cache_dir(name: str) -> str:
    """A folder of this user for what can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "ttt", name)


for _resolver in (mlp_width, full_attention_rope_theta, extension_batch_size):
    OmegaConf.register_new_resolver(f"ttt.{_resolver.__name__}", _resolver, replace=True)
OmegaConf.register_new_resolver("ttt.share", share_of_steps, replace=True)
OmegaConf.register_new_resolver("ttt.floordiv", lambda number, by: number // by, replace=True)
OmegaConf.register_new_resolver("ttt.times", lambda number, by: number * by, replace=True)
OmegaConf.register_new_resolver("ttt.cache_dir", _cache_dir, replace=True)
OmegaConf.register_new_resolver("ttt.experiments", _experiment_list, replace=True)
OmegaConf.register_new_resolver("ttt.choices", lambda g: ", ".join(_choices(g)), replace=True)
