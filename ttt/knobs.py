"""Every knob of the framework, as frozen dataclasses without JAX.

Key names are those that users know from the paper's code; units and rules stand beside each field,
rules between fields in `ttt.config`, which reads them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from ttt.globs import is_glob
from ttt.mixers import MIXERS, SHORT_NAMES

ATTENTION_BACKENDS = ("auto", "blocks", "naive", "cudnn")
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
OUTER_OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
INNER_OPTIMIZERS = ("sgd",)
BENCHMARK_CALLS = (
    "train_step",
    "gradient",
    "prefill",
    "evaluate",
    "decode",
    "decode_between_steps",
)
SUITES = ("loss_by_context", "needles", "long_decoding")
NEEDLE_TASKS = ("niah_single_1", "niah_single_2", "niah_single_3")


# ---- rules on one value --------------------------------------------------------------


class Rule(NamedTuple):
    """What a value must satisfy; `message` gives the rule and the remedy."""

    holds: Callable[[Any], bool]
    message: str
    names: Sequence[str] = ()
    """The names that hold, where they are few: a near miss is pointed out."""


def _one_of(names: Sequence[str]) -> Rule:
    return Rule(lambda v: v in names, f"must be one of {', '.join(names)}; choose one", names)


def _some_of(names: Sequence[str]) -> Rule:
    return Rule(
        lambda v: bool(v) and set(v) <= set(names) and len(set(v)) == len(v),
        f"must be some of {', '.join(names)}, each once; choose from them",
        names,
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
ShortMixer = Annotated[str, _one_of(("", *SHORT_NAMES))]
LayerTypes = Annotated[
    tuple[str, ...],
    Rule(
        lambda names: set(names) <= MIXERS.keys(),
        f"must name mixers, one for each layer of a cycle; there are {', '.join(MIXERS)}",
        tuple(MIXERS),
    ),
]
RopeScaling = Annotated[
    tuple[float, ...],
    Rule(
        lambda v: not v or (len(v) == 4 and min(v) > 0 and v[1] < v[2]),
        "must be [], or Llama 3's [factor, low_freq_factor, high_freq_factor, "
        "original_max_position_embeddings], all above 0 and the second below the third; correct it",
    ),
]
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
Schedule = Annotated[str, _one_of(SCHEDULES)]
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
    num_key_value_heads: Count
    """Heads of keys and values; each serves as many consecutive query heads."""
    head_dim: Count
    attention_bias: bool
    """Whether queries, keys and values have biases."""
    mini_batch_size: Count
    """Tokens in a chunk: the span of one test-time step, and of one loss mean."""
    sliding_window_size: Count
    """Keys that a query of `SWA` sees, itself included."""
    seq_modeling_block: ShortMixer
    """The mixer of all layers, by the name in the paper's code; empty where `layer_types` says."""
    layer_types: LayerTypes
    """Names of mixers, repeated over the layers; none: that of `seq_modeling_block` for all."""
    suffix_len: Natural
    """Last blocks that run chunk by chunk; they hold the prime MLPs."""
    prime: bool
    """Whether the suffix blocks have prime MLPs."""
    feed_forward_prime: FeedForward
    rope_theta: Positive
    rope_scaling: RopeScaling
    """Llama 3's stretch of the slow rotations: factor, low and high frequency factor, original
    positions (`ttt.ops.rotary`); empty: none."""
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

    `auto`, here and below: the cheapest choice whose predicted peak fits (`ttt.plan`)."""
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
    """`muon`: matrices of the blocks by Muon, all else by AdamW, with the same settings."""
    schedule: Schedule
    """After the warm-up. `cosine`: decays at once; `wsd`: stable up to `lr_decay_start`."""
    lr: Positive
    init_lr: NotNegative
    end_lr: NotNegative
    lr_warmup_steps: Natural
    lr_decay_start: Natural
    """The step from which `wsd` decays; the same as `lr_decay_steps`: it does not."""
    lr_decay_steps: Count
    """The step at which the rate has come down to `end_lr`."""
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
    """Batches of random stretches of the evaluation split to score; 0: all of it."""
    eval_start_batches: Count
    """The first of these batches are scored before the first step, by the parent too."""
    count_model_tokens: Natural
    """In the end pairs of tokens are counted, of all that the run was trained on, in order, up to
    so many, and scored beside the trained model; 0: they are not."""
    sample_tokens: Natural
    """Tokens that the trained model writes in the end after a held-out document; 0: none."""
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
    """How prime MLPs begin that a parent has not (ttt/training/warm_start.py); where nothing says,
    `inherit` with post-norms and `copy` without."""
    resume_exp_folder: FolderName
    resume_exp_name: MaybeFolderName
    resume_step: Step
    """-1: the latest."""
    allow_config_change: bool
    """Continue this run's own checkpoint, or branch from a parent's, though settings that change
    its numbers differ."""
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
    tokens: Natural
    """Held-out tokens that are scored at every context, in random stretches of the longest one;
    0: 256 times `training.seq_length`, or all there are."""


@dataclass(frozen=True)
class NeedlesConfig:
    """RULER's single needles in a haystack."""

    tasks: NeedleTasks
    lengths: Lengths
    """Tokens of a prompt and its answer together; none: `training.seq_length`."""
    depths: Natural
    """Places of the needle, evenly spread from the haystack's start (0 %) to its end (100 %); 0:
    drawn for each prompt, as RULER does."""
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
    """Unless it is 1, texts are also written without one."""
    evaluator: str
    """Who judges: a run of `training.exp_folder` that is not judged itself, or `hf:FOLDER` of a
    Hugging Face causal LM; empty: a count of token pairs of the training split."""


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
    """Of the stretches of held-out text (of training too), needles, sampling and resampling."""
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
    """Most tokens under full attention, written ones included; 0: as many as prompt and text need,
    up to `training.seq_length`."""
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
