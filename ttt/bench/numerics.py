"""Whether a variant computes what it should, before anyone looks at how fast it is.

Loss and outer gradient of a small network of the same kind, in float32, against those of its plain
twin: reverse over reverse, all logits at once, nothing rematerialised.
"""

import logging
import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ttt import mixers
from ttt.core.batch import from_tokens
from ttt.knobs import Config, ModelConfig, TrainingConfig
from ttt.model import loop
from ttt.model.transformer import MetaModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Bound of the relative differences; of float32 sums in another order they are about 1e-6."""
_CHUNK = 16
_MOST_CHUNKS = 6
_SEQUENCES = 2
_VOCABULARY = 64
_HEAD = 16


def fault(config: Config) -> str | None:
    """What is wrong with the numbers of `config`'s program; None where they agree."""
    model, training = _small(config.model, config.training)
    loss, gradient = _loss_and_gradient(model, training)
    loss_twin, gradient_twin = _loss_and_gradient(*_plain(model, training))
    differences = {
        "loss": abs(loss - loss_twin) / abs(loss_twin),
        "gradient": _distance(gradient, gradient_twin),
    }
    # NaN is no agreement.
    wrong = [f"{name} {x:.1e}" for name, x in differences.items() if not x <= TOLERANCE]
    if not wrong:
        return None
    return f"numerics: {' and '.join(wrong)} from the plain twin's, more than {TOLERANCE:.0e}"


def _small(model: ModelConfig, training: TrainingConfig) -> tuple[ModelConfig, TrainingConfig]:
    """The same kind of network and loop, small: as many chunks to a window, up to half of all."""
    chunks = min(training.seq_length // model.mini_batch_size, _MOST_CHUNKS)
    chunk = _CHUNK * _MOST_CHUNKS // chunks
    length = chunk * chunks
    window = math.ceil(chunk * model.sliding_window_size / model.mini_batch_size)
    heads, suffix = min(model.num_attention_heads, 2), min(model.suffix_len, 2)
    layers = suffix + min(model.num_hidden_layers - model.suffix_len, 2)
    small_model = replace(
        model,
        vocab_size=_VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=_HEAD * heads,
        intermediate_size=48,
        num_hidden_layers=max(layers, len(set(mixers.layer_types(model)))),
        # Each kind of mixer once, however long the cycle.
        layer_types=tuple(dict.fromkeys(mixers.layer_types(model))) if model.layer_types else (),
        suffix_len=suffix,
        num_attention_heads=heads,
        # As many query heads to a head of keys and values, as far as there are that many.
        num_key_value_heads=max(1, heads * model.num_key_value_heads // model.num_attention_heads),
        head_dim=_HEAD,
        mini_batch_size=chunk,
        sliding_window_size=min(window, length // 2),
        attention_block=chunk // 2 if model.attention_block else 0,
        loss_block=math.ceil(_VOCABULARY * model.loss_block / model.vocab_size),
        # Large enough for the softmax and the inner gradient to be far from uniform and from zero.
        initializer_range=0.2,
        compute_dtype="fp32",
        param_dtype="fp32",
        state_dtype="fp32",
    )
    small_training = replace(
        training,
        seq_length=length,
        global_batch_size=_SEQUENCES,
        accum_steps=1,
        inner_remat_freq=min(training.inner_remat_freq, chunks),
    )
    return small_model, small_training


def _plain(model: ModelConfig, training: TrainingConfig) -> tuple[ModelConfig, TrainingConfig]:
    """The plain twin: what every choice of how to compute must leave as it is."""
    return (
        replace(model, remat_prefix="none", remat_suffix="none", loss_block=0, attention="naive"),
        replace(training, inner_gradient="reverse_over_reverse", inner_remat_freq=1),
    )


@cache
def _loss_and_gradient(model: ModelConfig, training: TrainingConfig) -> tuple[float, PyTree]:
    """Mean loss over the sequences, and its gradient by all parameters."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (_SEQUENCES, training.seq_length + 1))
    batch = from_tokens(tokens, model.bos_token_id)

    def loss(network: MetaModel) -> Float[Array, ""]:
        return jnp.mean(loop.batch_losses(network, batch, training, 1.0).loss)

    logger.info("numerics: compiling a small network (%s)", training.inner_gradient)
    network = jax.jit(lambda: MetaModel(model, key=jax.random.key(0)))()
    with jax.default_matmul_precision("highest"):  # GPUs would round float32 products to TF32
        value, gradient = jax.jit(jax.value_and_grad(loss))(network)
    return float(value), gradient


def _distance(a: PyTree, b: PyTree) -> float:
    """The largest relative distance of two leaves; of one near zero, relative to a larger norm."""
    norms = [float(jnp.linalg.norm(y.ravel())) for y in jax.tree.leaves(b)]
    least = 1e-3 * max(norms)
    return max(
        float(jnp.linalg.norm((x - y).ravel())) / max(norm, least)
        for x, y, norm in zip(jax.tree.leaves(a), jax.tree.leaves(b), norms, strict=True)
    )
