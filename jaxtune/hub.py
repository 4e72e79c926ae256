"""From a name to a local checkpoint: hub id, folder, .gguf file or PEFT adapter -> config, tokenizer,
weights.

`resolve` never loads weights; `Checkpoint.read` gives them one at a time. An access token is used for the
download and appears in no exception and no log.

transformers is imported inside the functions that use it: where torch is installed transformers imports
torch, and `import jaxtune` must not.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxtune.formats import Renamed, TensorReader, Without
from jaxtune.formats.bnb_reader import BnbFolder, BnbTensor, check_quantization_config
from jaxtune.formats.gguf_reader import GgufModel
from jaxtune.formats.gguf_tokenizer import load_tokenizer
from jaxtune.formats.safetensors_reader import SafetensorsFolder, TensorInfo
from jaxtune.formats.text_side import TextReader, TextSide
from jaxtune.processor import IMAGE as IMAGES_CONFIG
from jaxtune.processor import load_processor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Kind = Literal["safetensors", "bnb-4bit", "gguf"]
# Rows of embeddings behind those of the vocabulary, for tokens that are never predicted.
_ROWS_BEHIND = {"mllama": 8}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Weights once, not again as .bin, .gguf, consolidated.safetensors or original/*.pth.
_DOWNLOAD = ("*.json", "*.txt", "*.jinja", "*.model", "model*.safetensors", ADAPTER_WEIGHTS)
_DO_NOT_DOWNLOAD = ("original/*", "onnx/*", "openvino/*", "coreml/*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
# Buffers that old versions of transformers saved; they follow from the config.
_BUFFERS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# Tokens made to be spare, best first; the last ones are beginnings of numbered reserved tokens.
_PAD_TOKENS = (
    *("<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<pad>", "[PAD]", "<PAD>", "<|endoftext|>"),
    *("<|fim_pad|>", "<fim_pad>", "<｜▁pad▁｜>", "[MASK]"),
)
_PAD_PREFIXES = ("<|reserved", "<|placeholder", "<|dummy_", "[control")
_TOKEN_LIKE = re.compile(r"hf_[A-Za-z0-9]{8,}")


class HubError(OSError):
    """A download or upload failed; the message says which repository and why, without the token."""


def redact(text: str, token: str | bool | None) -> str:
    """`text` with the given token, the stored one, and anything that looks like a hub token blanked out."""
    secrets = [token if isinstance(token, str) else None, huggingface_hub.get_token()]
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _TOKEN_LIKE.sub("***", text)


@dataclass(frozen=True)
class Checkpoint:
    """A model on local disk.

    path: folder, or .gguf file. config: transformers' config. kind: how the weights are stored.
    adapter: PEFT folder to put on top, or None. name_or_path: the base model as a later load can find it.
    revision: the hub revision asked for, or None.
    """

    path: Path
    config: PretrainedConfig
    kind: Kind
    name_or_path: str
    revision: str | None = None
    adapter: Path | None = None
    _reader: TensorReader = field(repr=False, default=None)  # type: ignore[assignment]

    def names(self) -> list[str]:
        """Hugging Face names of the weights; side tensors of quantised ones and old buffers are left out."""
        return [name for name in self._reader.names() if not name.endswith(_BUFFERS)]

    def renamed(self, rules: Sequence[tuple[str, str]]) -> Checkpoint:
        """The same weights under other names; see `formats.Renamed`."""
        return replace(self, _reader=Renamed(self._reader, rules)) if rules else self

    def without(self, name: str) -> Checkpoint:
        """The same weights but one."""
        return replace(self, _reader=Without(self._reader, name))

    def text_part(self, config: PretrainedConfig, side: TextSide) -> Checkpoint:
        """The text model that this one contains, as a checkpoint of its own; see `models.text_side_of`."""
        return replace(self, config=config, _reader=TextReader(self._reader, side))

    @property
    def text_side(self) -> TextSide | None:
        """Where this text model lies in the model of the files; None for a checkpoint that is whole."""
        return None if self.text_reader is None else self.text_reader.side

    @property
    def text_reader(self) -> TextReader | None:
        """What reads the text model out of a larger one; None for a checkpoint that is whole."""
        return self._reader if isinstance(self._reader, TextReader) else None

    def stored_name(self, name: str) -> str:
        """What the checkpoint's files call a weight; the name itself for one that they do not hold."""
        return self._reader.stored.get(name, name) if isinstance(self._reader, Renamed) else name

    def info(self, name: str) -> TensorInfo:
        """Shape and stored dtype of a weight, without reading it."""
        return self._reader.info(name)

    def read(self, name: str) -> np.ndarray | BnbTensor:
        """One weight: bfloat16/float16/float32 [out, in], a view of the file where possible; or BnbTensor."""
        return self._reader.read(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer (the adapter's own if it has one), padding on the left with a token that is not EOS."""
        folder = self.adapter if self.adapter and _has_tokenizer(self.adapter) else self.path
        if isinstance(self._reader, GgufModel) and folder == self.path:
            tokenizer = load_tokenizer(self._reader.metadata, self.path)
        else:
            tokenizer = _stored_tokenizer(folder)
        if self.text_side is not None:
            tokenizer = _for_text_alone(tokenizer, folder, self._rows_behind())
        _warn_of_tokens_without_rows(tokenizer, self.config)
        fix_pad_token(tokenizer, self.config)
        tokenizer.padding_side = "left"
        return tokenizer

    def whole_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """`tokenizer()` of a text model, as it may have been changed, with the tokens of the whole model's images."""
        added = _stored_tokenizer(self.path).added_tokens_decoder
        tokens = [added[i] for i in self._rows_behind() if i in added]
        if tokens:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens(tokens, special_tokens=True)
        return tokenizer

    def _rows_behind(self) -> range:
        """Tokens of the whole model that its text model has no rows for."""
        assert self.text_side is not None
        return range(self.config.vocab_size, self.config.vocab_size + self.text_side.rows_behind)

    def processor(self) -> Any:
        """The processor of a vision-language model (the adapter's own if it has one), around `tokenizer()`."""
        folder = self.adapter if self.adapter and (self.adapter / IMAGES_CONFIG).exists() else self.path
        return load_processor(folder, self.tokenizer(), self.config.model_type)

    @property
    def gguf(self) -> GgufModel | None:
        """The .gguf file that the model came from, with its metadata; None for any other checkpoint."""
        return self._reader if isinstance(self._reader, GgufModel) else None

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json (or a .gguf's token ids) as a dict; empty when the checkpoint has none."""
        if isinstance(self._reader, GgufModel):
            return dict(self._reader.generation_config)
        file = self.path / "generation_config.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else {}


@dataclass(frozen=True)
class _Hub:
    """How to reach the hub; handed down to the base of an adapter."""

    token: str | bool | None = field(repr=False)
    local_files_only: bool
    cache_dir: str | Path | None
    endpoint: str | None

    def snapshot(self, repo: str, revision: str | None, patterns: tuple[str, ...] = _DOWNLOAD) -> Path:
        """Download (or find in the cache) the files of a repository that match `patterns`."""
        try:
            folder = huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                token=self.token,
                local_files_only=self.local_files_only,
                cache_dir=self.cache_dir,
                endpoint=self.endpoint,
                allow_patterns=list(patterns),
                ignore_patterns=list(_DO_NOT_DOWNLOAD),
            )
            return Path(folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
            reason = redact(f"{type(error).__name__}: {error}", self.token)
        # Raised out here so that no exception holding the request and its headers is chained to it.
        where = "the local cache" if self.local_files_only else "the hub"
        raise HubError(
            f"{repo!r} is no local folder or .gguf file, and {where} did not give it"
            f"{f' at revision {revision!r}' if revision else ''}. {reason}\n"
            "Check the spelling; for a gated or private repository pass token=..."
        )


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    gguf_file: str | None = None,
    endpoint: str | None = None,
) -> Checkpoint:
    """Find a checkpoint and describe it; downloads when the name is no local path.

    Args:
        name_or_path: hub id, folder (safetensors, bitsandbytes-4bit, GGUF or PEFT adapter), .gguf file, or
            "user/repository/file.gguf" on the hub.
        revision: branch, tag or commit on the hub.
        token: hub access token, True for the stored one, False for none.
        local_files_only: use the local cache only.
        cache_dir: where downloads are kept; default is huggingface_hub's.
        gguf_file: name of the .gguf file to use in the folder or repository.
        endpoint: another hub server.

    Raises:
        HubError: the hub did not give it. FileNotFoundError: files are missing; they are named.
        ValueError: a damaged file, or a quantisation that is not supported.
    """
    hub = _Hub(token, local_files_only, cache_dir, endpoint)
    path = Path(name_or_path).expanduser()
    name = str(path.resolve()) if path.exists() else str(name_or_path)
    if path.exists():
        if (path / ADAPTER_CONFIG).exists():
            return _with_adapter(path, hub)
        return _describe(path, name, revision, gguf_file)
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{name_or_path} does not exist")
    return _from_hub(hub, name, revision, gguf_file)


def _from_hub(hub: _Hub, name: str, revision: str | None, gguf_file: str | None) -> Checkpoint:
    """A repository, or "user/repository/file.gguf" for one GGUF file of it, downloaded."""
    if name.endswith(".gguf"):
        parts = name.split("/")
        if len(parts) < 3:
            raise FileNotFoundError(f"{name} does not exist")
        name, gguf_file = "/".join(parts[:2]), "/".join(parts[2:])
    path = hub.snapshot(name, revision, _gguf_patterns(gguf_file) if gguf_file else _DOWNLOAD)
    if (path / ADAPTER_CONFIG).exists():
        return _with_adapter(path, hub)
    return _describe(path, name, revision, gguf_file)


def _gguf_patterns(gguf_file: str) -> tuple[str, ...]:
    """The file, the other parts of a split one, and the tokenizer files that `load_tokenizer` may fall back to."""
    return re.sub(r"-\d{5}-of-", "-?????-of-", gguf_file), "tokenizer.json", "tokenizer_config.json"


def _describe(path: Path, name: str, revision: str | None, gguf_file: str | None) -> Checkpoint:
    """A folder or file that is not an adapter -> Checkpoint."""
    from transformers import AutoConfig

    if path.is_file():
        return _gguf(path, name, revision)
    if gguf_file or not (path / "config.json").exists():
        file = path / gguf_file if gguf_file else _only_gguf(path)
        return _gguf(file, f"{name}/{file.relative_to(path)}", revision)
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    raw = json.loads((path / "config.json").read_text("utf-8"))
    quantised = check_quantization_config(raw.get("quantization_config"), path)
    try:
        reader = BnbFolder(path) if quantised else SafetensorsFolder(path)
    except FileNotFoundError as error:
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f" For GGUF pass gguf_file={ggufs[0]!r}." if ggufs else ""
        raise FileNotFoundError(
            f"{name}: {error}{hint} A hub repository without model*.safetensors cannot be loaded; "
            "look for a safetensors conversion (often the branch 'refs/pr/1')."
        ) from error
    return Checkpoint(path, config, "bnb-4bit" if quantised else "safetensors", name, revision, None, reader)


def _gguf(path: Path, name: str, revision: str | None) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no file {path.name}; it holds {_listing(path.parent)}")
    from transformers import AutoConfig

    model = GgufModel(path)
    config = AutoConfig.for_model(
        **copy.deepcopy(model.config)
    )  # it is changed later, what the file says is not
    return Checkpoint(path, config, "gguf", name, revision, None, model)


def _only_gguf(folder: Path) -> Path:
    """The one model file of a folder; vision projectors and further parts of a split model do not count."""
    found = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))
    models = [
        file
        for file in found
        if not re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name) or "-00001-of-" in file.name
    ]
    if len(models) == 1:
        return models[0]
    if models:
        raise ValueError(
            f"{folder} has several .gguf files ({', '.join(f.name for f in models)}); pass gguf_file=..."
        )
    raise FileNotFoundError(
        f"{folder} is no checkpoint: looked for {ADAPTER_CONFIG} (PEFT adapter), config.json (model) and "
        f"*.gguf; it holds {_listing(folder)}"
    )


def _listing(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _with_adapter(folder: Path, hub: _Hub) -> Checkpoint:
    """A PEFT folder -> its base with `.adapter` set; a relative base is tried from here, then from the folder."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; it holds {_listing(folder)}. "
            "Save the adapter again with PEFT's default safe_serialization=True."
        )
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config['peft_type']!r}; jaxtune reads LORA adapters")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path; write the base's path there"
        )
    local = next((p for p in (Path(base).expanduser(), folder / base) if p.exists()), None)
    if local and (local.resolve() == folder.resolve() or not (local / ADAPTER_CONFIG).exists()):
        checkpoint = _describe(local, str(local.resolve()), None, None)
    elif local:
        raise ValueError(f"the base of {folder} is itself an adapter ({local}); merge that one first")
    elif base.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{folder / ADAPTER_CONFIG} names the base {base!r}, which does not exist")
    else:
        checkpoint = _from_hub(hub, base, config.get("revision"), None)
        if checkpoint.adapter:
            raise ValueError(f"the base of {folder} is itself an adapter ({base}); merge that one first")
    return replace(checkpoint, adapter=folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def _stored_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not _has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _for_text_alone(
    tokenizer: PreTrainedTokenizerBase, folder: Path, only_whole: range
) -> PreTrainedTokenizerBase:
    """A vision-language model's tokenizer for its text model: with the processor's chat template where it has none,
    without the tokens `only_whole`, for which only the whole model's embedding has rows."""
    template = folder / "chat_template.json"
    if tokenizer.chat_template is None and template.exists():
        tokenizer.chat_template = json.loads(template.read_text("utf-8"))["chat_template"]
    dropped = {token for token, i in tokenizer.get_vocab().items() if i in only_whole}
    if not dropped:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] not in dropped]
    fields = {name: value for name, value in tokenizer.init_kwargs.items() if name != "added_tokens_decoder"}
    fields["extra_special_tokens"] = [t for t in tokenizer.extra_special_tokens if t not in dropped]
    fields["chat_template"] = tokenizer.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **fields)


def _warn_of_tokens_without_rows(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    rows = config.get_text_config().vocab_size + _ROWS_BEHIND.get(config.model_type, 0)
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows]
    if beyond:
        logger.warning(
            "%d tokens have no row in the embedding of %d (%s): text that holds them cannot be trained on",
            *(len(beyond), rows, ", ".join(sorted(beyond)[:5])),
        )


def fix_pad_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Give the tokenizer a padding token that is not end-of-sequence and has an embedding row; adds no token.

    With padding equal to EOS a loss that ignores padding never learns to stop. Order: reserved tokens, the
    unknown token, the config's pad id. When nothing is spare the pad token stays EOS (jaxtune masks padding
    by segment, so only other libraries are affected) and the log says so.
    """
    rows = config.get_text_config().vocab_size
    current = tokenizer.pad_token_id
    if current is not None and current != tokenizer.eos_token_id and current < rows:
        return
    vocab = tokenizer.get_vocab()
    spare = [token for token in _PAD_TOKENS if token in vocab]
    spare += [token for prefix in _PAD_PREFIXES for token in sorted(vocab) if token.startswith(prefix)]
    if tokenizer.unk_token is not None:
        spare.append(str(tokenizer.unk_token))
    pad = config.get_text_config().pad_token_id
    if pad is not None and 0 <= pad < len(vocab):
        spare.append(str(tokenizer.convert_ids_to_tokens(pad)))
    usable = (token for token in spare if token != tokenizer.eos_token and vocab.get(token, rows) < rows)
    chosen = next(usable, tokenizer.eos_token)
    if chosen == tokenizer.eos_token:
        logger.warning("the tokenizer has no spare token for padding; %r stays both EOS and padding", chosen)
    tokenizer.pad_token = chosen


# What `python -m jaxtune.train` leaves in its output folder, what to take first.
_OUTPUTS = ("merged", "model", "adapter")


def trained_in(name: str) -> str:
    """The model in the output folder of a training run; `name` itself where it is none."""
    folder = Path(name).expanduser()
    if (folder / "train.yaml").is_file():
        return next((str(folder / part) for part in _OUTPUTS if (folder / part).is_dir()), name)
    return name
