"""SigLIP's tower alone against transformers' three of it, float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tolerances import LOGITS
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionTransformer

from jaxtune.models import siglip
from jaxtune.models.decoder import segments

LAYERS = 3


def judge_of(kind: str, side: int):
    """A random tower of side x side patches."""
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
    }
    fields |= {"image_size": 2 * side, "patch_size": 2}
    torch.manual_seed(0)
    if kind == "siglip":
        model = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**fields, vision_use_head=False)
        )
    else:
        model = Idefics3VisionTransformer(Idefics3VisionConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + ("norm" in name and name.endswith("weight")))
    return model.eval()


def tower_of(judge) -> siglip.Tower:
    """The same tower, its layers stacked."""
    tower = siglip.Tower(siglip.tower_config(judge.config), segments([0] * LAYERS), jnp.float32)
    weights, leaves = judge.state_dict(), {}
    for path, _ in nnx.to_flat_state(nnx.state(tower)):
        name = ".".join(map(str, path))
        if ".layers.0.0." in name:
            layers = [weights[name.replace("layers.0.0.", f"layers.{i}.")] for i in range(LAYERS)]
            leaves[path] = jnp.asarray(torch.stack(layers).numpy())
        else:
            leaves[path] = jnp.asarray(weights[name].numpy())
    return nnx.merge(nnx.split(tower)[0], nnx.from_flat_state(leaves))


# Idefics3 finds positions from fractions in float32; with the sides of published models they are the patches' numbers.
@pytest.mark.parametrize("kind, side", [("siglip", 6), ("idefics3", 26), ("idefics3", 27), ("idefics3", 32)])
def test_tower(kind, side):
    judge = judge_of(kind, side)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 2 * side, 2 * side)).astype(np.float32)
    with torch.no_grad():
        want = judge(pixel_values=torch.tensor(pixels)).last_hidden_state.numpy()
    got = np.asarray(tower_of(judge)(jnp.asarray(pixels)))
    assert np.abs(got - want).max() <= LOGITS * np.abs(want).max()


def test_what_the_tower_does_not_know_raises():
    with pytest.raises(ValueError, match="hidden_act='swish'"):
        siglip.tower_config(transformers.SiglipVisionConfig(hidden_act="swish"))
    with pytest.raises(ValueError, match="expected one number each"):
        siglip.tower_config(transformers.SiglipVisionConfig(image_size=[32, 64]))
