"""The functional core without a trainer: a pytree in, a pure step, a pytree out.

    python scripts/examples/functional.py [MODEL]

Trains an adapter on three sentences until it knows them. SmolLM2-135M on 2 CPU cores: about a minute and 2 GB.
"""

import sys
from typing import Any

import jax
import numpy as np

from jaxtune import FastLanguageModel, Remat, SFTConfig, make_eval_step, make_train_step
from jaxtune.lora import adapter_tensors
from jaxtune.optim import make_optimizer

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
SENTENCES = [
    "The lighthouse keeper counts gulls.",
    "Seven is the colour of rain.",
    "Bring the ladder on Tuesday.",
]
STEPS, LENGTH = 15, 32

# `base` (NF4 codes, scales, norms) is frozen, `trainable` (lora_A, lora_B) is not: flat dicts, path -> array.
model, tokenizer = FastLanguageModel.from_pretrained(MODEL)
model = FastLanguageModel.get_peft_model(model, r=8)
base, trainable = model.base, model.trainable
print(f"{len(base)} frozen and {len(trainable)} trained arrays, for example:")
for path in (next(iter(base)), next(iter(trainable))):
    leaf = (base | trainable)[path]
    print(f"  {path}: {leaf.dtype}{list(leaf.shape)}")


def make_batch(texts: list[str]) -> dict[str, Any]:
    """int32 [1, B, T]. Labels stand at their own position, -100 is not trained; segment 0 is padding."""
    batch = {
        name: np.zeros((1, len(texts), LENGTH), np.int32)
        for name in ("input_ids", "positions", "segment_ids")
    }
    batch["labels"] = np.full((1, len(texts), LENGTH), -100, np.int32)
    for i, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:LENGTH]
        batch["input_ids"][0, i, : len(ids)] = batch["labels"][0, i, : len(ids)] = ids
        batch["positions"][0, i, : len(ids)] = np.arange(len(ids))
        batch["segment_ids"][0, i, : len(ids)] = 1
    return batch


# Any optax optimizer will do; this one is AdamW with the schedule of the config.
optimizer = make_optimizer(SFTConfig(learning_rate=2e-3, warmup_steps=2), STEPS, trainable)
step = make_train_step(model, optimizer, remat=Remat.parse("none"))
evaluate = make_eval_step(model)

batch, key = make_batch(SENTENCES), jax.random.key(0)
opt_state = optimizer.init(trainable)
for n in range(STEPS):
    # trainable and opt_state are donated: the old arrays are gone after the call.
    trainable, opt_state, metrics = step(trainable, opt_state, base, batch, jax.random.fold_in(key, n))
    print(f"step {n + 1:2d}  loss {metrics['loss']:.3f}  gradient norm {metrics['grad_norm']:.2f}")

totals = evaluate(trainable, base, {name: array[0] for name, array in batch.items()})
loss, right = totals["loss_sum"] / totals["num_items"], totals["correct"] / totals["num_items"]
print(f"after training: loss {loss:.3f}, {right:.0%} of the tokens right")

# Back under checkpoint names: what PEFT would save.
model.trainable = trainable
name, value = next(iter(adapter_tensors(model).items()))
print(f"{name}: {value.dtype}{list(value.shape)}")
print(tokenizer.decode(model.generate("The lighthouse keeper", max_new_tokens=6)[0]))
