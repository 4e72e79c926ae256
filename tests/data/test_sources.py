"""Where rows come from."""

import json
import os

import datasets
import pytest

from jaxtune.data import load_dataset

ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "three", "n": 3}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder, kind):
    path = folder / f"rows.{kind}"
    table = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_files(kind, tmp_path):
    path = write(tmp_path, kind)
    assert list(load_dataset(str(path))) == ROWS
    assert list(load_dataset(path, "train[:2]")) == ROWS[:2]
    assert list(load_dataset(path, "test[1:]")) == ROWS[1:]  # a single file is all one split


def test_text_file(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert load_dataset(tmp_path / "lines.txt")["text"][:] == ["one", "two"]


def test_edited_file_is_read_anew(tmp_path):
    path = write(tmp_path, "jsonl")
    stamp = path.stat()
    assert load_dataset(path)["text"][0] == "one"
    path.write_text(path.read_text().replace("one", "new"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time
    assert load_dataset(path)["text"][0] == "new"


def test_folders(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (data / "test.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert list(load_dataset(str(data))) == ROWS[:1]
    assert list(load_dataset(str(data), "test")) == ROWS[1:2]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert list(load_dataset(tmp_path / "saved")) == ROWS


def test_objects():
    dataset = datasets.Dataset.from_list(ROWS)
    assert load_dataset(dataset) is dataset
    assert list(load_dataset(ROWS)) == ROWS
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([1]))
    assert load_dataset(splits) is splits["train"]
    assert len(load_dataset(splits, "test")) == 1
    with pytest.raises(ValueError, match="no split 'dev'; the dataset has train, test"):
        load_dataset(splits, "dev")


def test_rows_of_different_shapes():
    schema = {"name": "a", "parameters": {"properties": {"x": {"type": "integer"}}}}
    other = {"name": "b", "parameters": {"properties": {"y": {"type": "string", "enum": ["p"]}}}}
    rows = [{"text": "one"}, {"text": "two", "tools": [schema]}, {"text": "three", "tools": [other, schema]}]
    loaded = load_dataset(rows)
    assert loaded[0] == {"text": "one", "tools": None}
    assert loaded[1:]["tools"] == [[schema], [other, schema]]  # no keys of the one in the other


def test_hub_name(monkeypatch):
    asked = {}

    def fake(*names, **options):
        asked.update(options, names=names)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    load_dataset("someone/rows", "train[:5%]", subset="en", revision="v1", token="secret")
    assert asked == {
        "names": ("someone/rows", "en"),
        "split": "train[:5%]",
        "revision": "v1",
        "token": "secret",
    }


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset file at .*missing\.jsonl"):
        load_dataset("missing.jsonl")
    with pytest.raises(FileNotFoundError, match="no dataset file at /no/such/folder"):
        load_dataset("/no/such/folder")
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"ending in \.json, \.jsonl"):
        load_dataset(tmp_path / "rows.xlsx")
    with pytest.raises(TypeError, match="came IterableDataset"):
        load_dataset(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(TypeError, match="came list"):
        load_dataset([1, 2])
    for empty in ([], datasets.Dataset.from_list([])):
        with pytest.raises(ValueError, match="no rows"):
            load_dataset(empty)
