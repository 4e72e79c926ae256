"""Where rows come from: a local file or folder, a hub name, a `datasets` object or plain Python rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

FILE_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}

Source = str | Path | datasets.Dataset | datasets.DatasetDict | Sequence[Mapping[str, Any]]


def load_dataset(
    spec: Source,
    split: str = "train",
    *,
    subset: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> datasets.Dataset:
    """Load rows from wherever they are.

    Args:
        spec: a local JSONL, JSON, CSV, TSV, Parquet or text file, a local folder (of such files, or written
            by `Dataset.save_to_disk`), a hub dataset name, a `datasets.Dataset` or `DatasetDict`, or a list
            of dicts.
        split: split of a folder, hub dataset or `DatasetDict` (`"train"`, `"train[:100]"`, …). A single local
            file is all one split, so there only a slice of it (`"train[:100]"`) means something.
        subset: configuration name of a hub dataset.
        revision: branch, tag or commit of a hub dataset.
        token: access token for a private hub dataset.

    Returns:
        A `datasets.Dataset`. A local file is read anew at each call, never from a cache of an older version.

    Raises:
        FileNotFoundError: `spec` names a file that does not exist.
        TypeError: `spec` is none of the above.
        ValueError: the split does not exist, or there are no rows.
    """
    if isinstance(spec, (str, Path)):
        dataset = _from_name(str(spec), split, subset, revision, token)
    elif isinstance(spec, datasets.DatasetDict):
        dataset = _pick_split(spec, split)
    elif isinstance(spec, datasets.Dataset):
        dataset = spec
    elif isinstance(spec, Sequence) and all(isinstance(row, Mapping) for row in spec):
        dataset = _from_rows(spec) if spec else None
    else:
        raise TypeError(
            "expected a file or folder path, a hub dataset name, a datasets.Dataset, a DatasetDict or a list of "
            f"dicts; came {type(spec).__name__}. A streaming dataset has to be materialised first, for instance "
            "with datasets.Dataset.from_list(list(stream.take(10_000)))"
        )
    if not dataset:  # None, or a dataset of length 0
        raise ValueError(
            f"the dataset has no rows: {spec if isinstance(spec, (str, Path)) else type(spec).__name__}"
        )
    return dataset


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    """Rows with any of their columns missing; nested dicts of different keys (tool schemas) stay as they are."""
    columns = dict.fromkeys(column for row in rows for column in row)
    table = {column: [row.get(column) for row in rows] for column in columns}
    return datasets.Dataset.from_dict(table, on_mixed_types="use_json")


def _from_name(
    name: str, split: str, subset: str | None, revision: str | None, token: str | None
) -> datasets.Dataset:
    """A path if it exists or looks like one, otherwise a hub name."""
    path = Path(name).expanduser()
    builder = FILE_BUILDERS.get(
        path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    )
    if path.is_file():
        if builder is None:
            raise ValueError(f"cannot read {path}: expected a file ending in {', '.join(FILE_BUILDERS)}")
        if not path.stat().st_size:
            raise ValueError(f"the dataset has no rows: {path} is empty")
        options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
        rows = split[split.index("[") :] if "[" in split else ""
        return _builder_dataset(builder, f"train{rows}", data_files=str(path), **options)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return _pick_split(saved, split) if isinstance(saved, datasets.DatasetDict) else saved
        return _builder_dataset(str(path), split)
    if builder is not None or path.is_absolute() or name.startswith(("./", "../", "~")):
        raise FileNotFoundError(f"no dataset file at {path} (current folder: {Path.cwd()})")
    return datasets.load_dataset(name, subset, split=split, revision=revision, token=token)


def _builder_dataset(builder: str, split: str, **options: Any) -> datasets.Dataset:
    """Local files through datasets' own readers, parsed anew so that an edited file never yields its old rows."""
    return datasets.load_dataset(
        builder, split=split, download_mode=datasets.DownloadMode.FORCE_REDOWNLOAD, **options
    )


def _pick_split(splits: datasets.DatasetDict, split: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"no split '{split}'; the dataset has {', '.join(map(str, splits))}")
    return splits[split]
