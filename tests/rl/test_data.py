"""Which prompts, in which order, as which tokens; and rows as arrays."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.data import make_plan, prepare_prompts
from jaxtune.rl.experience import Collator, Experience

PLANS = [  # per_device_train_batch_size, num_generations, accumulation, steps_per_generation, num_iterations
    (4, 2, 1, 1, 1),
    (4, 4, 2, 2, 2),
    (2, 2, 2, 3, 1),
    (2, 4, 3, 2, 1),
]
NAMES = """per_device_train_batch_size num_generations gradient_accumulation_steps steps_per_generation
    num_iterations""".split()


@pytest.mark.parametrize("numbers", PLANS)
def test_plan_is_trls(numbers):
    """Prompts in the order of RepeatSampler; a step's micro-batches as Trainer cuts the epoch."""
    from trl.trainer.utils import RepeatSampler

    args = GRPOConfig(**dict(zip(NAMES, numbers)), shuffle_dataset=False)
    plan = make_plan(args, 7)
    repeats = args.num_iterations * args.generation_steps
    sampler = RepeatSampler(range(7), args.num_generations, plan.unique, repeats, shuffle=False)
    theirs = list(itertools.batched(sampler, args.generation_rows))  # one for each micro-batch of an epoch
    assert plan.micros_per_epoch == len(theirs)
    accumulation = args.gradient_accumulation_steps
    assert plan.steps_per_epoch == -(-len(theirs) // accumulation)
    for epoch in range(2):
        for number, rows in enumerate(itertools.batched(range(len(theirs)), accumulation)):
            micros = plan.micros(epoch * plan.steps_per_epoch + number)
            assert len(micros) == len(rows)
            for micro, row in zip(micros, rows):
                assert np.repeat(plan.prompts(micro.generation), plan.group).tolist() == list(theirs[row])
                assert micro.is_first == (row % repeats == 0)
                assert micro.part == row % args.generation_steps


def test_random_order_is_a_function_of_seed_and_epoch():
    plan = make_plan(GRPOConfig(per_device_train_batch_size=4, num_generations=2), 9)
    epochs = [np.concatenate([plan.prompts(4 * e + g) for g in range(4)]) for e in range(2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert sorted(plan.row_order(3)) == list(range(4))
    others = plan.other_prompts(0, 1, 5)
    assert len(set(others)) == 5 and not set(others) & set(plan.prompts(0))


def test_too_few_prompts():
    with pytest.raises(ValueError, match="has 3 prompts and one generation takes 4"):
        make_plan(GRPOConfig(per_device_train_batch_size=8, num_generations=2), 3)


def test_prompts_as_tokens(tiny_tokenizer):
    args = GRPOConfig(max_completion_length=10, chat_template_kwargs={"unused": True})
    text = prepare_prompts([{"prompt": "ab"}, {"prompt": "c"}], tiny_tokenizer, args, limit=64)
    assert text.ids == tiny_tokenizer(["ab", "c"])["input_ids"]
    messages = [{"role": "user", "content": "hi"}]
    chat = prepare_prompts([{"prompt": messages}], tiny_tokenizer, args, limit=64)
    assert tiny_tokenizer.decode(chat.ids[0]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.digest() != text.digest()


def test_a_digest_is_of_pixels(tiny_tokenizer):
    """Not of the address of an image that a column holds, which another process has elsewhere."""

    def digest(colour):
        rows = [{"prompt": "ab", "chart": Image.new("RGB", (2, 2), colour)}]
        return prepare_prompts(rows, tiny_tokenizer, GRPOConfig(max_completion_length=10), limit=64).digest()

    assert digest("red") == digest("red") != digest("blue")


def test_long_prompts_are_left_out_or_refused(tiny_tokenizer, caplog):
    """By name and count, as the user chose; the message names the limit that is at work."""
    rows = [{"prompt": "a" * n} for n in (5, 20, 6, 0)]

    def prepared(limit=1024, **settings):
        return prepare_prompts(rows, tiny_tokenizer, GRPOConfig(**settings), limit=limit)

    kept = prepared(max_prompt_length=8)
    assert [len(ids) for ids in kept.ids] == [5, 6] and kept.longest() == 6
    fault = (
        "2 of 4 prompts are empty or longer than max_prompt_length=8: row 1 (20 tokens), row 3 (0 tokens); "
    )
    assert fault + "they are dropped" in caplog.text
    with pytest.raises(ValueError, match=re.escape(fault) + ".*Raise max_prompt_length.*too_long='drop'"):
        prepared(max_prompt_length=8, too_long="raise")
    with pytest.raises(
        ValueError, match=r"than 14 tokens \(max_seq_length=24 less max_completion_length=10\): "
    ):
        prepared(limit=24, max_completion_length=10, too_long="raise")
    with pytest.raises(
        ValueError, match="4 of 4 prompts are empty or longer than max_prompt_length=3: row 0"
    ):
        prepared(max_prompt_length=3)
    with pytest.raises(ValueError, match="too_long"):
        GRPOConfig(too_long="cut")
    with pytest.raises(ValueError, match="leaves no room for a prompt in the 512 tokens"):
        prepare_prompts(rows, tiny_tokenizer, GRPOConfig(), limit=512)


@pytest.fixture
def experience():
    int_rows = lambda *rows: [np.asarray(row, np.int32) for row in rows]  # noqa: E731
    return Experience(
        prompt_ids=int_rows([5, 6, 7], [8]),
        completion_ids=int_rows([9, 2], [3, 4, 5]),
        advantages=np.asarray([1.0, -1.0], np.float32),
        num_items=4.0,
        per_token={
            "mask": [np.asarray([1, 1], np.float32), np.asarray([1, 0, 1], np.float32)],
            "old_log_probs": [np.asarray([-1, -2], np.float32), np.asarray([-3, -4, -5], np.float32)],
        },
    )


def test_values_stand_where_tokens_are_predicted(experience):
    batch = Collator(100, pad=0)([(experience, [1, 0]), (experience, [])], 3)
    assert batch["input_ids"].shape == (2, 3, 64)
    assert batch["input_ids"][0, 1, :6].tolist() == [5, 6, 7, 9, 2, 0]
    assert batch["mask"][0, 1, :6].tolist() == [0, 0, 1, 1, 0, 0]
    assert batch["old_log_probs"][0, 0, :5].tolist() == [-3, -4, -5, 0, 0]
    assert batch["positions"][0, 0, :5].tolist() == [0, 1, 2, 3, 0]
    assert batch["segment_ids"].sum() == 9 and batch["advantages"][0].tolist() == [-1, 1, 0]
    back = Collator(100, pad=0).unpad(batch["old_log_probs"][0, :2], experience, [1, 0])
    assert [row.tolist() for row in back] == [[-3, -4, -5], [-1, -2]]
    with pytest.raises(ValueError, match="came 5 tokens, more than the 4"):
        Collator(4, pad=0)([(experience, [0])], 1)


def test_experience_is_kept_bit_for_bit(experience, tmp_path):
    experience.save(tmp_path / "e.npz")
    again = Experience.load(tmp_path / "e.npz")
    assert again.per_token.keys() == experience.per_token.keys()
    pairs = [(again.prompt_ids, experience.prompt_ids), (again.completion_ids, experience.completion_ids)]
    pairs += [(again.per_token[name], experience.per_token[name]) for name in experience.per_token]
    for ours, theirs in pairs:
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert np.array_equal(again.advantages, experience.advantages) and again.num_items == 4.0
