"""Rows with images: tokens and labels against TRL's collator, errors that name the row, and what a batch holds.

Images go through transformers' Qwen2VLImageProcessorPil (see tests/tiny_processors.py).
"""

import copy
import io
import logging

import datasets
import numpy as np
import pytest
import tiny_processors
import tiny_vision
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from jaxtune.data import VisionBatches, VisionDataCollator, pack, preparation_report, train_on_responses_only
from jaxtune.data.columns import IGNORE
from jaxtune.data.image_rows import has_images, read_row


def picture(number: int, size=(56, 42)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def talk(*turns) -> list[dict]:
    """Messages of alternating user and assistant turns; a number is an image."""
    parts = lambda turn: [  # noqa: E731
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn
    ]
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": parts(turn)} for i, turn in enumerate(turns)]


ONE = {"messages": talk([0, "what is it?"], ["a cat"]), "images": [picture(0)]}
SEVERAL = {
    "messages": talk([0, "and", 1, "?"], ["same"], ["this", 2], ["other"]),
    "images": [picture(1, (28, 28)), picture(2, (70, 100)), picture(3)],
}
NONE = {"messages": talk(["hello"], ["hi"]), "images": []}
PLAIN = {
    "messages": [{"role": "user", "content": "look"}, {"role": "assistant", "content": "yes"}],
    "images": [picture(4), picture(5)],
}
ASKED = {"prompt": talk([0, "what is it?"]), "completion": talk([], ["a dog"])[1:], "images": [picture(6)]}
WRITTEN = {"text": "<|vision_start|><|image_pad|><|vision_end|>a bird", "image": picture(7)}
STRINGS = {
    "prompt": "<|vision_start|><|image_pad|><|vision_end|>?",
    "completion": " fish",
    "images": [picture(8)],
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_processors.make_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture
def collator(processor):
    made = []

    def make(**arguments):
        made.append(VisionDataCollator(tiny_processors.stand_in(), processor, resize="max", **arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def trl(processor, rows, **options):
    """(ids, labels) of TRL's collator, padding left out."""
    batch = DataCollatorForVisionLanguageModeling(processor, **options)(copy.deepcopy(rows))
    return [
        (ids[mask == 1].numpy(), labels[mask == 1].numpy())
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        )
    ], batch


def without_placeholders(processor, ids, labels):
    """TRL trains on the tokens that stand for images; Unsloth and jaxtune do not."""
    names = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    marks = [processor.tokenizer.convert_tokens_to_ids(name) for name in names]
    return np.where(np.isin(ids, marks), IGNORE, labels)


CASES = {
    "messages": ([ONE, SEVERAL, NONE], {}),
    "text_contents": ([PLAIN], {}),
    "prompt_completion": ([ASKED, {**ASKED, "images": [picture(16)]}], {"completion_only_loss": True}),
    "prompt_completion_all": ([ASKED], {"completion_only_loss": False}),
    "strings": ([STRINGS], {"completion_only_loss": True}),
    "text": ([WRITTEN], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_trl(case, processor, collator):
    rows, options = CASES[case]
    theirs, batch = trl(processor, rows, **options)
    ours = collator(completion_only_loss=options.get("completion_only_loss", True))
    prepared = ours.prepare(rows, progress=False)
    shown = ours(rows)
    for place, (row, (ids, labels)) in enumerate(zip(prepared, theirs, strict=True)):
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == without_placeholders(processor, ids, labels).tolist()
        assert shown["labels"][place, : len(ids)].tolist() == row["labels"]
        assert (shown["labels"][place, len(ids) :] == IGNORE).all()
    np.testing.assert_array_equal(shown["pixel_values"], batch["pixel_values"].numpy())


@pytest.mark.parametrize("marked", [False, True])
def test_assistant_only_equals_trl(marked, processor, tmp_path):
    """TRL needs marks in the template; without them the turns are found by what each adds."""
    with_marks = tiny_processors.make_processor(tmp_path, tiny_processors.MARKED_TEMPLATE)
    rows = [
        {**row, "messages": [{"role": "system", "content": "be brief"}, *row["messages"]]}
        for row in (ONE, SEVERAL)
    ]
    theirs, _ = trl(with_marks, rows, assistant_only_loss=True)
    own = with_marks if marked else processor
    ours = VisionDataCollator(tiny_processors.stand_in(), own, resize="max", assistant_only_loss=True)
    for row, (ids, labels) in zip(ours.prepare(rows, progress=False), theirs, strict=True):
        assert row["input_ids"] == ids.tolist() and row["labels"] == labels.tolist()


def said(collator, row):
    return collator.tokenizer.decode([label for label in row["labels"] if label != IGNORE])


def test_responses_only(collator):
    for parts in ({}, {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}):
        ours = collator(train_on_responses_only=True, **parts)
        assert [said(ours, row) for row in ours.prepare([ONE, SEVERAL], progress=False)] == [
            "a cat<|im_end|>\n",
            "same<|im_end|>\nother<|im_end|>\n",
        ]
    last = collator(train_on_responses_only=True, last_response_only=True)
    assert said(last, last.prepare([SEVERAL], progress=False)[0]) == "other<|im_end|>\n"


def test_responses_only_of_a_trainer_keeps_the_images(collator, processor):
    from types import SimpleNamespace

    ours = collator()
    prepared = ours.prepare([ONE, SEVERAL], progress=False)
    trainer = SimpleNamespace(processing_class=processor, train_dataset=prepared, eval_dataset=None)
    masked = train_on_responses_only(trainer).train_dataset
    assert masked["documents"][:] == [[0], [1]] and said(ours, masked[0]) == "a cat<|im_end|>\n"


# -- formats -------------------------------------------------------------------------------------------------


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_every_format_is_the_same_document(tmp_path):
    image, want = picture(9), talk([0, "what?"], ["it"])
    path = tmp_path / "x.png"
    image.save(path)

    def inline(part):
        first = {"role": "user", "content": [part, {"type": "text", "text": "what?", "image": None}]}
        return [first, {"role": "assistant", "content": "it"}]

    rows = [
        {"messages": want, "images": [image]},
        {"messages": inline({"type": "image", "image": image, "text": None})},
        {"conversations": inline({"type": "image", "url": str(path)})},
        inline({"type": "image_url", "image_url": {"url": path.as_uri()}}),
        {"messages": inline({"type": "image", "bytes": png(image)})},
        {
            "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it"}],
            "image": image,
        },
        {
            "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "it"}],
            "image": image,
        },
    ]
    for row in rows:
        document = read_row(row, 0)
        assert (document.prompt, len(document.images)) == (want, 1), row
        assert has_images(row)
    assert not has_images({"messages": talk(["a"], ["b"])})


@pytest.mark.parametrize(
    "roles", [("user", "assistant", "user", "assistant"), ("system", "user", "user", "user")]
)
@pytest.mark.parametrize("place", range(3))
def test_a_placeholder_stands_where_it_is_among_texts(place, roles):
    parts = [{"type": "image"}, {"type": "text", "text": "c"}]
    contents = ["a", "b", "c", "d"]
    contents[contents.index("c")], contents[place] = contents[place], parts
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    document = read_row({"messages": messages, "images": [picture(0)]}, 0)
    assert [[part["type"] for part in message["content"]] for message in document.prompt] == [
        ["image", "text"] if i == place else ["text"] for i in range(4)
    ]


@pytest.mark.parametrize("beside", [{"images": [], "image": picture(0)}, {"images": [picture(0), None]}])
def test_places_without_an_image_are_none(beside):
    assert read_row({"messages": ONE["messages"], **beside}, 0).images == (picture(0),)
    assert read_row({"messages": NONE["messages"], "images": [None], "image": None}, 0).images == ()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"images": [], "text": "a cat"}, "row 1: no image to ask about"),
        ({"images": [None], "text": "a cat"}, "row 1: no image to ask about"),
        (
            {"image": picture(0), "label": 3},
            r"row 1: no text in image \(Image\), label \(int\); .* not its number",
        ),
    ],
)
def test_rows_that_an_instruction_is_not_for(row, message, collator):
    with pytest.raises(ValueError, match=message):
        collator(instruction="What is it?").prepare(
            [{"image": picture(0), "text": "a cat"}, row], progress=False
        )


def test_a_dataset_keeps_its_images_undecoded(collator, tmp_path):
    rows = [{"messages": ONE["messages"], "images": [png(ONE["images"][0])]}] * 3
    text = datasets.Value("string")
    messages = [{"role": text, "content": [{"type": text, "text": text}]}]
    features = datasets.Features({"messages": messages, "images": datasets.List(datasets.Image())})
    table = {name: [row[name] for row in rows] for name in features}
    dataset = datasets.Dataset.from_dict(table, features=features)
    ours = collator()
    prepared = ours.prepare(dataset, progress=False)
    assert prepared[0]["input_ids"] == ours.prepare([ONE], progress=False)[0]["input_ids"]
    assert isinstance(ours.document(0).images[0], dict)


def test_paths_beside_a_file(collator, tmp_path):
    (tmp_path / "images").mkdir()
    ONE["images"][0].save(tmp_path / "images" / "0.png")
    for image in ("images/0.png", {"path": "images/0.png"}, {"path": "images/0.png", "bytes": None}):
        rows = datasets.Dataset.from_list([{"messages": PLAIN["messages"], "image": image}])
        rows.to_json(tmp_path / "rows.jsonl")
        for function in (None, dict):
            prepared = collator(formatting_func=function).prepare(
                str(tmp_path / "rows.jsonl"), progress=False
            )
            assert len(prepared) == 1


# -- formatting_func ---------------------------------------------------------------------------------------------


def stored_images(tmp_path, count: int = 2) -> datasets.Dataset:
    """A dataset of images as bytes, the last turned by its EXIF orientation."""
    paths = [str(tmp_path / f"{i}.jpg") for i in range(count)]
    for i, path in enumerate(paths):
        exif = Image.Exif()
        exif[0x0112] = 6 if i + 1 == count else 1
        picture(i).save(path, exif=exif)
    table = datasets.Dataset.from_dict({"picture": paths, "said": ["a", "b"][:count]})
    return table.cast_column("picture", datasets.Image())


def conversation(image, said) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": said}]


def test_a_formatting_function_gets_pil_images(collator, tmp_path):
    """As `datasets` decodes them, so what it does to them is what it does in Unsloth's notebooks."""
    rows, seen = stored_images(tmp_path), []

    def half(row):
        seen.append(row["picture"].size)
        return {"messages": conversation(row["picture"].convert("L").resize((28, 28)), row["said"])}

    ours = collator(formatting_func=half)
    want = [picture.convert("L").resize((28, 28)).convert("RGB") for picture in rows["picture"]]
    prepared = ours.prepare(rows, progress=False)
    assert seen == [(56, 42), (42, 56)]
    for i, row in enumerate(prepared):
        assert ours.known(i).digest == ours.encoder.encode(read_row(conversation(want[i], "a"), 0)).digest
        assert said(ours, row).endswith(f"{'ab'[i]}<|im_end|>\n")


def test_images_that_a_formatting_function_paints_on_are_the_painted_ones(collator, tmp_path):
    def paint(row):
        row["picture"].paste((255, 0, 0), (0, 0, 56, 56))
        return conversation(row["picture"], row["said"])

    ours = collator(formatting_func=paint)
    ours.prepare(stored_images(tmp_path), progress=False)
    for i, size in enumerate([(56, 42), (42, 56)]):
        red = ours.encoder.encode(read_row(conversation(Image.new("RGB", size, (255, 0, 0)), "a"), 0))
        assert ours.known(i).digest == red.digest


def test_images_that_a_formatting_function_passes_on_stay_undecoded(collator, tmp_path):
    ours = collator(formatting_func=lambda row: conversation(row["picture"], row["said"]))
    ours.prepare(stored_images(tmp_path), progress=False)
    assert [type(ours.document(i).images[0]) for i in range(2)] == [
        str,
        Image.Image,
    ]  # the second was turned


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda row: row["text"], "row 0: formatting_func raised KeyError: 'text'"),
        (lambda row: row["said"], "row 0: formatting_func returned 'a'; expected a row"),
        (lambda row: None, "row 0: formatting_func returned None; expected a row"),
        (lambda row: {"said": "a"}, r"row 0: no known format in said \(str\)"),
    ],
)
def test_what_a_formatting_function_does_wrong_is_named(function, message, collator, tmp_path):
    with pytest.raises(ValueError, match=message):
        collator(formatting_func=function).prepare(stored_images(tmp_path), progress=False)


# -- errors --------------------------------------------------------------------------------------------------


def answered_with(part) -> dict:
    """A question, and an answer with this part."""
    content = [{"type": "text", "text": "Here:"}, part]
    return {"messages": [{"role": "user", "content": "Show it."}, {"role": "assistant", "content": content}]}


def said_by_user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize(
    "row, message",
    [
        (answered_with({"type": "image", "image": None}), r"row 1: message 1 \(assistant\) has an image part"),
        (answered_with({"type": "image_url", "image_url": None}), r"row 1: message 1 \(assistant\) has an image part"),
        ({"messages": ONE["messages"], "images": []}, r"row 1: message 0 \(user\) has an image part without"),
        ({"messages": ONE["messages"], "images": [picture(0)] * 2}, "row 1: 1 image placeholders .* and 2 images"),
        ({"messages": SEVERAL["messages"], "images": [picture(0), "no.png", picture(0)]}, "image 2 of 3: 'no.png'"),
        ({**ONE, "images": [Image.new("RGB", (0, 4))]}, "row 1: the image is 0 × 4 pixels"),
        ({**ONE, "images": [Image.new("RGB", (900, 3))]}, "row 1: the image is 900 × 3 pixels; one side"),
        ({**ONE, "images": ["http://127.0.0.1:9/x.png"]}, "row 1: .*x.png cannot be downloaded"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "row 1: a part of type 'video'"),
        ({"question": "a"}, r"row 1: no known format in question \(str\)"),
        ({"messages": "hello"}, r"row 1: no known format in messages \(str\)"),
        ("hello", "row 1: expected a dict, or a list of messages, got 'hello'"),
        ({"messages": [*ONE["messages"], "hi"]}, "row 1: message 2: expected a dict with role and content, got 'hi'"),
        (said_by_user({"type": "text", "text": "a"}), r"row 1: message 0 \(user\): expected a content .* got a dict"),
        (said_by_user(5), r"row 1: message 0 \(user\): expected a content that is a text or a list of parts, got 5"),
        ({**NONE, "tools": "not JSON"}, "row 1: tools: expected a list or its JSON text, got 'not JSON'"),
        ({**NONE, "chat_template_kwargs": 5}, "row 1: .*not a mapping"),
        ({**ONE, "images": [None]}, r"row 1: message 0 \(user\) has an image part without"),
        ({**STRINGS, "images": []}, "row 1: "),
        ({**ASKED, "completion": talk([], [0])[1:]}, "row 1: an image in the completion"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(row, message, collator, tmp_path):
    with pytest.raises(ValueError, match=message):
        collator(image_cache=tmp_path).prepare([ONE, row], progress=False)


def test_all_bad_images_are_counted(collator):
    rows = [ONE, {"question": "a"}, *({**ONE, "images": ["gone.png"]} for _ in range(6))]
    with pytest.raises(ValueError, match=r"7 of 8 rows cannot be used:\nrow 1: .*\nrow 2: [\s\S]*and 2 more"):
        collator().prepare(rows, progress=False)


def test_long_rows_are_dropped_or_refused(collator, caplog):
    rows = [ONE, SEVERAL, ONE]
    with caplog.at_level(logging.WARNING):
        prepared = collator().prepare(rows, max_length=50, progress=False)
    assert "1 of 3 rows are longer than max_length=50: row 1 (" in caplog.text
    report = preparation_report(prepared)
    assert (report.rows_in, report.rows, report.dropped, report.truncated) == (3, 2, 1, 0)
    assert prepared["documents"][:] == [[0], [1]]
    with pytest.raises(ValueError, match=r"1 of 3 rows are longer .*rows with images are not cut"):
        collator(too_long="raise").prepare(rows, max_length=50, progress=False)
    with pytest.raises(ValueError, match="3 of 3 rows are longer"):
        collator().prepare(rows, max_length=9, progress=False)
    with pytest.raises(ValueError, match="rows with images are not cut: pack them"):
        pack(prepared, 30)
    with pytest.raises(ValueError, match="came 'wrapped'"):
        pack(prepared, 200, "wrapped")


def test_arguments_are_checked(processor):
    def make(**arguments):
        return VisionDataCollator(tiny_processors.stand_in(), processor, **arguments)

    with pytest.raises(ValueError, match="too_long='cut'"):
        make(too_long="cut")
    with pytest.raises(ValueError, match="ignore_index=0"):
        make(ignore_index=0)
    with pytest.raises(ValueError, match="both instruction_part and response_part"):
        make(train_on_responses_only=True, response_part="x")
    text_only = tiny_processors.stand_in(config=tiny_vision.make_config("qwen2_5_vl").text_config)
    with pytest.raises(ValueError, match="needs a model that takes images"):
        VisionDataCollator(text_only, processor)


# -- batches -------------------------------------------------------------------------------------------------


def many_rows(count: int) -> list[dict]:
    sizes = [(28, 28), (56, 28), (70, 56), (84, 84)]
    return [
        {
            "messages": talk([*range(1 + i % 2), "?" * (i % 5)], ["y" * (1 + i % 3)]),
            "images": [picture(i, sizes[i % 4]), picture(100 + i, sizes[i % 3])][: 1 + i % 2],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_holds_each_rows_images_in_order(packed, processor, collator):
    ours = collator()
    prepared = ours.prepare(many_rows(11), progress=False)
    dataset = pack(prepared, 160) if packed else prepared
    batches = VisionBatches(dataset, ours, batch_size=2, accumulation=2, max_length=160, packed=packed)
    host, seen = ours.encoder.family, []
    for step in range(batches.steps_per_epoch):
        batch = batches.step(step)
        for micro in range(2):
            one = {name: array[micro] for name, array in batch.items() if name != "images"}
            images = {name: array[micro] for name, array in batch["images"].items()}
            rows = batches.rows(step)[2 * micro : 2 * micro + 2]
            numbers = [number for row in rows for number in dataset["documents"][int(row)]]
            seen += numbers
            documents = [ours.document(number) for number in numbers]
            processed = [
                dict(ours.encoder.processed([document], return_tensors="np")) for document in documents
            ]
            want = host.image_arrays(processed, {**host.sizes(processed), **batch_sizes(images)})
            for name, array in want.items():
                np.testing.assert_array_equal(images[name], array, err_msg=name)
            check_tokens(one, processed, host)
    assert sorted(seen) == list(range(11))


def batch_sizes(images) -> dict[str, int]:
    return {
        "patches": len(images["pixels"]),
        "images": len(images["starts"]) - 1,
        "windows": len(images["windows"]),
    }


def check_tokens(one, processed, host):
    """Ids, slots and rotary positions of a micro-batch, document by document."""
    ids, slots, turned, segments = (
        one[name] for name in ("input_ids", "image_slots", "rope_positions", "segment_ids")
    )
    is_image = (ids == host.image_token_id) & (segments > 0)
    np.testing.assert_array_equal(slots[is_image], np.arange(is_image.sum()))
    assert (slots[~is_image] == -1).all()
    documents = iter(processed)
    for row in range(len(ids)):
        for segment in range(1, segments[row].max(initial=0) + 1):
            here = segments[row] == segment
            want = next(documents)
            assert ids[row][here].tolist() == want["input_ids"][0].tolist()
            np.testing.assert_array_equal(turned[row][here], host.rope_positions(want["input_ids"][0], want))
    assert next(documents, None) is None


def test_workers_give_the_same_batches_in_any_order(collator):
    ours = collator()
    prepared = ours.prepare(many_rows(9), progress=False)
    make = lambda workers: VisionBatches(  # noqa: E731
        prepared, ours, batch_size=2, accumulation=1, max_length=None, packed=False, workers=workers, seed=3
    )
    alone = make(0)
    want = {step: alone.step(step) for step in (0, 1, 6, 3)}
    evaluated = list(alone.eval_batches())
    ahead = make(1)
    assert {step: same(ahead.step(step), batch) for step, batch in want.items()} == dict.fromkeys(want, True)
    assert all(same(a, b) for a, b in zip(ahead.eval_batches(), evaluated, strict=True))
    ahead.close()


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    return left.dtype == right.dtype and np.array_equal(left, right)


def test_an_image_that_changes_while_training_is_named(collator, tmp_path):
    path = tmp_path / "x.png"
    picture(0, (56, 56)).save(path)
    ours = collator()
    prepared = ours.prepare([{**ONE, "images": [str(path)]}], progress=False, workers=0)
    batches = VisionBatches(prepared, ours, batch_size=1, max_length=None, packed=False)
    for other in (picture(0, (84, 84)), picture(1, (56, 56))):
        other.save(path)
        with pytest.raises(ValueError, match=r"row 0: an image has changed since the data was checked"):
            batches.step(0)
    picture(0, (56, 56)).save(path)
    batches.step(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"row 0: .*x.png' does not exist"):
        batches.step(1)


def test_a_formatting_function_that_gives_another_text_is_told(collator):
    texts = iter(["a", "several tokens more"])
    ours = collator(formatting_func=lambda row: {**row, "messages": talk([0, next(texts)], ["b"])})
    prepared = ours.prepare([ONE], progress=False)
    batches = VisionBatches(prepared, ours, batch_size=1, max_length=None, packed=False)
    with pytest.raises(ValueError, match=r"row 0: \d+ tokens now, and \d+ when the data was checked"):
        batches.step(0)


def test_a_worker_that_dies_is_told(collator):
    import os
    import signal

    ours = collator()
    ours.prepare([ONE], progress=False, workers=1)
    (worker,) = ours.pool(1)._all
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with status -9"):
        ours.pool(1).encode([ours.document(0)]).result()


def test_pixels_have_the_models_dtype(processor):
    import ml_dtypes

    ours = VisionDataCollator(tiny_processors.stand_in(dtype=ml_dtypes.bfloat16), processor)
    prepared = ours.prepare([ONE], progress=False)
    batch = VisionBatches(prepared, ours, batch_size=1, max_length=None, packed=False).step(0)
    assert batch["images"]["pixels"].dtype == ml_dtypes.bfloat16


def test_digest_of_images(collator):
    ours = collator()
    ours.prepare([ONE, {**ONE, "images": [picture(77)]}, ONE], progress=False)
    assert ours.image_digest([0]) == ours.image_digest([2]) != ours.image_digest([1])
