"""Generation: prefill, decode and sampling on the training model's own leaves."""

from jaxtune.generate.engine import generate
from jaxtune.generate.sampling import Sampling
from jaxtune.generate.stream import TextStreamer

__all__ = ["Sampling", "TextStreamer", "generate"]
