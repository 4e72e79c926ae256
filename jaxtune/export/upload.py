"""Upload an adapter, a merged model or .gguf files to the hub. The access token appears in no exception and no log."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from jaxtune.export.adapter import save_adapter
from jaxtune.export.merged import Base, save_merged
from jaxtune.export.save_gguf import save_gguf
from jaxtune.hub import HubError, redact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.model import Model


def push_to_hub(
    model: Model,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload adapter trained with jaxtune",
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Create the repository if need be and upload the adapter (a fully fine-tuned model: its 16-bit weights).

    Args:
        model: what to upload.
        repo_id: "user/name".
        tokenizer: saved with it; by default the model's.
        token: hub access token with write access; by default the stored one.
        private: make a new repository private.
        commit_message: of the one commit that is made.
        revision: branch to commit to. create_pr: open a pull request instead.
        endpoint: another hub server.

    Returns:
        URL of the commit.

    Raises:
        HubError: the hub refused; the message says what and why.
    """
    if model.full_finetuning:
        return push_to_hub_merged(
            model, repo_id, tokenizer, token=token, private=private, commit_message=commit_message,
            revision=revision, create_pr=create_pr, endpoint=endpoint,
        )  # fmt: skip
    repository = _Repository(repo_id, token, endpoint)
    repository.create(private)
    with tempfile.TemporaryDirectory(prefix="jaxtune-") as parent:
        save_adapter(model, Path(parent) / "upload", tokenizer)
        return repository.upload(Path(parent) / "upload", commit_message, revision, create_pr)


def push_to_hub_merged(
    model: Model,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    *,
    base: Base = "dequantised",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model trained with jaxtune",
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    temporary_directory: str | Path | None = None,
) -> str:
    """Create the repository if need be, save as `save_merged` does and upload; arguments as there and above.

    Args:
        temporary_directory: where the merged model is written first; it needs room for the whole model.

    Returns:
        URL of the commit.

    Raises:
        HubError: the hub refused; the message says what and why.
    """
    repository = _Repository(repo_id, token, endpoint)
    repository.create(private)
    with tempfile.TemporaryDirectory(prefix="jaxtune-", dir=temporary_directory) as parent:
        folder = Path(parent) / "upload"
        save_merged(
            model, folder, tokenizer, save_method, base=base, dtype=dtype, max_shard_size=max_shard_size
        )
        return repository.upload(folder, commit_message, revision, create_pr)


def push_to_hub_gguf(
    model: Model,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload GGUF made with jaxtune",
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    temporary_directory: str | Path | None = None,
    **options: Any,
) -> str:
    """Create the repository if need be, write .gguf files and a Modelfile as `save_gguf` does, and upload them.

    Args:
        options: of `save_gguf`; the others as above.

    Returns:
        URL of the commit.

    Raises:
        HubError: the hub refused; the message says what and why. What `save_gguf` raises.
    """
    repository = _Repository(repo_id, token, endpoint)
    repository.create(private)
    with tempfile.TemporaryDirectory(prefix="jaxtune-", dir=temporary_directory) as parent:
        folder = Path(parent) / "upload"
        save_gguf(model, folder, tokenizer, quantization_method, **options)
        return repository.upload(folder, commit_message, revision, create_pr)


class _Repository:
    """A repository to write to, whose errors are free of the token."""

    def __init__(self, repo_id: str, token: str | bool | None, endpoint: str | None):
        self._id, self._token = repo_id, token
        self._api = HfApi(endpoint=endpoint, token=token)

    def create(self, private: bool | None) -> None:
        """Done before anything is saved, so that a wrong token or name fails at once."""
        try:
            self._api.create_repo(self._id, private=private, exist_ok=True)
            return
        except (HfHubHTTPError, HFValidationError) as error:
            reason = _reason(error, self._token)
        # Raised out here so that no exception holding the request and its headers is chained to it.
        raise HubError(f"cannot create or open the repository {self._id!r} on the hub. {reason}\n{_ADVICE}")

    def upload(self, folder: Path, message: str, revision: str | None, create_pr: bool) -> str:
        try:
            commit = self._api.upload_folder(
                repo_id=self._id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
            )
            return commit.pr_url or commit.commit_url
        except (
            OSError,
            RuntimeError,
        ) as error:  # HTTP errors are OSErrors; one large file's are RuntimeErrors
            reason = _reason(error, self._token)
        raise HubError(f"the upload to {self._id!r} failed. {reason}\n{_ADVICE}")


_ADVICE = "Check the name (user/name), and that the token may write: token=..., or `hf auth login`."


def _reason(error: BaseException, token: str | bool | None) -> str:
    """What went wrong and why, without the token."""
    text = f"{type(error).__name__}: {error}"
    if error.__cause__ is not None:
        text += f" Cause: {type(error.__cause__).__name__}: {error.__cause__}"
    return redact(text, token)
