"""`python -m jaxtune.train` and `jaxtune.evaluate.reading` on a file with image paths and a tiny Qwen2.5-VL."""

import json

import pytest
import tiny_vision

from jaxtune import train
from jaxtune.evaluate.reading import __main__ as reading

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUESTION = "What stands there?"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    small = {
        "text_config": {"num_hidden_layers": 1},
        "vision_config": {"depth": 1, "fullatt_block_indexes": [0]},
    }
    theirs = tiny_vision.make_model(tiny_vision.make_config("qwen2_5_vl", **small))
    return tiny_vision.save(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of rows {image, text}, its images beside it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rows = []
    for number in range(6):
        tiny_vision.picture(60, 60, number).save(folder / "images" / f"{number}.png")
        rows.append({"image": f"images/{number}.png", "text": f"word {number}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def arguments(model_dir, data):
    found = ["--model_name", str(model_dir), "--dataset", str(data), "--image_instruction", QUESTION]
    found += ["--max_length", "128", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "1"]
    return [*found, "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]


def test_dry_run_shows_masks_and_images(arguments, tmp_path, capsys):
    arguments += ["--output_dir", str(tmp_path / "out"), "--eval_split", "train[:2]"]
    assert train.main([*arguments, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "image_instruction: What stands there?" in shown and "evaluation (8 × " in shown
    assert "predicted peak on the device" in shown
    assert "<|vision_start|>" in shown and "[image: 4 tokens, " in shown
    assert "word 0<|im_end|>" in shown and not (tmp_path / "out").exists()


def test_rows_that_an_instruction_does_not_fit(arguments, data, tmp_path, capsys):
    """Neither trained as text alone (as imagefolder's rows would be) nor a traceback."""
    for change, words in (
        (
            lambda row: {"file_name": row["image"], "text": row["text"]},
            "columns file_name, text, none of them",
        ),
        (
            lambda row: row | {"image": None if row["text"] == "word 1" else row["image"]},
            "row 1: no image to ask",
        ),
    ):
        rows = [change(json.loads(line)) for line in data.read_text().splitlines()]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changed = [str(tmp_path / "rows.jsonl") if one == str(data) else one for one in arguments]
        assert train.main([*changed, "--image_folder", str(data.parent), "--dry_run"]) == 2
        assert words in capsys.readouterr().err


def test_a_missing_image_is_one_line(arguments, data, tmp_path, capsys):
    rows = data.read_text().replace("images/3.png", "images/none.png")
    (tmp_path / "rows.jsonl").write_text(rows)
    changed = [str(tmp_path / "rows.jsonl") if one == str(data) else one for one in arguments]
    folder = ["--image_folder", str(data.parent), "--output_dir", str(tmp_path / "out")]
    assert train.main([*changed, *folder]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 6 rows cannot be used: row 3: 'images/none.png' does not exist")


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train.main([*arguments, "--output_dir", str(folder), "--learning_rate", "1e-2"]) == 0
    return folder


def test_a_run_trains_tower_and_decoder(trained):
    assert (trained / "adapter" / "preprocessor_config.json").is_file()
    targets = json.loads((trained / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert "visual" in str(targets) and "language_model" in str(targets)


def test_reading_compares_base_adapter_and_merged(trained, data, tmp_path, capsys):
    out = tmp_path / "reading"
    given = [str(trained), "--data", str(data), "--instruction", QUESTION, "--output_dir", str(out)]
    assert reading.main([*given, "--max_new_tokens", "4", "--limit", "3", "--batch_size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "CER" in shown and "word 2" in shown
    results = json.loads((out / "results.json").read_text())
    assert [label.split()[0] for label in results["models"]] == ["base", "adapter", f"{trained}/merged"]
    assert all(one["cer"] > 0 for one in results["models"].values())
    rows = [json.loads(line) for line in (out / "readings.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == ["word 0", "word 1", "word 2"]
    assert all(len(row["readings"]) == 3 for row in rows)
    assert (out / "readings.md").read_text().startswith("| model | CER | WER | exact |")


def test_reading_refuses_in_one_line(model_dir, data, tmp_path, capsys):
    given = [str(model_dir), "--data", str(data), "--output_dir", str(tmp_path)]
    assert reading.main(given) == 2
    assert "row 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        reading.main([*given, "--batch_size", "0"])
    assert stop.value.code == 2
    assert reading.main([str(tmp_path / "none"), "--data", str(data), "--instruction", "x"]) == 2


def test_the_text_model_alone(model_dir, tmp_path, capsys):
    rows = [{"prompt": f"Count to {n}.", "completion": str(n)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        f"--model_name {model_dir} --text_only --dataset {tmp_path}/rows.jsonl --output_dir {tmp_path}/out"
    )
    command += " --max_length 64 --per_device_train_batch_size 2 --max_steps 1 --save_strategy no"
    assert train.main([*command.split(), "--dry_run"]) == 0
    assert "model (qwen2)" in capsys.readouterr().out
    assert train.main(command.split()) == 0
    targets = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets and all(name.startswith("model.language_model.layers.") for name in targets)
