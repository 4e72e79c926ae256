"""The numbers and the coloured example that --dry-run shows."""

import datasets

from jaxtune.data import get_chat_template, prepare_dataset, render_example, token_statistics
from jaxtune.data.statistics import MASKED, TRAINED


def test_token_statistics(byte_level, arguments):
    ids = [[1] * length for length in range(1, 101)]
    labels = [[-100] * (length // 2) + [1] * (length - length // 2) for length in range(1, 101)]
    statistics = token_statistics(datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}))
    assert (statistics.rows, statistics.tokens, statistics.mean) == (100, 5050, 50.5)
    assert statistics.percentiles == {5: 5, 50: 50, 95: 95, 100: 100}
    assert statistics.trained == sum(label != -100 for row in labels for label in row)
    assert statistics.trained_fraction == statistics.trained / 5050
    rows = [{"prompt": "a " * repeats, "completion": "42 " * 10} for repeats in (1, 40, 2)]
    statistics = token_statistics(prepare_dataset(rows, byte_level, arguments(max_length=24)))
    assert (statistics.rows, statistics.dropped, statistics.truncated) == (2, 1, 1)


def test_render_example(byte_level, sentencepiece_like, arguments):
    for tokenizer in (byte_level, sentencepiece_like):
        tokenizer = get_chat_template(tokenizer, "chatml")
        talk = [
            ("user", "Say  h\u00e9llo"),
            ("assistant", "\U0001f600 Hello there"),
            ("user", "more"),
            ("assistant", "no"),
        ]
        messages = [{"role": role, "content": content} for role, content in talk]
        row = prepare_dataset([{"messages": messages}], tokenizer, arguments(assistant_only_loss=True))[0]
        text = render_example(tokenizer, row)
        assert text.plain == tokenizer.decode(row["input_ids"])
        shown = [(text.plain[span.start : span.end], span.style) for span in text.spans]
        assert [style for _, style in shown] == [MASKED, TRAINED, MASKED, TRAINED]
        assert shown[1][0].endswith("\U0001f600 Hello there<|im_end|>\n")
        assert shown[3][0] == "no<|im_end|>\n"
