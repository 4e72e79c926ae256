"""What the export tests share: an adapter with random weights, torch's logits, how far two are apart, a .gguf file."""

from functools import cache

import jax
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from jaxtune.export.gguf_format import GgufWriter, TensorEntry
from jaxtune.fast import FastLanguageModel


@cache
def load(folder, **options):
    """jaxtune's float32 model of a folder; loaded once a session, so tests must not change it in place."""
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=None, dtype="float32", **options)[0]


@cache
def plain_logits(folder, ids: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Logits of a folder's model without adapter."""
    return np.asarray(load(folder, load_in_16bit=True).logits(np.frombuffer(ids, np.int32).reshape(shape)))


def random_adapter(model, **options):
    """`model` with an adapter of rank 4 whose leaves (B and the magnitudes too) are random."""
    options = {"r": 4, "init_lora_weights": False} | options
    model = FastLanguageModel.get_peft_model(model, **options)
    rng = np.random.default_rng(0)
    for path, value in model.trainable.items():
        noise = rng.standard_normal(value.shape).astype(np.float32)
        scale = 0.02 if path.endswith("weight") else 0.1
        model.trainable[path] = jax.numpy.asarray(
            np.asarray(value) * (1 + scale * noise) + 0.02 * scale * noise
        )
    return model


def logits_of(model, ids) -> np.ndarray:
    """float32 logits of a torch model."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.float().numpy()


def relative_error(value, reference) -> float:
    """Largest difference over the largest reference value."""
    value, reference = np.asarray(value, np.float32), np.asarray(reference, np.float32)
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def in_float32(model):
    """Keeps bitsandbytes' 4-bit layers in float32: in inference on CPUs with AVX512-BF16 they round to bfloat16."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def write(conversion, path):
    """The conversion as a float32 file."""
    kind = GGMLQuantizationType.F32
    entries = [TensorEntry(name, shape, kind) for name, shape in conversion.shapes.items()]
    with GgufWriter(path, conversion.metadata, entries) as writer:
        for name in conversion.shapes:
            writer.write(name, np.ascontiguousarray(conversion.read(name)))
    return path
