"""Reward models: what a sequence classifier says of a conversation, as a reward function.

    GRPOTrainer(model, reward_funcs=["Skywork/Skywork-Reward-V2-Qwen3-0.6B", RewardModel("outputs/judge")], …)

A checkpoint of transformers' …ForSequenceClassification: a decoder, and `score.weight` [labels, D] on the last token.
The reward is the first label's logit, as in TRL.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import hub, models
from jaxtune.fast import as_dtype
from jaxtune.generate import plan
from jaxtune.load import load_weights
from jaxtune.models.names import join
from jaxtune.rl.data import is_conversational

SCORE = "score.weight"
WIDTH = 128  # tokens: rows are padded to few multiples of this


class RewardModel:
    """Scores completions; a reward function.

    Args:
        name: hub id or folder.
        dtype: of weights and activations; None: bfloat16, on a CPU float32.
        load_in_4bit: keep the weights in NF4.
        batch_size: rows at a time.
        revision, token: of the hub.
        tokenizer: in place of the checkpoint's.
        chat_template_kwargs: for its chat template.

    Raises:
        ValueError: no sequence classifier, or of a family that is not supported.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        dtype: Any = None,
        load_in_4bit: bool = False,
        batch_size: int = 8,
        revision: str | None = None,
        token: str | bool | None = None,
        tokenizer: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.__name__ = str(name).rstrip("/").rsplit("/", 1)[-1]
        checkpoint = hub.resolve(name, revision=revision, token=token)
        if SCORE not in checkpoint.names():
            raise ValueError(
                f"{name} is no reward model: it has no tensor {SCORE}, as transformers' …ForSequenceClassification has"
            )
        config = copy.deepcopy(checkpoint.config)
        config.get_text_config().tie_word_embeddings = True  # there is no lm_head
        module = models.build(config, as_dtype(dtype), nf4=load_in_4bit)
        renamed = checkpoint.without(SCORE).renamed(models.renames(config))
        self._graphdef, self._leaves = nnx.split(module)[0], load_weights(renamed, module, progress=False)
        self._head = jnp.asarray(np.asarray(checkpoint.read(SCORE))[0], "float32")  # [D]
        self.tokenizer = tokenizer or checkpoint.tokenizer()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._batch_size, self._template = batch_size, chat_template_kwargs or {}
        self._limit = config.get_text_config().max_position_embeddings

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """A reward for each completion."""
        pairs = list(zip(prompts, completions, strict=True))
        if is_conversational(prompts[0]):
            texts = [
                self.tokenizer.apply_chat_template([*p, *c], tokenize=False, **self._template)
                for p, c in pairs
            ]
        else:
            texts = [p + c for p, c in pairs]
        return self.scores(texts).tolist()

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N], each of the last token that is not padding.

        Raises:
            ValueError: a text is longer than the model takes.
        """
        rows = self.tokenizer(text=list(texts), add_special_tokens=False)["input_ids"]
        longest = max(map(len, rows))
        if longest > self._limit:
            raise ValueError(
                f"reward model {self.__name__}: a conversation has {longest} tokens, it takes {self._limit}; lower "
                "max_completion_length or leave longer prompts out (max_prompt_length)"
            )
        found = np.zeros(len(rows), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for first in range(0, len(rows), self._batch_size):
            part = order[first : first + self._batch_size]
            width = plan.bucket(len(rows[part[-1]]), WIDTH)
            ids = np.full((self._batch_size, width), self.tokenizer.pad_token_id, np.int32)
            mask = np.zeros_like(ids)
            for k, i in enumerate(part):
                ids[k, : len(rows[i])], mask[k, : len(rows[i])] = rows[i], 1
            # As transformers: the rightmost token that is not the padding token, also where a text ends with that.
            last = np.where(ids != self.tokenizer.pad_token_id, np.arange(width), 0).argmax(1)
            scores = _scores(self._graphdef, self._leaves, self._head, ids, mask, last)
            found[part] = np.asarray(scores)[: len(part)]
        return found


def with_models(functions: Any, chat_template_kwargs: dict[str, Any] | None) -> list[Any]:
    """reward_funcs as a list, with a RewardModel for each name."""
    several = functions if isinstance(functions, (list, tuple)) else [functions]
    return [
        RewardModel(one, chat_template_kwargs=chat_template_kwargs) if isinstance(one, str) else one
        for one in several
    ]


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef, leaves, head, ids, mask, last):
    """float32 [B] of right-padded ids [B, T] and the places [B] that are scored."""
    module = join(graphdef, {}, leaves)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = module.hidden(module.embed(ids), positions, mask)  # [B, T, D]
    scored = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]  # [B, D]
    return jnp.einsum("bd,d->b", scored.astype("float32"), head, precision="highest")
