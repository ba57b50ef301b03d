"""The programs for attention agree, and are refused by name where they cannot serve."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import MODEL, full_attention

from ttt.errors import UserError
from ttt.mixers import layer_types
from ttt.model.pattern import MAKERS
from ttt.ops import dot_attention


@pytest.mark.parametrize("config", [MODEL, full_attention()], ids=lambda c: c.seq_modeling_block)
def test_blocks_and_naive_are_one_function(config):
    x = jax.random.normal(jax.random.key(1), (32, config.hidden_size))
    y = [
        MAKERS[layer_types(config)[0]](replace(config, attention=name), jax.random.key(0))(x)
        for name in ("blocks", "naive")
    ]
    np.testing.assert_allclose(*y, atol=2e-6)


def test_auto_is_blocks_where_cudnn_cannot_serve():
    assert dot_attention.choose("auto", jnp.dtype("bfloat16")) == "blocks"
    assert dot_attention.choose("naive", jnp.dtype("float32")) == "naive"


def test_cudnn_on_a_cpu_is_refused_with_the_names_that_work():
    with pytest.raises(UserError, match="Choose auto, blocks or naive"):
        dot_attention.choose("cudnn", jnp.dtype("bfloat16"))
