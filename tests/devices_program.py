"""Runs on several simulated devices, for test_devices; a program of its own, because JAX counts its devices once.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/devices_program.py MODEL VISION_MODEL OUT

OUT/results.npz: name -> array; OUT/program *.txt: compiled steps.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from datasets import Dataset
from PIL import Image

from jaxtune import (
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    FastVisionModel,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from jaxtune.optim import make_optimizer
from jaxtune.rl.experience import Collator, Experience
from jaxtune.rl.losses.options import GRPOLossOptions
from jaxtune.rl.step import make_grpo_step

STEPS, LENGTH, ROWS = 10, 64, 12
# (data, fsdp, rows of a device); where 12 rows do not divide, the last micro-batch of a step has empty ones
LAYOUTS = [(1, 1, 4), (8, 1, 1), (1, 2, 3), (1, 4, 3), (1, 8, 1)]
GRPO_LAYOUTS = [(1, 1), (4, 1), (2, 4)]
VISION_LAYOUTS = [(1, 1, 2), (2, 2, 1)]  # (data, fsdp, rows of a device)
DPO_LAYOUTS = [(1, 1), (2, 2)]
VISION_GRPO_LAYOUTS = [(1, 1), (2, 2)]
TARGETS = ("q_proj", "down_proj")  # few, because each layer's dropout takes long to compile


def rows(count: int = 70) -> Dataset:
    """Texts of many lengths. Packed they are no multiple of a step's rows, so the last step of an epoch is short."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 60, count)
    return Dataset.from_list([{"text": "".join(map(chr, draw.integers(97, 123, n)))} for n in lengths])


def load(folder: str, data: int, fsdp: int, dropout: float = 0.0):
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=LENGTH, dtype="float32", devices=data * fsdp, data=data, fsdp=fsdp
    )
    return FastLanguageModel.get_peft_model(
        model, r=4, lora_dropout=dropout, init_lora_weights=False, target_modules=TARGETS
    )


def sft(folder: str, out: Path, data: int, fsdp: int, height: int, callbacks=(), **settings) -> SFTTrainer:
    """Ten steps of packed rows with accumulation, dropout and noise."""
    args = SFTConfig(
        str(out), max_length=LENGTH, packing=True, max_steps=STEPS, total_batch_size=ROWS, remat="all",
        per_device_train_batch_size=height, learning_rate=1e-3, neftune_noise_alpha=5.0, logging_steps=1,
        disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = SFTTrainer(
        load(folder, data, fsdp, 0.1), args, train_dataset=rows(), eval_dataset=rows(10), callbacks=callbacks
    )
    trainer.train()
    return trainer


def measured(trainer: SFTTrainer) -> dict[str, np.ndarray]:
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"loss": np.asarray(losses), "weights": flat(trainer.model)}


def flat(model) -> np.ndarray:
    leaves = jax.device_get(model.trainable)
    return np.concatenate([leaves[path].ravel() for path in sorted(leaves)])


def grpo_batch() -> dict[str, np.ndarray]:
    """Two micro-batches of 8 rows, of which the last three are empty."""
    draw = np.random.default_rng(1)
    draws = lambda lengths: [draw.integers(3, 259, n).astype(np.int32) for n in lengths]  # noqa: E731
    lengths = draw.integers(1, 16, 13)
    floats = lambda: [-3 + 0.1 * draw.standard_normal(n).astype(np.float32) for n in lengths]  # noqa: E731
    experience = Experience(
        prompt_ids=draws(draw.integers(3, 12, 13)),
        completion_ids=draws(lengths),
        advantages=draw.standard_normal(13).astype(np.float32),
        num_items=float(lengths.sum()),
        per_token={
            "mask": [np.ones(n, np.float32) for n in lengths],
            **{name: floats() for name in ("old_log_probs", "ref_log_probs", "sampling_log_probs")},
        },
    )
    batch = Collator(32, 0)([(experience, range(8)), (experience, range(8, 13))], 8)
    return batch | {"accumulation": np.full(2, 2, np.float32), "entropy_coef": np.full(2, 0.01, np.float32)}


def grpo(folder: str, data: int, fsdp: int) -> dict[str, np.ndarray]:
    """One step of a loss in which every row of a micro-batch has to do with every other."""
    model = load(folder, data, fsdp)
    layout, loss = model.layout, GRPOLossOptions(loss_type="bnpo", beta=0.04, top_entropy_quantile=0.5)
    optimizer = make_optimizer(SFTConfig(learning_rate=1e-3), 10, model.trainable)
    state = jax.jit(optimizer.init, out_shardings=layout.sharding())(model.trainable)
    step = make_grpo_step(model, optimizer, loss, temperature=0.9, steps_per_generation=2, layout=layout)
    batch = layout.put_rows(grpo_batch(), 1)
    model.trainable, _, metrics = step(model.trainable, state, model.base, batch, jax.random.key(0))
    kept = ("loss", "grad_norm", "kl", "entropy", "entropy_sum", "num_tokens")
    return {"weights": flat(model), "metrics": np.concatenate([np.ravel(metrics[name]) for name in kept])}


def image_rows() -> list[dict]:
    """Rows of two images, one, or none."""
    draw = np.random.default_rng(2)

    def row(i: int) -> dict:
        count = (2, 1, 0, 1)[i % 4]
        pictures = [Image.fromarray(draw.integers(0, 256, (5, 6, 3), np.uint8)) for _ in range(count)]
        sized = [picture.resize((60 + 30 * (i % 3), 60)) for picture in pictures]
        asked = [
            *({"type": "image", "image": one} for one in sized),
            {"type": "text", "text": "what" + "?" * i},
        ]
        answer = [{"type": "text", "text": f"it is {i}"}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}

    return [row(i) for i in range(11)]


def load_vision(folder: str, data: int, fsdp: int):
    model, processor = FastVisionModel.from_pretrained(
        folder, max_seq_length=256, dtype="float32", devices=data * fsdp, data=data, fsdp=fsdp
    )
    model = FastVisionModel.get_peft_model(
        model, r=4, init_lora_weights=False, target_modules=("q_proj", "qkv")
    )
    return model, processor


def vision(folder: str, out: Path, data: int, fsdp: int, height: int) -> dict[str, np.ndarray]:
    """Two steps of packed rows with images, the second with empty rows; the adapter is on the tower too."""
    model, processor = load_vision(folder, data, fsdp)
    args = SFTConfig(
        str(out), max_length=128, packing=True, max_steps=2, total_batch_size=4, remat="all",
        per_device_train_batch_size=height, learning_rate=1e-3, logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args, train_dataset=image_rows(), eval_dataset=image_rows()[:5], processing_class=processor
    )
    trainer.train()
    return measured(trainer) | {"eval": np.asarray(trainer.evaluate()["eval_loss"])}


def dpo(model, pairs: list[dict], out: Path, **settings) -> dict[str, np.ndarray]:
    """Two steps, of four pairs and, if there are seven, of three."""
    args = DPOConfig(
        str(out), max_steps=2, per_device_train_batch_size=4 // model.layout.size, learning_rate=1e-3,
        remat="all", logging_steps=1, disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=pairs, eval_dataset=pairs[:3])
    trainer.train()
    margins = [r["rewards/margins"] for r in trainer.state.log_history if "rewards/margins" in r]
    found = measured(trainer)
    return found | {"metrics": np.asarray([*margins, trainer.evaluate()["eval_loss"]])}


def text_dpo(folder: str, out: Path, data: int, fsdp: int) -> dict[str, np.ndarray]:
    texts = rows(21)["text"]
    pairs = [
        {"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(texts[::3], texts[1::3], texts[2::3])
    ]
    return dpo(load(folder, data, fsdp), pairs, out, max_length=LENGTH)


def vision_dpo(folder: str, out: Path, data: int, fsdp: int) -> dict[str, np.ndarray]:
    """The reference's log-probabilities are computed before."""
    pairs = [
        {"prompt": asked[:1], "chosen": asked[1:], "rejected": [{"role": "assistant", "content": "no" + "!" * i}]}
        for i, asked in enumerate(row["messages"] for row in image_rows()[:7])
    ]  # fmt: skip
    return dpo(load_vision(folder, data, fsdp)[0], pairs, out, max_length=128, precompute_ref_log_probs=True)


def letters(completion_ids, **_) -> list[float]:
    """Something that differs between completions."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def grpo_run(folder: str, out: Path, data: int, **settings) -> dict[str, np.ndarray]:
    """Three steps of two generations, each of four prompts."""
    args = GRPOConfig(
        str(out), max_steps=3, per_device_train_batch_size=8 // data, num_generations=4, steps_per_generation=2,
        max_completion_length=8, scale_rewards="batch", learning_rate=1e-3, remat="all", logging_steps=1,
        disable_tqdm=True, save_steps=1, **settings,
    )  # fmt: skip
    prompts = [{"prompt": text} for text in rows(9)["text"]]
    trainer = GRPOTrainer(load(folder, data, 1), [letters], args, prompts, prompts[:2])
    trainer.train()
    figures = [
        [record[name] for name in ("reward", "reward_std", "entropy", "completions/mean_length", "num_tokens")]
        for record in trainer.state.log_history if "reward" in record
    ]  # fmt: skip
    found = measured(trainer) | {"metrics": np.asarray(figures)}
    return found | {"eval": np.asarray(trainer.evaluate()["eval_reward"])}


def vision_grpo(folder: str, out: Path, data: int, fsdp: int) -> dict[str, np.ndarray]:
    """Two steps of one generation, of four prompts with two images, one, or none; one image is on several devices."""
    model, processor = load_vision(folder, data, fsdp)
    args = GRPOConfig(
        str(out), max_steps=2, per_device_train_batch_size=4 // model.layout.size, num_generations=2,
        steps_per_generation=2, max_completion_length=6, learning_rate=1e-3, remat="all", logging_steps=1, beta=0.04,
        disable_tqdm=True, save_strategy="no", dataloader_num_workers=1,
    )  # fmt: skip
    prompts = [{"prompt": row["messages"][:1]} for row in image_rows()[:4]]
    trainer = GRPOTrainer(model, [letters], args, prompts, prompts[:2], processing_class=processor)
    trainer.train()
    figures = [
        [record[name] for name in ("reward", "kl", "entropy", "completions/mean_length", "num_tokens")]
        for record in trainer.state.log_history if "reward" in record
    ]  # fmt: skip
    found = measured(trainer) | {"metrics": np.asarray(figures)}
    return found | {"eval": np.asarray(trainer.evaluate()["eval_reward"])}


def program(folder: str, data: int, fsdp: int) -> str:
    """The compiled text of an SFT step of two micro-batches with a row a device."""
    from jaxtune.step import make_train_step

    model = load(folder, data, fsdp)
    layout = model.layout
    optimizer = make_optimizer(SFTConfig(), 10, model.trainable)
    state = jax.jit(optimizer.init, out_shardings=layout.sharding())(model.trainable)
    ids = np.zeros((2, layout.size, LENGTH), np.int32)
    batch = layout.put_rows(dict.fromkeys(("input_ids", "labels", "positions", "segment_ids"), ids), 1)
    step = make_train_step(model, optimizer, layout=layout)
    return step.lower(model.trainable, state, model.base, batch, jax.random.key(0)).compile().as_text()


def main() -> None:
    folder, vision_folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_disable_most_optimizations", True)
    for data, fsdp in ((4, 1), (1, 4)):
        (out / f"program {data}x{fsdp}.txt").write_text(program(folder, data, fsdp))
    results = {}

    def keep(name: str, found: dict[str, np.ndarray]) -> None:
        results.update({f"{name} {key}": value for key, value in found.items()})

    for data, fsdp, height in LAYOUTS:
        saving = {"save_strategy": "steps", "save_steps": 5} if (data, fsdp) == (1, 4) else {}
        trainer = sft(folder, out / f"{data}x{fsdp}", data, fsdp, height, **saving)
        keep(f"sft {data}x{fsdp}", measured(trainer))
        results[f"bytes {data}x{fsdp}"] = trainer.model.memory_bytes()
        if data in (1, 8) and fsdp in (1, 8):
            results[f"eval {data}x{fsdp}"] = trainer.evaluate()["eval_loss"]
    resumed = sft(folder, out / "resumed", 8, 1, 1, resume_from_checkpoint=str(out / "1x4" / "checkpoint-5"))
    keep("sft resumed", measured(resumed))
    for data, fsdp in GRPO_LAYOUTS:
        keep(f"grpo {data}x{fsdp}", grpo(folder, data, fsdp))
    for data, fsdp, height in VISION_LAYOUTS:
        keep(f"vision {data}x{fsdp}", vision(vision_folder, out / "vision", data, fsdp, height))
    for data, fsdp in DPO_LAYOUTS:
        keep(f"dpo {data}x{fsdp}", text_dpo(folder, out / "dpo", data, fsdp))
        keep(f"vision dpo {data}x{fsdp}", vision_dpo(vision_folder, out / "dpo", data, fsdp))
    for data, fsdp in VISION_GRPO_LAYOUTS:
        keep(f"vision grpo {data}x{fsdp}", vision_grpo(vision_folder, out / "vision grpo", data, fsdp))
    keep("grpo run", grpo_run(folder, out / "grpo", 1))
    np.savez(out / "results.npz", **results)


if __name__ == "__main__":
    main()
