"""Configurations and inputs small enough to compile fast."""

from dataclasses import replace

import jax
import numpy as np

from ttt.knobs import ModelConfig, OptimizerInnerConfig, OptimizerOuterConfig, TrainingConfig
from ttt.model import loop
from ttt.model.transformer import SequenceLoss

MODEL = ModelConfig(
    name="test",
    vocab_size=40,
    bos_token_id=1,
    eos_token_id=2,
    hidden_size=16,
    intermediate_size=24,
    width_policy="full",
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=False,
    mini_batch_size=8,
    sliding_window_size=12,
    seq_modeling_block="SWA",
    layer_types=(),
    suffix_len=2,
    prime=True,
    feed_forward_prime="swiglu",
    rope_theta=10000.0,
    rope_scaling=(),
    rms_norm_eps=1e-6,
    # Large enough for the softmax and the inner gradient to be far from uniform and from zero.
    initializer_range=0.3,
    qk_norm=True,
    pre_norm=True,
    post_norm=True,
    tie_word_embeddings=True,
    compute_dtype="fp32",
    param_dtype="fp32",
    state_dtype="fp32",
    attention="auto",
    attention_block=0,
    loss_block=0,
    remat_prefix="none",
    remat_suffix="none",
)

TRAINING = TrainingConfig(
    exp_folder="tests",
    exp_name="test",
    runtime_mode="jax",
    train_mode="meta",
    dataset_name="none",
    data_split="train",
    eval_split="val",
    dummy_dataset=True,
    seq_length=32,
    global_batch_size=2,
    accum_steps=1,
    eval_batch_size=2,
    total_steps=4,
    model_seed=0,
    data_seed=0,
    spec_inner=("language_model.**.suffix_blocks.feed_forward_prime.**",),
    spec_outer=("**",),
    optimizer_inner=OptimizerInnerConfig(optimizer_type="sgd", lr=0.5, clip_gradient=0.5),
    optimizer_outer=OptimizerOuterConfig(
        optimizer_type="adamw",
        schedule="cosine",
        lr=3e-3,
        init_lr=1e-3,
        end_lr=1e-5,
        lr_warmup_steps=2,
        lr_decay_start=6,
        lr_decay_steps=8,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        emb_wd=True,
        clip_gradient=1.0,
        bf16_momentum=False,
    ),
    ilr_init=1.0,
    ilr_warmup_steps=0,
    inner_gradient="forward_over_reverse",
    inner_remat_freq=1,
    eval_every_steps=0,
    eval_batches=1,
    eval_start_batches=1,
    count_model_tokens=0,
    sample_tokens=0,
    save_every_steps=0,
    save_every_minutes=0.0,
    save_milestone_freq=0,
    keep_checkpoints=2,
    skip_bad_steps=0,
    load_part="none",
    prime_init="inherit",
    resume_exp_folder="tests",
    resume_exp_name="",
    resume_step=-1,
    allow_config_change=False,
    log_wandb=False,
    wandb_entity="",
    wandb_project="",
    wandb_key="",
)


def full_attention(model: ModelConfig = MODEL) -> ModelConfig:
    """The plain Transformer beside `model`: one chunk is the whole sequence."""
    return replace(
        model, seq_modeling_block="self_attention", suffix_len=0, prime=False, mini_batch_size=32
    )


HYBRID = replace(
    MODEL,
    seq_modeling_block="",
    layer_types=("sliding_attention", "sliding_attention", "full_attention"),
    num_hidden_layers=7,
    suffix_len=0,
    prime=False,
)
"""Two turns of two sliding-window layers and a full one, and a sliding one behind them."""

GROUPED = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "attention_bias": True,
}
"""Attention as in pretrained models: fewer key heads, H·K ≠ D, biases."""


def sequence_loss(model, sequence, training, scale=1.0) -> SequenceLoss:
    """The loss of one sequence [T]."""
    batch = jax.tree.map(lambda x: x[None], sequence)
    return jax.tree.map(lambda x: x[0], loop.batch_losses(model, batch, training, scale))


def random_tokens(*shape: int, seed: int = 0, model: ModelConfig = MODEL) -> np.ndarray:
    """Token ids of any shape, some of them the document start that is not scored."""
    return np.random.default_rng(seed).integers(0, model.vocab_size, shape)
