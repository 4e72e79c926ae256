"""`Engine`: many answers to many prompts, in waves of groups that share a prompt.

A wave's prompts are run once each (`steps.prefill`); then all its rows take steps together, `SEGMENT` a dispatch. The
host looks at a segment's tokens while the next one runs, so that the device never waits for it. When enough rows have
ended the others move together into a smaller batch, and when a wave is done the next begins.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from jaxtune.budget import free_bytes
from jaxtune.generate import plan, steps
from jaxtune.generate.results import Generations, Record, Updates
from jaxtune.generate.sampling import Sampling
from jaxtune.generate.sight import Sight
from jaxtune.generate.wave import Job, Wave
from jaxtune.generate.weights import Weights, merged, merged_bytes, reads_codes, stored
from jaxtune.images import Processed
from jaxtune.kernels.attention import supports_cudnn

SEGMENT = 16  # decode steps a dispatch
STREAMED = 4  # where somebody watches
# Up to so many rows "auto" reads NF4 codes: 64 rows of an 8B model made 9,306 tokens/s from them on an H200 and 9,082
# from the copy, 256 rows 12,244 and 17,813; a copy takes memory, and time to be made.
CODE_ROWS = 64
WORTH_MERGING = 32  # rows in flight that the copy must leave memory for, if so many are wanted

Mode = Literal["merged", "lora"]


class Engine:
    """Generates with a `jaxtune.model.Model`.

    Args:
      model: its adapter may be trained between calls; see `sync`.
      weights: "merged", a copy of the weights in the model's dtype with the adapter in it; "lora", the stored weights
        with the adapter beside them; "auto", the copy where it fits and rows are not so few that their NF4 codes are
        read as fast (`kernels.nf4_matmul`).
      max_sequences: rows that run together at most; what memory takes when None. The rest waits for its turn.
      progress: show a bar where that takes long.
      device: which of its layout's own devices generates, where the model lies on several.

    Attributes:
      weights: "merged", "lora", or "auto" while that is not decided.
    """

    def __init__(
        self,
        model: Any,
        *,
        weights: Literal["auto", "merged", "lora"] = "auto",
        max_sequences: int | None = None,
        progress: bool = True,
        device: int = 0,
    ):
        if weights not in ("auto", "merged", "lora"):
            raise ValueError(f"weights must be 'auto', 'merged' or 'lora', got {weights!r}")
        if max_sequences is not None and max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1, got {max_sequences}")
        self.model, self._asked = model, weights
        self.weights: str = weights
        self._max_sequences, self._progress, self._device = max_sequences, progress, device
        self._loaded: dict[tuple[Mode, bool], Weights] = {}
        self._made_of: list[weakref.ref] = []
        self._programs: set = set()
        self._seen = 0  # columns of images in the caches of layers that attend to them

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Frees the copy of the weights; the next call makes it again."""
        self._loaded, self._made_of = {}, []

    def sync(self) -> None:
        """Takes over the model's trained leaves; `generate` does it too when they are other arrays than before.

        Merges again if the copy is in use, else folds the adapter's scaling only.
        """
        modes = list(self._loaded)
        self.close()
        for mode, read_codes in modes:
            self._load(mode, read_codes)

    @property
    def num_compilations(self) -> int:
        """Programs that this engine has asked for: each was compiled once in the process, or came from the cache."""
        return len(self._programs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        on_tokens: Callable[[Updates], object] | None = None,
        streams: Sequence[tuple[int, int]] | None = None,
        images: Sequence[Processed] | None = None,
    ) -> Generations:
        """Continues each prompt n times.

        Equal prompts are run once, however they are given. What a row gets depends on its prompt, `seed` and its own
        stream only, not on the rows beside it (but for the rounding of products of other shapes).

        Args:
          prompts: token ids, or texts for the model's tokenizer.
          n: answers to each.
          sampling: how tokens are chosen; greedy when None.
          max_new_tokens: of each answer at most.
          seed: 0 to 2³² - 1.
          stop_token_ids: what ends an answer; the model's own end tokens when None.
          stop_strings: texts that end an answer, with the token that completes one.
          on_tokens: called with [(answer's number, its new ids), …] as they come.
          streams: of each prompt, (prompt, first sample) to draw noise for, (its number, 0) when None: so that a part
            of a larger call gives what the whole would.
          images: of each prompt (ids, image tokens included), what the processor gave; see `images.VisionFamily.rows`.

        Returns:
          len(prompts)·n answers, those of a prompt beside each other.

        Raises:
          ValueError: an argument cannot be meant. MemoryError: not even one row fits.
        """
        asked = self._job(
            prompts,
            n=n,
            sampling=sampling or Sampling(),
            limit=max_new_tokens,
            seed=seed,
            stop=stop_token_ids,
            strings=stop_strings,
            on_tokens=on_tokens,
            streams=streams,
            images=images,
        )
        weights, job, waves = self._seated(asked, n, images)
        shown = self._progress and max_new_tokens > 1 and on_tokens is None
        with tqdm(
            total=len(job.streams),
            desc="generate",
            unit="row",
            delay=2,
            leave=False,
            disable=None if shown else True,
        ) as bar:
            for seats in waves:
                Wave(weights, job, seats, self._programs).run(bar)
        return job.record.generations([(i, j) for i in range(len(prompts)) for j in range(n)])

    def _job(
        self, prompts, *, n: int, sampling: Sampling, limit: int, seed: int, stop, strings, on_tokens, streams,
        images,
    ) -> Job:  # fmt: skip
        """The checked arguments of `generate`."""
        ids = self._ids(prompts)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        if isinstance(strings, str) or any(not text for text in strings):
            raise ValueError(f"stop_strings must be a list of texts that are not empty, got {strings!r}")
        if streams is not None and len(streams) != len(ids):
            raise ValueError(f"streams must name one stream a prompt: {len(ids)}, got {len(streams)}")
        if images is not None and len(images) != len(ids):
            raise ValueError(f"images must name those of each prompt: {len(ids)}, got {len(images)}")
        record = Record(
            len(ids) * n,
            limit,
            stop=self.model.stop_ids() if stop is None else stop,
            strings=strings,
            tokenizer=self.model.tokenizer,
            on_tokens=on_tokens,
            kept=sampling.cuts(),
        )
        first = [(i, 0) for i in range(len(ids))] if streams is None else streams
        of_rows = np.array([(p, s + j) for p, s in first for j in range(n)], np.int32).reshape(-1, 2)
        spec = steps.Spec(self.model.module.config, jnp.dtype(self.model.dtype), sampling)
        longest = SEGMENT if on_tokens is None else STREAMED
        segment = min(longest, 1 << (limit - 2).bit_length()) if limit > 1 else 1
        return Job(ids, of_rows, np.uint32(seed), spec, record, segment)

    def _ids(self, prompts) -> list[list[int]]:
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(
                f"prompts must be a list of texts or of lists of token ids, not empty; got {prompts!r}"
            )
        if any(isinstance(prompt, str) for prompt in prompts):
            if self.model.tokenizer is None:
                raise ValueError("prompts are texts, and the model has no tokenizer; give token ids")
            prompts = [self.model.tokenizer(prompt)["input_ids"] for prompt in prompts]
        found = [[int(token) for token in prompt] for prompt in prompts]
        config = self.model.module.config
        vocabulary = config.vocab_size + config.extra_embeddings
        for i, prompt in enumerate(found):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; it needs one token at least")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ValueError(f"prompt {i} has ids outside of the vocabulary of {vocabulary}")
        return found

    def _seated(
        self, job: Job, n: int, images: Sequence[Processed] | None
    ) -> tuple[Weights, Job, list[plan.Slots]]:
        """What steps read, the job with equal prompts given once, and the rows of each wave in their places."""
        rows: dict[tuple, list[int]] = {}
        first: list[int] = []
        for i, prompt in enumerate(job.prompts):
            # images are compared by their bytes
            seen = () if images is None else [(k, np.asarray(v).tobytes()) for k, v in images[i].items()]
            key = (tuple(prompt), *seen)
            if key not in rows:
                first.append(i)
            rows.setdefault(key, []).extend(range(i * n, (i + 1) * n))
        job = job._replace(prompts=[job.prompts[i] for i in first])
        self._seen = 0
        if images is not None:
            look = Sight(self.model, [images[i] for i in first], self._device)
            self._seen, job = look.columns, job._replace(look=look)
        by_prompt = dict(enumerate(rows.values()))
        columns = plan.bucket(max(map(len, job.prompts)), plan.PROMPT_COLUMNS)
        own = plan.bucket(job.record.limit, plan.OWN_COLUMNS)
        size = plan.group_size(by_prompt, columns, own)
        if self._max_sequences is not None:
            size = min(size, self._max_sequences)
        weights = self._choose_weights(len(plan.split(by_prompt, size)), size, columns, own)
        while size > 1 and not self._places(1, size, columns, own):
            size = -(-size // 2)
        parts = plan.split(by_prompt, size)
        places = self._places(len(parts), size, columns, own)
        if not places:
            need = self.forecast(1, 1, columns, own)
            raise MemoryError(
                f"one row with {columns} columns for its prompt and {own} for its answer needs {need}, and "
                f"{free_bytes(()) / 1e9:.2f} GB are free. Shorten prompts or max_new_tokens, or take weights='lora'"
            )
        waves = -(-len(parts) // places)
        if waves > 1:  # prompts of like length together
            parts.sort(key=lambda part: len(job.prompts[part.prompt]))
        each = -(-len(parts) // waves)
        return weights, job, [plan.seat(parts[at : at + each], size) for at in range(0, len(parts), each)]

    def _choose_weights(self, groups: int, size: int, columns: int, own: int) -> Weights:
        """What these groups read; groups that must wait for a later wave included."""
        batch = plan.bucket(groups) * size
        if self._max_sequences is not None:
            batch = min(batch, self._max_sequences)
        codes = reads_codes(self.model, batch)
        mode = self._mode(batch, size, columns, own, codes)
        self.weights = mode
        return self._load(mode, codes)

    def _mode(self, batch: int, size: int, columns: int, own: int, codes: bool) -> Mode:
        if self._asked == "merged" or self._asked == "lora":
            return self._asked
        if codes and batch <= CODE_ROWS:
            return "lora"
        if any(mode == "merged" for mode, _ in self._loaded):
            return "merged"
        copy = merged_bytes(self.model)
        least = max(1, min(batch, WORTH_MERGING) // size)
        return "merged" if self._places(least, size, columns, own, taken=copy) == least else "lora"

    def forecast(self, groups: int, size: int, columns: int, own: int) -> plan.Memory:
        """Bytes beside the weights of groups x size rows whose caches have these columns."""
        c, dtype = self.model.module.config, self.model.dtype
        query = jax.ShapeDtypeStruct((1, 1, 1, c.head_dim), dtype)
        flash = supports_cudnn(query, packed=False, softcap=c.attention_softcap)
        return plan.forecast(c, dtype, groups, size, columns, own, flash, self._seen)

    def _places(self, wanted: int, size: int, columns: int, own: int, taken: int = 0) -> int:
        """How many groups, up to `wanted`, may run together."""
        free = free_bytes(()) - taken
        count = wanted
        while count and (
            self.forecast(plan.bucket(count), size, columns, own).total > free
            or (self._max_sequences is not None and count * size > self._max_sequences)
        ):
            count = max((n for n in range(1, count) if plan.bucket(n) == n), default=0)
        return count

    def _load(self, mode: Mode, codes: bool) -> Weights:
        trained = list(self.model.trainable.values())
        if not _same(self._made_of, trained):
            self.close()
        key = mode, codes and mode == "lora"
        if key not in self._loaded:
            make = merged if mode == "merged" else partial(stored, read_codes=codes)
            self._loaded[key] = make(self.model.on_one_device(self._device))
            self._made_of = [weakref.ref(leaf) for leaf in trained]
        return self._loaded[key]


def _same(made_of: list[weakref.ref], leaves: list[jax.Array]) -> bool:
    return len(made_of) == len(leaves) and all(
        ref() is leaf for ref, leaf in zip(made_of, leaves, strict=True)
    )
