"""What compute_dtype="fp8" costs in accuracy: errors by layer on SmolLM2's weights, and loss curves beside bfloat16.

    python scripts/bench/fp8_evidence.py --out fp8_evidence                # a GPU, about 2 minutes
    python scripts/bench/fp8_evidence.py --steps 6 --evaluations 1 --batch 2 --rows 60      # a look on a CPU

Prints and writes (errors.json, curves.json, curves.png):
1. By projection and layer, the relative error ‖y − y₃₂‖ / ‖y₃₂‖ of its output for the inputs that it really gets, y₃₂
   being the product in float32 of the same NF4 weights; and of its adapter's gradient through the whole model.
2. Loss curves of the same steps in bfloat16 and fp8, and of bfloat16 with the data in another order: how far two runs
   lie apart that differ in nothing that matters. Data: the shipped task (its generator), or --data, a .jsonl file with
   prompt and completion, or question and answer, of which the last twentieth is held out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer
from jaxtune.data import Batches, pack
from jaxtune.kernels.fp8 import fp8_linear
from jaxtune.kernels.linear import frozen_linear
from jaxtune.models.decoder import Context
from jaxtune.models.names import join
from jaxtune.models.rope import tables
from jaxtune.step import loss_sum
from jaxtune.tasks import orders

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARED = {  # what has one input
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", help=".jsonl file; without it the shipped task")
    parser.add_argument(
        "--rows", type=int, default=4000, help="of the shipped task; the first 1000 are shipped"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=10, help="in a run; each reads all held-out rows")
    parser.add_argument("--batch", type=int, default=8, help="packed rows in a step")
    parser.add_argument("--max_length", type=int, default=256, help="tokens in a packed row")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--skip", choices=("errors", "curves"), help="leave one half out")
    parser.add_argument("--out", default="fp8_evidence")
    return parser.parse_args()


def load_rows(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(rows to train on, held-out rows), conversational prompt and completion."""
    if args.data is None:
        held_out = orders.make_rows(orders.NUM_HELD_OUT, held_out=True)
        return datasets.Dataset.from_list(orders.make_rows(args.rows)), datasets.Dataset.from_list(held_out)
    rows = []
    for line in Path(args.data).read_text().splitlines():
        row = json.loads(line)
        texts = {
            "user": row.get("prompt", row.get("question")),
            "assistant": row.get("completion", row.get("answer")),
        }
        user, assistant = ([{"role": role, "content": text}] for role, text in texts.items())
        rows.append({"prompt": user, "completion": assistant})
    last = max(1, len(rows) // 20)
    return datasets.Dataset.from_list(rows[:-last]), datasets.Dataset.from_list(rows[-last:])


def load(args: argparse.Namespace, compute_dtype: str | None, dtype: str = "bfloat16"):
    """(model with an adapter, tokenizer)."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=args.max_length, dtype=dtype, compute_dtype=compute_dtype
    )
    return FastLanguageModel.get_peft_model(model, lora_alpha=32), tokenizer


def trainer(args: argparse.Namespace, compute_dtype: str | None, data_seed: int) -> SFTTrainer:
    model, tokenizer = load(args, compute_dtype)
    train, held_out = load_rows(args)
    name = f"{compute_dtype or 'bf16'}_{data_seed}"
    config = SFTConfig(
        output_dir=str(Path(args.out) / name), max_steps=args.steps, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, max_length=args.max_length, packing=True, logging_steps=1,
        learning_rate=args.learning_rate, warmup_ratio=0.05, lr_scheduler_type="cosine", save_strategy="no",
        eval_strategy="steps", eval_on_start=True, eval_steps=max(1, args.steps // args.evaluations),
        disable_tqdm=True, data_seed=data_seed,
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=config, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )


def curves(args: argparse.Namespace) -> dict[str, Any]:
    """name -> {"loss": [steps], "held_out": [[step, loss], …]}."""
    found = {}
    for name, compute_dtype, seed in (("bf16", None, 1), ("fp8", "fp8", 1), ("bf16, other order", None, 2)):
        run = trainer(args, compute_dtype, seed)
        run.train()
        log = run.state.log_history
        found[name] = {
            "loss": [record["loss"] for record in log if "loss" in record],
            "held_out": [[record["step"], record["eval_loss"]] for record in log if "eval_loss" in record],
        }
    return found


def show_curves(found: dict[str, Any], folder: Path, title: str) -> None:
    (folder / "curves.json").write_text(json.dumps(found))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for (name, curve), style in zip(found.items(), ("-", "--", ":"), strict=True):
        axes[0].plot(curve["loss"], style, linewidth=1, label=name)
        axes[1].plot(*zip(*curve["held_out"], strict=True), style, marker=".", label=name)
    for ax, what in zip(axes, ("training loss of each step", "held-out loss"), strict=True):
        ax.set(title=what, xlabel="step", ylabel="nats a token", yscale="log")
        ax.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    base = np.array(found["bf16"]["loss"])
    heads = ("held out before", "after", "training, last tenth", "mean |difference| from bf16")
    print(f"\n{'':20s}" + "".join(f"{head:>{len(head) + 3}s}" for head in heads))
    for name, curve in found.items():
        loss = np.array(curve["loss"])
        end = loss[-max(1, len(loss) // 10) :].mean()
        values = (curve["held_out"][0][1], curve["held_out"][-1][1], end, np.abs(loss - base).mean())
        print(f"{name:20s}" + "".join(f"{v:{len(h) + 3}.4f}" for v, h in zip(values, heads, strict=True)))


class Recorder:
    """A linear that remembers its input."""

    def __init__(self, linear):
        self.linear, self.x = linear, None

    def __call__(self, x, key):
        self.x = x
        return self.linear(x, key)


def relative(got, want) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)


def output_errors(model, batch) -> dict[str, np.ndarray]:
    """projection -> relative errors in bfloat16 and in fp8, float32 [2, layers]; activations from a float32 pass."""
    decoder = join(model.graphdef, model.trainable, model.base)
    positions, segments = batch["positions"], batch["segment_ids"]
    cos, sin = tables(decoder.config.rope, positions, jnp.float32)
    ctx = Context(cos, sin, positions, segments)

    def body(layers, x, errors):
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.o_proj = Recorder(attention.o_proj)
            normed = layer.input_layernorm(x)
            middle = x + attention(normed, ctx)[0]
            inner = layer.post_attention_layernorm(middle)
            act = jax.nn.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner)
            x = middle + mlp.down_proj(act)
            inputs = {"qkv": normed, "o": attention.o_proj.x, "gate_up": inner, "down": act}
            for shared, names in SHARED.items():
                holder = attention if shared in ("qkv", "o") else mlp
                found = (getattr(holder, name) for name in names)
                weights = tuple(getattr(linear, "linear", linear)._stored() for linear in found)
                errors.append(_product_errors(inputs[shared], weights))
        return x

    x = decoder.embed(batch["input_ids"])
    rows: list[Any] = []
    for segment in decoder.model.layers:
        graph, state = nnx.split(segment)
        for i in range(jax.tree.leaves(state)[0].shape[0]):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], state)
            errors: list[Any] = []
            x = body(nnx.merge(graph, one), x, errors)
            rows += errors
    names = [name for shared in SHARED.values() for name in shared]
    table = np.concatenate([np.asarray(row) for row in rows]).reshape(
        -1, len(names), 2
    )  # [L, projection, kind]
    return {name: table[:, i].T for i, name in enumerate(names)}


@jax.jit
def _product_errors(x: jax.Array, weights: tuple) -> jax.Array:
    """[projections, 2]"""
    low, none = x.astype(jnp.bfloat16), (None,) * len(weights)
    eighth = fp8_linear(low, weights, none)
    return jnp.stack(
        [
            jnp.stack([relative(y, exact) for y in (frozen_linear(low, weight), y8)])
            for weight, y8 in zip(weights, eighth, strict=True)
            for exact in [frozen_linear(x, weight)]
        ]
    )


def gradient_errors(args: argparse.Namespace, batch) -> dict[str, np.ndarray]:
    """projection -> relative errors of the adapter's gradient in bfloat16 and fp8 beside float32, [2, layers]."""
    grads = {}
    for name, compute_dtype, dtype in (
        ("exact", None, "float32"),
        ("bf16", None, "bfloat16"),
        ("fp8", "fp8", "bfloat16"),
    ):
        model, _ = load(args, compute_dtype, dtype)
        trainable = dict(model.trainable)
        for i, path in enumerate(sorted(trainable)):  # B is 0 at the start, and A's gradient with it
            if path.endswith("lora_B"):
                trainable[path] = 0.02 * jax.random.normal(jax.random.key(i), trainable[path].shape)
        loss = lambda leaves, base, graphdef=model.graphdef: loss_sum(graphdef, leaves, base, batch)[0]  # noqa: E731
        grads[name] = jax.jit(jax.grad(loss))(trainable, model.base)
    errors: dict[str, Any] = {}
    for path in sorted(grads["exact"]):
        pairs = [
            [relative(grads[kind][path][i], exact) for i, exact in enumerate(grads["exact"][path])]
            for kind in ("bf16", "fp8")
        ]
        errors.setdefault(path.split(".")[-2], []).append(np.array(pairs))
    return {name: np.sqrt(np.mean(np.square(found), axis=0)) for name, found in errors.items()}


def show_errors(title: str, errors: dict[str, np.ndarray]) -> None:
    """errors: projection -> [2, layers]."""
    print(f"\n{title}\n{'':12s}{'bf16':>8s}{'fp8':>8s}{'worst layer':>14s}    fp8 by layer, %")
    for name, (low, eighth) in errors.items():
        worst, layers = int(eighth.argmax()), " ".join(f"{100 * e:.1f}" for e in eighth)
        print(f"{name:12s}{low.mean():8.2%}{eighth.mean():8.2%}{eighth[worst]:9.2%} ({worst:2d})    {layers}")


def first_batch(args: argparse.Namespace) -> dict[str, jax.Array]:
    """[B, T] packed rows."""
    run = trainer(args, None, 1)
    rows = Batches(
        pack(run.train_dataset, args.max_length, "bfd"), batch_size=args.batch, accumulation=1,
        max_length=args.max_length, packed=True, seed=1, shuffle=True, pad_token_id=0,
    ).step(0)  # fmt: skip
    return {name: jnp.asarray(column)[0] for name, column in rows.items()}


def main() -> None:
    args, folder = (found := arguments()), Path(found.out)
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{Path(args.model).name}, {args.batch} x {args.max_length} packed tokens, {jax.devices()[0].device_kind}"
    if args.skip != "errors":
        batch = first_batch(args)
        model, _ = load(args, None, "float32")
        with jax.default_matmul_precision("highest"):
            outputs, gradients = output_errors(model, batch), gradient_errors(args, batch)
        print(where)
        show_errors("relative error of each projection's output, mean over layers", outputs)
        show_errors("relative error of the adapters' gradients through the whole model", gradients)
        both = {"outputs": outputs, "gradients": gradients}
        (folder / "errors.json").write_text(json.dumps(both, default=lambda table: table.tolist()))
    if args.skip != "curves":
        show_curves(curves(args), folder, f"{where}, {args.data or 'the shipped task'}")


if __name__ == "__main__":
    main()
