"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): SigLIP's tower, squares of its patches side by side
mapped to Llama's width."""

from dataclasses import replace

import jax
from flax import nnx

from jaxtune.models import llama, siglip
from jaxtune.models.decoder import Decoder, DecoderConfig, segments
from jaxtune.models.layers import Linear
from jaxtune.models.remat import Remat
from jaxtune.models.text_side import TextFamily
from jaxtune.models.vision_lm import Dense, VisionLM

READ = frozenset("text_config vision_config image_token_id scale_factor tie_word_embeddings".split())
PARTS = {"text_config": llama.READ, "vision_config": siglip.READ}
GGUF = llama.GGUF
TEXT = TextFamily("llama", llama.READ, path="model.text_model")


class Projection(nnx.Module):
    def __init__(self, in_features: int, out_features: int, dtype):
        self.proj = Linear(in_features, out_features, bias=False, dtype=dtype)


class Connector(nnx.Module):
    """Pixel shuffle: factor x factor patches become one token."""

    def __init__(self, tower: siglip.TowerConfig, factor: int, width: int, dtype):
        if tower.side % factor:
            raise ValueError(
                f"scale_factor={factor} does not divide the {tower.side} patches of an image's side"
            )
        self.modality_projection = Projection(tower.hidden_size * factor**2, width, dtype)
        self.factor, self.side = factor, tower.side // factor

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[N, S, width] -> [N·S/factor², D]."""
        squares = x.reshape(len(x), self.side, self.factor, self.side, self.factor, -1)
        rows = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.modality_projection.proj.in_features)
        return self.modality_projection.proj(rows, key)


class VisionBody(nnx.Module):
    def __init__(self, tower: siglip.Tower, connector: Connector, text_model: Decoder):
        self.vision_model, self.connector, self.text_model = tower, connector, text_model

    def features(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> tuple[jax.Array, None]:
        """The arrays of `images.siglip.Idefics3Images` -> [N·tokens, D]."""
        last = None if key is None else jax.random.fold_in(key, len(self.vision_model.encoder.layers))
        return self.connector(self.vision_model(images["pixels"], key=key, remat=remat), last), None


def config(hf) -> DecoderConfig:
    """transformers.Idefics3Config or SmolVLMConfig -> that of its decoder."""
    if hf.text_config.model_type != "llama":
        raise ValueError(
            f"text_config.model_type={hf.text_config.model_type!r} is not supported (only 'llama')"
        )
    return replace(llama.config(hf.text_config), tie_word_embeddings=hf.tie_word_embeddings)


def module(hf, dtype, dense: Dense) -> VisionLM:
    """The model of shapes; see `models.build`."""
    decoder, tower = config(hf), siglip.tower_config(hf.vision_config)
    plan = tuple(segments(dense("model.text_model.layers", len(decoder.windows))))
    layers = tuple(segments(dense("model.vision_model.encoder.layers", tower.num_layers)))
    connector = Connector(tower, hf.scale_factor, decoder.hidden_size, dtype)
    body = VisionBody(siglip.Tower(tower, layers, dtype), connector, Decoder(decoder, plan, dtype))
    stacks = [("vision_model.encoder.layers", layers)]
    return VisionLM(decoder, body, dtype, plan, decoder="text_model", stacks=stacks)
