import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from keras_edifice.blocks.rotary_embedding import RotaryEmbedding, rotary_frequencies
from tests.support.close import assert_close

rng = np.random.default_rng(0)
PARAMETERS = {
    "linear": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=64),
    "llama3": dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    ),
    "dynamic": dict(factor=4.0, original_max_position_embeddings=4),
}


def config(kind=None, max_length=512, **parameters):
    rope = dict(rope_type=kind or "default", rope_theta=10000.0, **parameters)
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        rope_parameters=rope,
    )


def scaling(kind):
    ours = {"original_max_position_embeddings": "original_length"}
    return {"type": kind, **{ours.get(k, k): v for k, v in PARAMETERS[kind].items()}}


def turned(x, settings):
    """Llama's rotation of (batch, time, heads, 32)."""
    theirs = torch.as_tensor(x).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(settings)(
        theirs, torch.arange(x.shape[1])[None].expand(len(x), -1)
    )
    return apply_rotary_pos_emb(theirs, theirs, cos, sin)[0].transpose(1, 2)


def test_rotation_is_that_of_llama():
    x = rng.normal(size=(2, 9, 2, 32)).astype("float32")
    assert_close(RotaryEmbedding()(x), turned(x, config()), 1e-5)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(kind):
    settings = config(kind, **PARAMETERS[kind])
    expected, factor = ROPE_INIT_FUNCTIONS[kind](settings, "cpu")
    found, found_factor = rotary_frequencies(32, scaling=scaling(kind))
    assert_close(found, expected, 1e-6)
    assert_close(found_factor, factor, 1e-6)


def test_dynamic_scaling_is_that_of_transformers():
    x = rng.normal(size=(1, 9, 2, 32)).astype("float32")
    settings = config("dynamic", max_length=4, **PARAMETERS["dynamic"])
    layer = RotaryEmbedding(scaling=scaling("dynamic"))
    assert_close(layer(x), turned(x, settings), 1e-5)
