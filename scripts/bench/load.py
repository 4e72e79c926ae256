"""From a folder of 16-bit weights to the first training step: how long each part takes, and the memory of the host.

    python scripts/bench/load.py --folder /tmp/llama-3.1-8b --out .
    python scripts/bench/load.py --folder /tmp/smollm2 --model smollm2-135m --batch 1x128       # on a CPU

Makes a random checkpoint of the model's shape (sharded bfloat16 safetensors, as on the hub; once), brings it into the
page cache, and does in a fresh process what a user does: import, from_pretrained(load_in_4bit=True), get_peft_model,
optimizer, first step. Then the same in a second process, which finds the first one's compiled programs. The parts of
loading (read, transfer, quantise, nested scales) are taken alone afterwards, on one large matrix, and scaled to the
checkpoint: what loading would cost without any overlap. 8B, one H100: about 2 minutes, 16 GB of disk.

Host memory: VmHWM counts pages of the mapped file, which the kernel takes back when it wants to; `anonymous` is what
the process itself holds (RssAnon and RssShmem, sampled), and `grown` how much of it came with loading.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from step import MODELS

SHARD_BYTES = 5_000_000_000
BUFFER = 1 << 25  # random weights, repeated
PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint; made where it is not")
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--batch", help="rows x tokens; 4x2048 on a GPU, 1x128 on a CPU")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for load.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the checkpoint ------------------------------------------------------------------------------------------------


def tensors(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of Hugging Face's shards."""
    hidden, ffn, layers, heads, kv, head_dim, vocab, tied = MODELS[args.model]
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(args.layers or layers):
        names |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "mlp.down_proj": (hidden, ffn),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "post_attention_layernorm": (hidden,),
                "self_attn.k_proj": (kv * head_dim, hidden),
                "self_attn.o_proj": (hidden, heads * head_dim),
                "self_attn.q_proj": (heads * head_dim, hidden),
                "self_attn.v_proj": (kv * head_dim, hidden),
            }.items()
        }
    return names | {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocab, hidden)})


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], values: np.ndarray, ones: np.ndarray) -> None:
    """One .safetensors file; matrices are stretches of `values`, each from another place."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(shapes.values()):
            source, left = (values if len(shape) == 2 else ones), int(np.prod(shape))
            start = i * 4099 % (len(source) // 2)
            while left:
                piece = source[start : start + left]
                file.write(piece.view(np.uint8).data)
                left, start = left - len(piece), 0


def make_checkpoint(args: argparse.Namespace) -> None:
    import ml_dtypes
    from transformers import LlamaConfig

    began, folder = time.perf_counter(), args.folder
    folder.mkdir(parents=True, exist_ok=True)
    hidden, ffn, layers, heads, kv, head_dim, vocab, tied = MODELS[args.model]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in tensors(args).items():
        size = 2 * int(np.prod(shape))
        if size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    values = (0.02 * np.random.default_rng(0).standard_normal(BUFFER, np.float32)).astype(ml_dtypes.bfloat16)
    ones = np.ones(2 * hidden, ml_dtypes.bfloat16)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file, shapes: write_shard(folder / file, shapes, values, ones), files, shards))
    total = sum(2 * int(np.prod(shape)) for shape in tensors(args).values())
    where = {name: file for file, shapes in zip(files, shards) for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    tokenizer().save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=args.layers or layers, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied,
        max_position_embeddings=131072, rope_theta=500000.0, dtype="bfloat16", pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)  # last: its presence says that the folder is whole
    print(f"made {folder}: {total / 1e9:.1f} GB in {len(files)} shards, {time.perf_counter() - began:.0f} s")


def tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    )


def read_once(folder: Path) -> None:
    def read(file: Path) -> None:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 26):
                pass

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, folder.glob("*.safetensors")))
    print(f"read into the page cache: {time.perf_counter() - began:.1f} s", flush=True)


# -- measuring, in a process of its own ----------------------------------------------------------------------------


def status() -> dict[str, int]:
    """Bytes of /proc/self/status's memory lines."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def anonymous() -> int:
    """Bytes that are this process's own: no pages of files, which mmap shares with the page cache."""
    now = status()
    return now["RssAnon"] + now["RssShmem"]


@contextmanager
def sampled(out: dict[str, float]) -> Iterator[None]:
    """Puts the peak of `anonymous` over the block, and what that is more than before, into `out` (GB)."""
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        out |= {"anonymous": peak[0] / 1e9, "anonymous_grown": (peak[0] - before) / 1e9}


class Phases:
    """Seconds that JAX traced, lowered and compiled, and how many programs it compiled or found in the cache."""

    def __init__(self) -> None:
        import jax

        self.now: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, seconds, **_: self.add(PHASES[name], seconds) if name in PHASES else None
        )
        jax.monitoring.register_event_listener(
            lambda name, **_: self.add("cache_hits", 1) if name.endswith("/cache_hits") else None
        )

    def add(self, name: str, value: float) -> None:
        self.now[name] = self.now.get(name, 0) + value
        if name == "compile":
            self.add("programs", 1)

    def take(self) -> dict[str, float]:
        taken, self.now = self.now, {}
        return {name: round(value, 3) for name, value in taken.items()}


def parts_alone(checkpoint: Any) -> dict[str, float]:
    """Seconds that reading, transferring, quantising and the nested scales of all matrices take one after the other.

    Measured on the largest matrix of a layer, best of three.
    """
    import jax

    from jaxtune import quant

    names = [name for name in checkpoint.names() if name.endswith("_proj.weight")]
    size = lambda name: int(np.prod(checkpoint.info(name).shape))  # noqa: E731
    name = max(names, key=size)

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - began)
        return min(times)

    held = np.array(checkpoint.read(name))
    device = jax.device_put(held, may_alias=False)
    absmax = np.asarray(quant._quantize_blocks(device)[1])
    scale = sum(map(size, names)) / size(name)
    seconds = {
        "read": best(lambda: np.copyto(held, checkpoint.read(name))),
        "transfer": best(lambda: jax.device_put(held, may_alias=False)),
        "quantise": best(lambda: quant._quantize_blocks(device)),
        "scales_to_host": best(lambda: np.array(quant._quantize_blocks(device)[1])),
        "nested": best(lambda: quant._quantize_absmax(absmax)),
    }
    seconds["scales_to_host"] = max(0.0, seconds["scales_to_host"] - seconds["quantise"])
    return {part: round(value * scale, 2) for part, value in seconds.items()}


def first_step(model: Any, rows: int, tokens: int, lap: Callable[[str], None]) -> dict[str, Any]:
    """Optimizer, compiled step and two steps, as SFTTrainer does it."""
    import jax

    from jaxtune.budget import PlannedStep
    from jaxtune.config import SFTConfig
    from jaxtune.optim import make_optimizer
    from jaxtune.step import make_train_step

    optimizer = make_optimizer(SFTConfig(optim="adamw_8bit", learning_rate=2e-4), 1000, model.trainable)
    state = jax.block_until_ready(jax.jit(optimizer.init)(model.trainable))
    lap("optimizer")
    ids = np.random.default_rng(0).integers(3, 259, (1, rows, tokens)).astype(np.int32)
    columns = {
        "input_ids": ids,
        "labels": ids,
        "positions": np.broadcast_to(np.arange(tokens, dtype=np.int32), ids.shape),
        "segment_ids": np.ones_like(ids),
        "starts": np.zeros((1, rows, 1), np.int32),
    }
    plans: list[str] = []
    planned = PlannedStep(
        lambda remat: make_train_step(model, optimizer, remat=remat), model, announce=plans.append
    )
    call = (model.trainable, state, model.base, columns, jax.random.key(0))
    step = planned.compile(call)
    lap("step: trace, lower, compile")
    for name in ("step: first", "step: second"):
        trained, state, metrics = step(*call)
        loss = float(metrics["loss"])
        lap(name)
        call = (trained, state, *call[2:])
    return {"plan": plans, "loss": loss}


def child(args: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    phases: dict[str, dict[str, float]] = {}
    counted: list[Phases] = []
    last = [time.perf_counter()]

    def lap(name: str) -> None:
        now = time.perf_counter()
        seconds[name] = round(now - last[0], 2)
        if counted and (taken := counted[0].take()):
            phases[name] = taken
        last[0] = time.perf_counter()

    from jaxtune import FastLanguageModel, fast

    lap("import")
    import jax

    device = jax.devices()[0]
    counted.append(Phases())
    lap("device")
    weights: dict[str, float] = {}
    load_weights = fast.load_weights

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        leaves = jax.block_until_ready(load_weights(*arguments, **options))
        weights["seconds"] = round(time.perf_counter() - began, 2)
        return leaves

    fast.load_weights = timed
    host: dict[str, float] = {}
    with sampled(host):
        model, _ = FastLanguageModel.from_pretrained(str(args.folder), load_in_4bit=True)
    host["VmHWM"] = status()["VmHWM"] / 1e9
    device_peak = measuring.peak_gb()
    lap("from_pretrained")
    model = FastLanguageModel.get_peft_model(model)
    jax.block_until_ready(model.trainable)
    lap("get_peft_model")
    rows, tokens = map(int, (args.batch or ("1x128" if device.platform == "cpu" else "4x2048")).split("x"))
    result = first_step(model, rows, tokens, lap)
    steps = [name for name in seconds if name.startswith(("step: trace", "step: first", "optimizer"))]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "batch": f"{rows}x{tokens}",
        "seconds": seconds,
        "weights_seconds": weights["seconds"],
        "first_step_seconds": round(sum(seconds[name] for name in steps), 2),
        "phases": phases,
        "model_gb": round(model.memory_bytes() / 1e9, 3),
        "host_gb": {name: round(value, 3) for name, value in host.items()},
        "device_peak_gb": {
            "load": round(device_peak, 3),
            "all": round(measuring.peak_gb(), 3),
        },
        "parts_alone_seconds": parts_alone(model.checkpoint),
        **result,
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Parts as rows, the cold and the warm process as columns."""
    cold, warm = runs["cold"], runs["warm"]
    lines = [f"{'seconds':32s} {'cold':>8s} {'warm':>8s}   programs compiled (of them from the cache)"]
    for name in cold["seconds"]:
        counts = [run["phases"].get(name, {}) for run in (cold, warm)]
        told = ", ".join(f"{c.get('programs', 0):.0f} ({c.get('cache_hits', 0):.0f})" for c in counts)
        lines.append(f"{name:32s} {cold['seconds'][name]:8.2f} {warm['seconds'][name]:8.2f}   {told}")
        if name == "from_pretrained":
            lines.append(
                f"{'  of it the weights':32s} {cold['weights_seconds']:8.2f} {warm['weights_seconds']:8.2f}"
            )
        if "trace" in name:
            for part in ("trace", "lower", "compile"):
                both = [run["phases"][name].get(part, 0) for run in (cold, warm)]
                lines.append(f"{'  of it ' + part:32s} {both[0]:8.2f} {both[1]:8.2f}")
    lines.append(
        f"{'loaded model to end of step 1':32s} {cold['first_step_seconds']:8.2f} {warm['first_step_seconds']:8.2f}"
    )
    for run in ("cold", "warm"):
        host, peak = runs[run]["host_gb"], runs[run]["device_peak_gb"]
        lines.append(
            f"{run}: host GB {', '.join(f'{k} {v:.2f}' for k, v in host.items())}; device peak GB "
            f"{peak['load']:.2f} loading, {peak['all']:.2f} in all; model {runs[run]['model_gb']:.2f} GB; "
            f"loss {runs[run]['loss']:.4f}"
        )
    lines.append(f"alone, one after the other, seconds: {warm['parts_alone_seconds']}")
    return "\n".join([*lines, *cold["plan"]])


def main() -> None:
    args = arguments()
    if args.child:
        print(json.dumps(child(args)))
        return
    if not (args.folder / "config.json").exists():
        make_checkpoint(args)
    read_once(args.folder)
    runs = {}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child"],
                env=os.environ | {"JAXTUNE_COMPILE_CACHE": cache},
                stdout=subprocess.PIPE,
                text=True,
                timeout=120,
            )
            if done.returncode:
                sys.exit(f"the {name} process ended with {done.returncode}")
            runs[name] = json.loads(done.stdout.splitlines()[-1])
            runs[name]["process_seconds"] = round(time.perf_counter() - began, 1)
            (args.out / "load.json").write_text(json.dumps(runs, indent=1))
    print(
        f"{runs['cold']['device']}, jax {runs['cold']['jax']}, {args.model}, {runs['cold']['batch']} tokens"
    )
    print(table(runs))


if __name__ == "__main__":
    main()
