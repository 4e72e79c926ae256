"""GRPOTrainer on images with a tiny Qwen2.5-VL: rollouts of the engine, shared prompts, resume, shapes, refusals."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny_vision
from PIL import Image
from tolerances import LOSS, SAMPLER_GAP

from jaxtune import FastVisionModel, GRPOConfig, GRPOTrainer
from jaxtune.data import image_encoder
from jaxtune.rl import images as rl_images
from jaxtune.rl.data import prepare_prompts
from jaxtune.rl.experience import Collator, Experience
from jaxtune.rl.image_batches import ImageCollator

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLOCK = {"step_time", "tokens_per_second", "peak_memory_gib", "eval_runtime"}
SHAPES = [(60, 60), (90, 60), (60, 120), (120, 40)]


def make_rows(count=6):
    """Conversations with none, one or two images, as Unsloth's notebooks have them in a column."""

    def row(i):
        pictures = [tiny_vision.picture(*SHAPES[(i + k) % 4], 10 * i + k) for k in range([1, 2, 0][i % 3])]
        parts = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": "what" + "?" * i}]
        return {"prompt": [{"role": "user", "content": parts}], "images": pictures, "answer": i}

    return [row(i) for i in range(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory, quick_compilation):
    """The model without an adapter, and its processor."""
    config = tiny_vision.make_config(
        "qwen2_5_vl",
        text_config={"num_hidden_layers": 2},
        vision_config={"depth": 2, "fullatt_block_indexes": [1]},
    )
    folder = tiny_vision.save(tiny_vision.make_model(config), tmp_path_factory.mktemp("qwen2_5_vl"))
    return FastVisionModel.from_pretrained(folder, max_seq_length=128, dtype="float32", load_in_4bit=False)


def odd(completion_ids, **_):
    return [float(sum(ids) % 3) for ids in completion_ids]


def make_trainer(base, output_dir, rows=None, *, reward_funcs=odd, eval_dataset=None, tools=None, rollout_func=None,
                 **settings):  # fmt: skip
    model, processor = base
    model = FastVisionModel.get_peft_model(model, r=4, target_modules=["q_proj", "qkv"])
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 10, "max_steps": 3,
        "learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "beta": 0.04,
        "lr_scheduler_type": "constant", "per_device_eval_batch_size": 4,
    }  # fmt: skip
    args = GRPOConfig(str(output_dir), **defaults | settings)
    return GRPOTrainer(
        model, reward_funcs, args, make_rows() if rows is None else rows, processing_class=processor,
        eval_dataset=eval_dataset, tools=tools, rollout_func=rollout_func,
    )  # fmt: skip


def results(trainer):
    history = trainer.state.log_history
    return [{k: v for k, v in r.items() if k not in CLOCK and not k.startswith("train_")} for r in history]


SAMPLED = {
    "steps_per_generation": 3,
    "loss_type": "grpo",
    "importance_sampling_correction": True,
    "max_steps": 5,
}


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    settings = SAMPLED | {"save_strategy": "steps", "save_steps": 4, "log_completions": True}
    trainer = make_trainer(base, tmp_path_factory.mktemp("whole"), eval_dataset=make_rows(2), **settings)
    trainer.train()
    return trainer


def test_the_engine_sees_what_training_sees(uninterrupted):
    """Its log-probabilities are those that training computes of the same tokens, images and all."""
    gaps = [r["sampling/sampling_logp_difference/max"] for r in results(uninterrupted) if "reward" in r]
    assert len(gaps) == 2 and max(gaps) < SAMPLER_GAP
    assert {"eval_loss", "eval_reward"} <= uninterrupted.evaluate().keys()


def test_few_compilations(uninterrupted):
    """Rows of one length, and images of at most three shapes; the last holds any."""
    shapes = uninterrupted._collector.collator.shapes
    assert 1 <= len(shapes) <= 3
    assert uninterrupted.compilations <= len(shapes)
    assert uninterrupted._collector.policy.score._cache_size() <= len(shapes)


def test_resume_is_bitwise_equal(base, uninterrupted, tmp_path):
    checkpoint = Path(uninterrupted.args.output_dir) / "checkpoint-4"
    assert (checkpoint / "experience.npz").is_file()  # in the middle of a generation
    resumed = make_trainer(base, tmp_path, **SAMPLED)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in uninterrupted.model.trainable.items():
        np.testing.assert_array_equal(np.asarray(resumed.model.trainable[name]), np.asarray(value))
    other = make_rows()
    other[0]["images"] = [tiny_vision.picture(60, 60, 99)]
    with pytest.raises(ValueError, match=r"data \(digest\)"):
        make_trainer(base, tmp_path, other, **SAMPLED).train(resume_from_checkpoint=str(checkpoint))


def scripted(prompts, trainer):
    """A rollout_func."""
    rng = np.random.default_rng(trainer.state.global_step)
    render = trainer.processing_class.apply_chat_template
    made = [render(one, add_generation_prompt=True, tokenize=True, return_dict=True) for one in prompts]
    ids = [rng.integers(3, 259, rng.integers(2, 8)).tolist() for _ in prompts]
    ids[0][0] = trainer.model.config.image_token_id  # what the model wrote is text, whatever it is
    return {"prompt_ids": [one["input_ids"][0] for one in made], "completion_ids": ids, "logprobs": None}


def test_images_are_opened_ahead_and_by_the_workers(base, tmp_path, monkeypatch):
    """Those of the next generation too, while this one trains; rewards get them as PIL images."""
    data = datasets.Dataset.from_list([row for row in make_rows(9) if row["images"]])
    data = data.cast_column("images", datasets.List(datasets.Image(decode=True)))
    seen = []

    def wide(prompts, images, **_):
        for prompt, pictures in zip(prompts, images, strict=True):
            assert [part["image"] for part in prompt[0]["content"] if part["type"] == "image"] == pictures
        seen.extend(images)
        return [float(sum(one.width for one in pictures)) for pictures in images]

    settings = {"shuffle_dataset": False, "beta": 0.0}
    trainer = make_trainer(base, tmp_path, data, reward_funcs=wide, rollout_func=scripted, **settings)

    def refuse(*_):
        raise AssertionError("an image is opened in the main process")

    for module in (image_encoder, rl_images):
        monkeypatch.setattr(module, "open_image", refuse)
    trainer._step_batch(0)
    assert [len(pictures) for pictures in seen] == [1, 1, 2, 2]
    assert trainer._images is not None and {2, 3} <= trainer._images._begun.keys()
    trainer._images.close()


def test_other_columns_of_images_are_opened(base, tmp_path):
    """As `datasets` decodes them: PIL images in their own mode, in lists too."""
    masks = [tiny_vision.picture(20 + i, 10, i).convert("L") for i in range(6)]
    rows = [
        {**row, "mask": mask, "views": [mask, mask], "note": None}
        for row, mask in zip(make_rows(), masks, strict=True)
    ]
    kinds = {"mask": datasets.Image(), "views": datasets.List(datasets.Image())}
    data = datasets.Dataset.from_list(rows)
    for name, kind in kinds.items():
        data = data.cast_column(name, kind)
    trainer = make_trainer(base, tmp_path, data, dataloader_num_workers=1)
    for i, row in enumerate(trainer._prompts.rows):
        for found in (row["mask"], *row["views"]):
            assert found.mode == "L" and found.tobytes() == masks[i].tobytes()
        assert row["note"] is None and list(row) == data.column_names
    trainer._images.close()
    broken = data.cast_column("mask", datasets.Image(decode=False))
    bad = {"bytes": broken[4]["mask"]["bytes"][:-40], "path": None}
    broken = broken.map(lambda _, i: {"mask": bad} if i == 4 else {}, with_indices=True)
    trainer = make_trainer(base, tmp_path, broken, dataloader_num_workers=1)
    with pytest.raises(ValueError, match=r"row 4: .* is damaged"):
        trainer._prompts.rows[4]
    trainer._images.close()


def test_each_process_opens_the_images_of_its_devices(base, tmp_path):
    """Two devices of two processes: each has the images of its rows, counted from its own first."""
    trainer = make_trainer(base, tmp_path, dataloader_num_workers=1)
    images, prompts = trainer._images, trainer._prompts
    assert images is not None
    numbers = [0, 1, 3, 2]  # with one image, two, one, none
    experience = Experience(
        prompt_ids=[np.asarray(prompts.ids[i], np.int32) for i in numbers],
        completion_ids=[np.asarray([images.family.image_token_id, 5], np.int32)] * 4,
        advantages=np.ones(4, np.float32),
        num_items=8.0,
        per_token={"mask": [np.ones(2, np.float32)] * 4},
        documents=np.asarray([prompts.documents[i] for i in numbers]),
    )

    def batch(rows, *how):
        made = ImageCollator(Collator(128, 0), images, lambda: [shape], *how)
        return made([(experience, rows)], len(rows))

    shape = dict.fromkeys(images.names, 256)
    halves = [batch(range(first, first + 2)) for first in (0, 2)]
    for process in range(2):
        found = batch(range(4), 2, (process, 2))
        np.testing.assert_array_equal(
            found["image_slots"], np.concatenate([h["image_slots"] for h in halves], 1)
        )
        own = slice(2 * process, 2 * process + 2)
        np.testing.assert_array_equal(found["rope_positions"][:, own], halves[process]["rope_positions"])
        for name, array in found["images"].items():
            np.testing.assert_array_equal(np.split(array, 2, 1)[process], halves[process]["images"][name])
            assert not np.split(array, 2, 1)[1 - process].any()
    images.close()


def test_a_prompt_that_stands_once_trains_the_same(base, tmp_path):
    """Its images stand once too."""

    histories = []
    for shared in (False, True):
        settings = {"shared_prefix": shared, "max_completion_length": 8, "max_steps": 2}
        trainer = make_trainer(base, tmp_path / str(shared), rollout_func=scripted, **settings)
        trainer.train()
        histories.append(trainer.state.log_history)
    for apart, shared in zip(histories[0][:2], histories[1][:2], strict=True):
        assert shared["grad_norm"] > 0
        for name in ("loss", "grad_norm", "kl", "entropy", "reward"):
            assert apart[name] == pytest.approx(shared[name], rel=1e2 * LOSS, abs=1e-6), name


def test_the_cells_of_a_vision_grpo_notebook(base, tmp_path):
    """Prompts rendered to text, an image in a column of a dataset; the reward sees the other columns."""
    processor, seen = base[1], []

    def render(row):
        parts = [{"type": "image"}, {"type": "text", "text": f"what is {row['answer']}?"}]
        prompt = [{"role": "user", "content": parts}]
        return {
            "prompt": processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True),
            "image": row["images"][0],
        }

    rows = [row for row in make_rows(9) if row["images"]]
    data = datasets.Dataset.from_list([render(row) | {"answer": row["answer"]} for row in rows])

    def correctness(prompts, completions, answer, image, **_):
        assert all(isinstance(one, Image.Image) for one in image)
        assert all(f"what is {number}?" in text for text, number in zip(prompts, answer, strict=True))
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(
        base, tmp_path, data, reward_funcs=[correctness], max_steps=1, loss_type="dr_grpo", beta=0.0,
        importance_sampling_level="sequence", mask_truncated_completions=False, max_prompt_length=64,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 4 and all(isinstance(text, str) for text in seen)
    trainer.model.save_lora(tmp_path / "lora")
    request = trainer.model.load_lora(tmp_path / "lora")
    prompt = {"prompt": data[0]["prompt"], "multi_modal_data": {"image": data[0]["image"]}}
    assert trainer.model.fast_generate(prompt, lora_request=request)[0].outputs[0].token_ids


def tool(x: int) -> int:
    """Something.

    Args:
        x: a number.
    """
    return x


def test_what_does_not_go_with_images(base, tmp_path):
    with pytest.raises(ValueError, match="tools do not go with images"):
        make_trainer(base, tmp_path, tools=[tool])
    with pytest.raises(
        ValueError, match=r"this one is on others \(model.visual.*finetune_vision_layers=False"
    ):
        make_trainer(base, tmp_path, use_vllm=True, vllm_mode="server")
    rows = [row | {"images": row["images"] + [tiny_vision.picture(60, 60)]} for row in make_rows()]
    with pytest.raises(ValueError, match="row 0: 1 image placeholders in its messages and 2 images"):
        make_trainer(base, tmp_path, rows)
    lengths = [len(ids) for ids in make_trainer(base, tmp_path)._prompts.ids]
    short, said = (
        min(lengths),
        rf"5 of 6 prompts .*max_prompt_length={min(lengths)}: row 0 \({lengths[0]} tokens\)",
    )
    with pytest.raises(ValueError, match=said):
        make_trainer(base, tmp_path, max_prompt_length=short, too_long="raise")
    with pytest.raises(ValueError, match="GRPO needs a column 'prompt'"):
        make_trainer(base, tmp_path, [{"text": "a", "image": tiny_vision.picture(60, 60)}])

    def blind(prompts, trainer):
        return {"prompt_ids": [[3, 4]] * 4, "completion_ids": [[5]] * 4, "logprobs": None}

    trainer = make_trainer(base, tmp_path, rollout_func=blind)
    with pytest.raises(ValueError, match="prompt_ids of completion 0: the images of this row take"):
        trainer.train()


def test_some_rows_have_images(base, tmp_path):
    """Whichever: the first, where the columns of a list are looked at, has none."""
    processor, seen = base[1], []
    with_image, without = make_rows(3)[0], {"prompt": "say", "answer": 7}
    render = processor.apply_chat_template
    prompt = render(with_image["prompt"], tokenize=False, add_generation_prompt=True)
    rows = [without, {**with_image, "prompt": prompt}]

    def count(images, **_):
        seen.append([len(one or ()) for one in images])
        return [0.0, 1.0] * 2

    settings = {"reward_funcs": count, "shuffle_dataset": False, "beta": 0.0, "max_steps": 1}
    trainer = make_trainer(base, tmp_path, rows, **settings)
    trainer.train()
    assert seen == [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match="row 1 has images, and tools do not go with images"):
        make_trainer(base, tmp_path, rows, tools=[tool])
    text = {"tokenizer": processor.tokenizer, "args": GRPOConfig(), "limit": 1024}
    with pytest.raises(ValueError, match=r"1 of 2 rows have images \(the first is row 1\), and the model"):
        prepare_prompts(rows, **text)
    parts = [{"type": "image", "image": tiny_vision.picture(60, 60)}, {"type": "text", "text": "what"}]
    talks = [{"prompt": [{"role": "user", "content": content}]} for content in ("say", parts)]
    with pytest.raises(ValueError, match="1 of 2 rows have images"):
        prepare_prompts(talks, **text)


def test_an_image_that_changes_ends_the_run(base, tmp_path):
    """Also where its size, and so the number of its tokens, stays."""
    file = tmp_path / "a.png"
    tiny_vision.picture(60, 60, 0).save(file)
    parts = [{"type": "image", "image": str(file)}, {"type": "text", "text": "what"}]
    rows = [{"prompt": [{"role": "user", "content": parts}]}] * 2
    trainer = make_trainer(base, tmp_path / "out", rows, max_steps=1)
    tiny_vision.picture(60, 60, 1).save(file)
    with pytest.raises(ValueError, match=r"row \d: an image has changed since the data was checked"):
        trainer.train()


def test_a_model_of_images_trains_on_text(base, tmp_path):
    """Messages go through its processor's template; there is no tower in the step."""
    rows = [{"prompt": [{"role": "user", "content": "say " + "x" * i}]} for i in range(4)]
    trainer = make_trainer(base, tmp_path, rows, max_steps=1)
    trainer.train()
    assert "images" not in trainer._step_batch(0)
    assert np.isfinite(trainer.state.log_history[0]["loss"])
