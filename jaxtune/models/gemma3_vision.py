"""Gemma 3 with images (arXiv 2503.19786): SigLIP's tower, its patches averaged to 256 tokens an image, which see each
other whole."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import gemma3, siglip
from jaxtune.models.decoder import Decoder, DecoderConfig, segments
from jaxtune.models.layers import Frozen, RMSNorm, Shape
from jaxtune.models.remat import Remat
from jaxtune.models.text_side import TextFamily
from jaxtune.models.vision_lm import Dense, VisionLM

READ = frozenset(
    """text_config vision_config mm_tokens_per_image image_token_index boi_token_index eoi_token_index
    tie_word_embeddings""".split()
)
PARTS = {"text_config": gemma3.READ, "vision_config": siglip.READ | {"vision_use_head"}}
GGUF = gemma3.GGUF
TEXT = TextFamily("gemma3_text", gemma3.READ)
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"\.mm_input_projection_weight$", ".mm_input_projection.weight"),
)


class Projection(nnx.Module):
    """x W with W [in, out], as the checkpoint has it."""

    def __init__(self, in_features: int, out_features: int, *, dtype):
        self.weight = Frozen(Shape((in_features, out_features), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...].astype(x.dtype)


class Projector(nnx.Module):
    """Squares of patches averaged, normed, and mapped to the decoder's width."""

    def __init__(self, tower: siglip.TowerConfig, tokens: int, width: int, dtype):
        self.mm_input_projection = Projection(tower.hidden_size, width, dtype=dtype)
        self.mm_soft_emb_norm = RMSNorm(tower.hidden_size, tower.layer_norm_eps, dtype=dtype, plus_one=True)
        self.side = int(tokens**0.5)
        if self.side**2 != tokens or tower.side % self.side:
            raise ValueError(
                f"mm_tokens_per_image={tokens}: expected a square number whose root divides the {tower.side} patches "
                "of an image's side"
            )
        self.pool = tower.side // self.side

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, S, width] -> [N·tokens, D]."""
        squares = x.reshape(len(x), self.side, self.pool, self.side, self.pool, -1)
        pooled = jnp.mean(squares.astype(jnp.float32), (2, 4)).astype(x.dtype)
        return self.mm_input_projection(self.mm_soft_emb_norm(pooled.reshape(-1, x.shape[-1])))


class VisionBody(nnx.Module):
    def __init__(self, tower: siglip.Tower, projector: Projector, language_model: Decoder):
        self.vision_tower, self.multi_modal_projector = tower, projector
        self.language_model = language_model

    def features(
        self, images: dict[str, jax.Array], *, key: jax.Array | None, remat: Remat | None
    ) -> tuple[jax.Array, None]:
        """The arrays of `images.siglip.Gemma3Images` -> [N·tokens, D]."""
        return self.multi_modal_projector(self.vision_tower(images["pixels"], key=key, remat=remat)), None


def config(hf) -> DecoderConfig:
    """transformers.Gemma3Config -> that of its decoder."""
    decoder = gemma3.config(hf.text_config)
    return replace(
        decoder, tie_word_embeddings=hf.tie_word_embeddings, whole_image_tokens=hf.mm_tokens_per_image
    )


def module(hf, dtype, dense: Dense) -> VisionLM:
    """The model of shapes; see `models.build`."""
    if hf.vision_config.vision_use_head:
        raise ValueError(
            "vision_config.vision_use_head=True: Gemma 3 does not use the head; set false, and leave its weights out"
        )
    decoder, tower = config(hf), siglip.tower_config(hf.vision_config)
    text = dense("model.language_model.layers", len(decoder.windows))
    plan = tuple(segments(list(zip(decoder.windows, text, strict=True))))
    layers = tuple(segments(dense("model.vision_tower.encoder.layers", tower.num_layers)))
    projector = Projector(tower, hf.mm_tokens_per_image, decoder.hidden_size, dtype)
    body = VisionBody(siglip.Tower(tower, layers, dtype), projector, Decoder(decoder, plan, dtype))
    return VisionLM(decoder, body, dtype, plan, stacks=[("vision_tower.encoder.layers", layers)])
