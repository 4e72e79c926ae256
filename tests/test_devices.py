"""Several devices give what one gives: the runs of devices_program, on 8 devices that a CPU plays; and what is sent."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices_program import GRPO_LAYOUTS, LAYOUTS
from tolerances import DEVICES

from jaxtune.config import LoadArguments, SFTConfig
from jaxtune.data import Batches
from jaxtune.devices import ONE_DEVICE, make_layout
from jaxtune.fast import FastLanguageModel

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("roofline", ROOT / "scripts" / "bench" / "roofline.py")
assert spec is not None and spec.loader is not None
roofline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(roofline)


@pytest.fixture(scope="module")
def folder(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("devices")
    done = subprocess.run(
        [sys.executable, "tests/devices_program.py", str(folder), str(out)],
        capture_output=True, text=True, cwd=ROOT, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def results(out) -> dict[str, np.ndarray]:
    with np.load(out / "results.npz") as file:
        return dict(file)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= DEVICES * np.linalg.norm(want)


SEVERAL = [f"{data}x{fsdp}" for data, fsdp, _ in LAYOUTS if data * fsdp > 1]


@pytest.mark.parametrize("name", [*SEVERAL, "resumed"])
def test_ten_steps_are_those_of_one_device(results, name):
    """Packing, accumulation, dropout, noise, steps that do not fill the devices; resumed: half on 4, half on 2."""
    assert len(results["sft 1x1 loss"]) == 10
    assert_same(results[f"sft {name} loss"], results["sft 1x1 loss"])
    assert_same(results[f"sft {name} weights"], results["sft 1x1 weights"])


def test_evaluation_is_that_of_one_device(results):
    for name in ("8x1", "1x8"):
        assert_same(results[f"eval {name}"], results["eval 1x1"])


@pytest.mark.parametrize("name", [f"{data}x{fsdp}" for data, fsdp in GRPO_LAYOUTS[1:]])
def test_a_grpo_step_is_that_of_one_device(results, name):
    assert_same(results[f"grpo {name} metrics"], results["grpo 1x1 metrics"])
    assert_same(results[f"grpo {name} weights"], results["grpo 1x1 weights"])


@pytest.fixture(scope="module")
def leaves(folder):
    """(those that fsdp splits, bytes by dtype; the trained ones, bytes) of the program's model."""
    from devices_program import TARGETS

    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS)
    codes = sum(x.nbytes for path, x in model.base.items() if path.endswith((".codes", ".absmax")))
    whole = {path: model.base[path].nbytes for path in ("model.embed_tokens.weight", "lm_head.weight")}
    return codes, whole, sum(x.nbytes for x in model.trainable.values())


def test_memory_of_the_base_falls_with_fsdp(results, leaves):
    codes, whole, _ = leaves
    split = codes + sum(whole.values())
    for fsdp in (2, 4, 8):
        assert results[f"bytes 1x{fsdp}"] == results["bytes 1x1"] - split * (fsdp - 1) // fsdp
    assert results["bytes 8x1"] == results["bytes 1x1"]


SCALARS = {("all-reduce", "s32"): 8}  # label tokens, tokens


def test_data_sends_gradients_only(out, leaves):
    _, _, trained = leaves
    sent = roofline.traffic((out / "program 4x1.txt").read_text())
    assert sent == SCALARS | {("all-reduce", "f32"): trained + 8}  # loss and accuracy


def test_fsdp_gathers_codes_and_no_weights_of_layers(out, leaves):
    """Two micro-batches, each forwards and backwards: four times the codes. Floats: the head once, and the embedded
    tokens (not their table)."""
    codes, whole, trained = leaves
    rows = 2 * 4  # micro-batches, devices
    sent = roofline.traffic((out / "program 1x4.txt").read_text())
    assert sent == SCALARS | {
        ("all-reduce", "f32"): trained + 8,
        ("all-gather", "u8"): 4 * codes,
        ("all-gather", "f32"): whole["lm_head.weight"],
        ("all-gather", "s32"): rows * 64 * 4,
        ("all-to-all", "f32"): 2 * 64 * 128 * 4,
    }


def test_a_batch_is_the_sum_of_its_parts():
    """What each process makes, side by side, is what one makes; also where rows are missing."""
    from datasets import Dataset

    rows = [{"input_ids": [i] * (i + 1), "labels": [i] * (i + 1)} for i in range(11)]

    def batches(part, **changes):
        how = {"batch_size": 4, "accumulation": 2, "max_length": 16, "packed": False, "rows_per_step": 7}
        return Batches(Dataset.from_list(rows), part=part, **how | changes)

    one, parts = batches((0, 1)), [batches((i, 2)) for i in range(2)]
    assert one.steps_per_epoch == 2
    for n in range(4):
        made = [part.step(n) for part in parts]
        for name, array in one.step(n).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in made], axis=1), array)
        assert sorted(np.concatenate([part.own_rows(n) for part in parts])) == sorted(one.rows(n))
    for both in zip(one.eval_batches(), *(part.eval_batches() for part in parts), strict=True):
        np.testing.assert_array_equal(
            np.concatenate([b["input_ids"] for b in both[1:]]), both[0]["input_ids"]
        )
    with pytest.raises(ValueError, match="batch_size=4 does not divide into 3 parts"):
        batches((0, 3))


def test_total_batch_size_decides_accumulation():
    args = SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert args.batch_shape(1) == (3, 2, 6) and args.batch_shape(4) == (3, 8, 24)
    args = SFTConfig(per_device_train_batch_size=2, total_batch_size=12)
    assert [args.batch_shape(n) for n in (1, 2, 4)] == [(6, 2, 12), (3, 4, 12), (2, 8, 12)]


def test_layouts_that_cannot_be():
    assert make_layout(0) is ONE_DEVICE  # a CPU host has one unless more are asked for
    with pytest.raises(ValueError, match="devices=2: there are 1"):
        make_layout(0, devices=2)
    with pytest.raises(ValueError, match="data=2 × fsdp=1 is not devices=1"):
        make_layout(0, devices=1, data=2, fsdp=1)
    for wrong in ({"fsdp": 0}, {"data": -1}, {"devices": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            LoadArguments(**wrong)
    with pytest.raises(ValueError, match="expected one of 'auto', a number"):
        LoadArguments(fsdp="all")  # pyrefly: ignore
