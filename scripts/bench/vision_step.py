"""A QLoRA step of a Qwen2.5-VL-7B-shaped model on images: jaxtune beside transformers + PEFT + bitsandbytes.

    python scripts/bench/vision_step.py jaxtune --remat auto all
    python scripts/bench/vision_step.py peer --checkpointing off on      # needs torch, peft, bitsandbytes too
    python scripts/bench/vision_step.py jaxtune --compile_for h200       # no GPU needed, only jax[cuda13]: memory

Random weights; 4 rows of one image of 672x672 pixels (2,304 patches, 576 tokens) and 256 tokens of text; LoRA of rank
16 on attention and MLPs of tower and decoder, 8-bit AdamW, loss over the text, bfloat16. Tokens are those of the rows,
images included. The linear layers of both parts are in NF4, but for those of the tower that are no whole blocks wide.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cards
import measuring
import numpy as np
import roofline
import step

SIDE, PATCH, MERGE = 672, 14, 2
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
}
IDS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655}
TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|qkv|proj|gate_proj|up_proj|down_proj)"


def config(layers: int | None):
    from transformers import Qwen2_5_VLConfig

    fewer: tuple[dict, dict] = (
        ({}, {}) if layers is None else ({"num_hidden_layers": layers}, {"depth": layers})
    )
    made = Qwen2_5_VLConfig(
        text_config=TEXT | fewer[0], vision_config=VISION | fewer[1], tie_word_embeddings=False, **IDS
    )
    made.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return made


def rows(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, list[dict[str, np.ndarray]]]:
    """(ids [B, T], labels [B, T], the processed image of each row)."""
    rng = np.random.default_rng(0)
    grid = SIDE // PATCH
    image = [IDS["vision_start_token_id"], *[IDS["image_token_id"]] * (grid // MERGE) ** 2]
    image.append(IDS["vision_end_token_id"])
    text = rng.integers(0, 150000, (args.rows, args.text))
    half = args.text // 2
    ids = np.concatenate([text[:, :half], np.tile(image, (args.rows, 1)), text[:, half:]], 1)
    labels = np.where(ids < 151643, ids, -100)
    images = [
        {
            "pixel_values": rng.standard_normal((grid * grid, 3 * 2 * PATCH**2), np.float32),
            "image_grid_thw": np.array([[1, grid, grid]]),
        }
        for _ in range(args.rows)
    ]
    return ids.astype(np.int32), labels.astype(np.int32), images


def report(name: str, times: list[float], tokens: int, peak: int) -> None:
    median = statistics.median(times)
    print(
        f"{name:28s} {median * 1e3:8.1f} ms ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f})  "
        f"{tokens / median:9.0f} tokens/s  peak {peak / 1e9:6.2f} GB",
        flush=True,
    )


def timed(step: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of `count` steps, after two."""
    times = []
    for _ in range(count + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times[2:]


# -- jaxtune -------------------------------------------------------------------------------------------------------


def jaxtune(args: argparse.Namespace) -> None:
    card = cards.CARDS[args.compile_for] if args.compile_for else None
    devices = cards.compile_only(card) if card else []
    ceilings = (measuring.ceilings_here() if args.profile else None) or roofline.H200
    import jax

    from jaxtune.budget import PlannedStep, peak_bytes
    from jaxtune.kernels import target
    from jaxtune.models.remat import Remat
    from jaxtune.step import make_train_step

    bench = VisionBench(config(args.layers))
    batch, key = vision_batch(args, bench.config), jax.random.key(0)

    def make(remat: Remat) -> Any:
        return make_train_step(bench.model, bench.optimizer, remat=remat)

    if card:
        place = jax.sharding.SingleDeviceSharding(devices[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (bench.trainable, bench.state, bench.base, batch, key),
        )
        for name in args.remat:
            with target.tracing_for(card.capability):
                compiled = make(Remat.parse(name)).trace(*shapes).lower().compile()
            print(f"{name:28s} needs {peak_bytes(compiled) / 1e9:.2f} GB", flush=True)
        return
    bench.fill()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for name in args.remat:
        call = (bench.trainable, bench.state, bench.base, batch, key)
        if name == "auto":
            compiled: Any = PlannedStep(make, bench.model, announce=print).compile(call)
        else:
            compiled = make(Remat.parse(name)).lower(*call).compile()

        def one(compiled=compiled) -> None:
            bench.trainable, bench.state, metrics = compiled(
                bench.trainable, bench.state, bench.base, batch, key
            )
            float(metrics["loss"])

        times = timed(one, args.steps)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        report(f"jaxtune, {name}", times, batch["input_ids"].size, peak)
        if args.profile:
            chunks = step.loss_chunks("x".join(map(str, batch["input_ids"].shape[1:])))
            took, kernels = measuring.profile(one, compiled.as_text(), ceilings, chunks)
            floor = roofline.by_kind(roofline.kernels(compiled.as_text(), ceilings, chunks))
            measuring.show_profile(took, {kind: round(s * 1e3, 2) for kind, s in floor.items()}, kernels)


class VisionBench(step.Bench):
    """step.py's bench with a vision-language model in it."""

    def __init__(self, hf: Any):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from jaxtune import lora, models
        from jaxtune.config import SFTConfig
        from jaxtune.devices import ONE_DEVICE
        from jaxtune.models.names import leaf_shapes, trainable_paths
        from jaxtune.optim import make_optimizer

        self.layout, self.config = ONE_DEVICE, hf
        self.module = models.build(self.config, jnp.bfloat16, nf4=True)
        parts = dict.fromkeys(("vision", "language", "attention", "mlp"), True)
        targets = lora.chosen_targets(self.module, None, sees=True, **parts)
        lora.attach(self.module, lora.LoraConfig(r=16, target_modules=targets))
        shapes, trained = leaf_shapes(self.module), trainable_paths(self.module)
        self.trainable = {path: s for path, s in shapes.items() if path in trained}
        self.base = {path: s for path, s in shapes.items() if path not in trained}
        self.optimizer = make_optimizer(
            SFTConfig(optim="adamw_8bit", learning_rate=2e-4), 1000, self.trainable
        )
        self.state = jax.eval_shape(self.optimizer.init, self.trainable)
        self.model = SimpleNamespace(
            graphdef=nnx.graphdef(self.module), module=self.module, dtype=self.module.dtype, layout=ONE_DEVICE
        )


def vision_batch(args: argparse.Namespace, hf: Any) -> dict[str, Any]:
    """A step's batch of one micro-batch [1, B, T]."""
    import jax

    from jaxtune import images

    ids, labels, pictures = rows(args)
    family = images.family(hf)
    assert family is not None
    batch = {
        "input_ids": ids,
        "labels": labels,
        "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(ids),
        "starts": np.zeros((len(ids), 1), np.int32),
        **images.batch_arrays(family, ids, np.ones_like(ids), pictures),
    }
    return jax.tree.map(lambda x: np.asarray(x)[None], batch)


# -- the peer ------------------------------------------------------------------------------------------------------


def peer(args: argparse.Namespace) -> None:
    import bitsandbytes
    import peft
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    where, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    folder = Path(args.folder or tempfile.mkdtemp())
    if not (folder / "config.json").exists():
        torch.set_default_dtype(dtype)
        with torch.device(where):
            kind(config(args.layers)).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    ids, labels, pictures = rows(args)
    batch = {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "labels": torch.tensor(labels, dtype=torch.long),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
        "mm_token_type_ids": torch.tensor(ids == IDS["image_token_id"], dtype=torch.long),
        "pixel_values": torch.tensor(np.concatenate([p["pixel_values"] for p in pictures])).to(dtype),
        "image_grid_thw": torch.tensor(np.concatenate([p["image_grid_thw"] for p in pictures])),
    }
    batch = {name: value.to(where) for name, value in batch.items()}
    print(
        f"{torch.cuda.get_device_name() if on_gpu else 'cpu'}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}",
        flush=True,
    )
    for checkpointing in args.checkpointing:
        model = kind.from_pretrained(
            folder, quantization_config=quantization, dtype=dtype, device_map={"": where}
        )
        adapter = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
        if checkpointing == "on":
            model = peft.prepare_model_for_kbit_training(model)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = peft.get_peft_model(model, adapter).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=2e-4)

        def one(model=model, optimizer=optimizer, trained=trained) -> None:
            with torch.autocast(where, dtype, enabled=on_gpu):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = timed(one, args.steps)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        report(f"peer, checkpointing {checkpointing}", times, ids.size, peak)
        del model, optimizer, trained, one
        if on_gpu:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=["jaxtune", "peer"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--text", type=int, default=256, help="tokens of text in a row")
    parser.add_argument("--layers", type=int, help="of each part, fewer than the model has")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--remat", nargs="+", default=["auto", "all"], help="jaxtune's memory policies")
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["off", "on"])
    parser.add_argument("--folder", help="of the peer's checkpoint; made where it is not")
    parser.add_argument("--profile", action="store_true", help="where jaxtune's time goes, by kind of kernel")
    parser.add_argument(
        "--compile_for", choices=list(cards.CARDS), help="compile, on a machine without a GPU"
    )
    args = parser.parse_args()
    if args.profile:  # CUDA graphs hide the names of kernels
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    (jaxtune if args.library == "jaxtune" else peer)(args)


if __name__ == "__main__":
    main()
