"""How questions are asked and answers are checked. Imports neither jax nor transformers."""

import dataclasses
from typing import Literal

from jaxtune.settings import check_at_least, check_types

CheckerName = Literal["gsm8k", "number", "math", "exact"]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How questions are asked and answers are checked."""

    n: int = 1
    """Answers to each question."""
    k: tuple[int, ...] = ()
    """Compute pass@k and maj@k for these. None given: 2, 4, 8, … and n."""
    checker: Literal["auto"] | CheckerName = "auto"
    """gsm8k: the number after "#### ", letter by letter as verl; number: the last number; math: \\boxed{…} or another
    mathematical answer, by math-verify; exact: the same words. auto: as the data's format says."""
    system_prompt: str | None = None
    """System message before each question."""
    instruction: str | None = None
    """Put behind each question. None = the one of the data's format; "" = nothing."""
    few_shot: int = 0
    """Examples before each question, drawn from few_shot_data."""
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Choose among the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that reach this probability together."""
    min_p: float = 0.0
    """Choose among tokens at least this many times as likely as the most likely."""
    max_new_tokens: int = 1024
    """Tokens of an answer at most."""
    seed: int = 0
    """Of the sampling and of the choice of examples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", (self.k,) if isinstance(self.k, int) else tuple(self.k))
        check_types(self)
        check_at_least(self, 1, ["n", "max_new_tokens"])
        check_at_least(self, 0, ["few_shot", "temperature"])
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} answers at temperature 0 would all be the same; give a temperature above 0, or n=1"
            )
        for k in self.k:
            if not 1 <= k <= self.n:
                raise ValueError(
                    f"k={k} must be from 1 to n={self.n}, the number of answers to each question"
                )

    @property
    def ks(self) -> list[int]:
        """The k of pass@k and maj@k, ascending."""
        powers = [2**i for i in range(1, self.n.bit_length()) if 2**i < self.n]
        return sorted(set(self.k)) or [*powers, *([self.n] if self.n > 1 else [])]
