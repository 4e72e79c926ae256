"""Generation: many answers to many prompts at once, on the training model's own leaves or a merged copy of them."""

from jaxtune.generate.engine import Engine
from jaxtune.generate.requests import LoRARequest, SamplingParams, fast_generate
from jaxtune.generate.results import Generation, Generations
from jaxtune.generate.sampling import Sampling
from jaxtune.generate.stream import TextStreamer

__all__ = [
    "Engine",
    "Generation",
    "Generations",
    "LoRARequest",
    "Sampling",
    "SamplingParams",
    "TextStreamer",
    "fast_generate",
]
