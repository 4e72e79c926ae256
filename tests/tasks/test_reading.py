"""The shipped reading task: rows, held-out numbers, and a model that is made and trained where there is no torch."""

import os
import subprocess
import sys
from pathlib import Path

from jaxtune.tasks import reading

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import sys
judges = "torch", "torchvision", "trl", "peft", "accelerate"
sys.modules |= dict.fromkeys(judges)
import transformers  # which finds that there is no torch
for name in judges:
    del sys.modules[name]
from jaxtune import FastVisionModel, SFTConfig, SFTTrainer
from jaxtune.tasks import reading

folder = reading.make_model(sys.argv[1])
model, processor = FastVisionModel.from_pretrained(str(folder), max_seq_length=64, load_in_4bit=False)
model = FastVisionModel.get_peft_model(model, r=4, finetune_vision_layers=False)
args = SFTConfig(sys.argv[2], max_steps=2, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True)
trainer = SFTTrainer(model=model, args=args, train_dataset=reading.make_rows(4))
print(trainer.train().global_step, "steps")
assert not set(judges) & set(sys.modules), "something imported a judge"
"""


def texts(rows):
    return [row["messages"][1]["content"][0]["text"] for row in rows]


def test_held_out_numbers_are_not_trained_on():
    trained, held_out = texts(reading.make_rows(400)), texts(reading.make_rows(100, held_out=True))
    assert not set(trained) & set(held_out)
    assert {len(text) for text in trained} == {1, 2, 3, 4} and {len(text) for text in held_out} == {4}
    assert {text[-1] for text in held_out} == set("0123456789")


def test_rows_are_the_same_each_time():
    one, other = reading.make_rows(3), reading.make_rows(3)
    assert texts(one) == texts(other)
    images = [[row["messages"][0]["content"][0]["image"].tobytes() for row in rows] for rows in (one, other)]
    assert images[0] == images[1]


def test_ink_is_dark_and_paper_is_light():
    picture = reading.draw("8", seed=1)
    assert picture.size == (28, 28)
    darkest, lightest = picture.getextrema()
    assert darkest < 40 and lightest > 230
    assert sum(picture.histogram()[200:]) > 0.6 * 28 * 28


def test_it_trains_without_torch(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "model"), str(tmp_path / "out")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # quicker to compile
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 steps" in done.stdout
