"""Vision fine-tuning, notebook style: a model that has never seen a digit learns to read numbers.

    python scripts/examples/vision.py [OUTPUT_FOLDER]

The model has the shape of Qwen2.5-VL and 1.5 million random weights; what it reads at the end it has learnt here. On 2
CPU cores: about 3 minutes and 2 GB. With a pretrained model ("Qwen/Qwen2.5-VL-3B-Instruct") load_in_4bit=True and
FastVisionModel.get_peft_model(model) take the place of full_finetuning; all else stays.
"""

import sys

from jaxtune import FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator
from jaxtune.evaluate.reading import error_rates, examples, read_images
from jaxtune.tasks import reading


def main(output: str) -> None:
    # 1. The model. A name of the hub loads in the same way.
    folder = reading.make_model(f"{output}/random")
    model, processor = FastVisionModel.from_pretrained(
        str(folder), max_seq_length=128, load_in_4bit=False, full_finetuning=True
    )

    # 2. Rows of chat messages with images: PIL images here; paths, URLs, bytes and base64 will do too.
    rows = reading.make_rows(reading.NUM_TRAIN)
    asked = examples(reading.make_rows(reading.NUM_HELD_OUT, held_out=True))
    before = read(model, processor, asked)

    # 3. Every image is opened once before training. Only the answers are trained.
    trainer = SFTTrainer(
        model=model,
        tokenizer=processor,
        data_collator=UnslothVisionDataCollator(model, processor, train_on_responses_only=True),
        train_dataset=rows,
        args=SFTConfig(
            output_dir=output,
            max_length=128,
            per_device_train_batch_size=32,
            max_steps=400,
            learning_rate=1.5e-3,
            lr_scheduler_type="cosine",
            warmup_ratio=0.05,
            gradient_checkpointing=False,
            logging_steps=20,
            save_strategy="no",
        ),
    )
    trainer.train()

    # 4. Numbers that it was not trained on, before and after.
    after = read(model, processor, asked)
    references = [one.reference for one in asked]
    for when, said in (("before", before), ("after", after)):
        rates = error_rates(references, said)
        print(f"{when}: character error rate {rates.cer:.1%}, {rates.exact:.0%} of {len(said)} numbers right")
    for reference, said in zip(references[:5], after, strict=False):
        print(f"  {reference} read as {said!r}")
    trainer.save_model(f"{output}/model")


def read(model, processor, asked) -> list[str]:
    """What the model reads, greedily."""
    FastVisionModel.for_inference(model)
    return read_images(model, processor, asked, max_new_tokens=8, batch_size=50, progress=False)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "outputs/vision")
