"""`python -m jaxtune.export`: write .gguf files of a saved model or adapter.

Exit status: 0 done, 1 failed while writing, 2 a setting or model that cannot be used (one line), 130 interrupted.
"""

import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxtune.export.type_mix import METHODS, find_method

_NAMES = "\n".join(f"  {name:15}{method.text}" for name, method in METHODS.items() if name == method.name)
_ALIASES = ", ".join(f"{name} = {method.name}" for name, method in METHODS.items() if name != method.name)
DESCRIPTION = f"""Write a model as .gguf files for llama.cpp and Ollama, with a Modelfile.

examples:
  python -m jaxtune.export outputs/orders gguf --method q4_k_m q8_0
  python -m jaxtune.export Qwen/Qwen2.5-0.5B-Instruct gguf --method q4_k_m --imatrix rows.jsonl
  python -m jaxtune.export outputs/orders/adapter gguf --lora

methods:
{_NAMES}
  {_ALIASES}"""


@dataclasses.dataclass(frozen=True)
class Export:
    """One run of `python -m jaxtune.export`."""

    model: tyro.conf.Positional[str]
    """Hugging Face folder or hub id, adapter folder, .gguf file, or output folder of jaxtune.train."""
    output: tyro.conf.Positional[Path]
    """Folder for the files."""
    method: tuple[str, ...] = ("q8_0",)
    """One or more of the methods above; all are made in one pass over the weights."""
    imatrix: str | None = None
    """Importance matrix: a .gguf or .dat file of llama.cpp's, or a dataset (file or hub name) to collect one from."""
    save_imatrix: Path | None = None
    """Also write the importance matrix to this file."""
    system: str | None = None
    """System prompt of the Modelfile."""
    name: str | None = None
    """The model's name in the files and their names; None = that of the base model."""
    verify: bool = False
    """Run the files in an installed llama.cpp and compare logits and an answer with the model's own."""
    question: str | None = None
    """What --verify asks; None = the capital of France."""
    lora: bool = False
    """Write the adapter alone, for llama.cpp's --lora."""
    load_in_4bit: bool = False
    """Merge an adapter onto the base in NF4, on which QLoRA trained it, and not onto its 16-bit weights."""
    overwrite: bool = False
    """Replace files that are there."""
    deterministic: bool = False
    """On a GPU too, quantise on the CPU, byte for byte as llama.cpp."""
    processes: int | None = None
    """Processes that quantise; None = one for each core."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the tokenizer's splitting rules, where jaxtune does not know them."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = dataclasses.field(default=None, repr=False)
    """Access token of the hub."""
    traceback: bool = False
    """Show where an error came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one export; returns the exit status."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch
    job = tyro.cli(
        Export,
        prog="python -m jaxtune.export",
        description=DESCRIPTION,
        args=None if arguments is None else list(arguments),
        use_underscores=True,
    )
    try:
        run(job)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if job.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left of the unfinished files", file=sys.stderr)
        return 130
    return 0


def run(job: Export) -> dict:
    """Load, and write; what `save_pretrained_gguf` returns."""
    # Only now: --help and a mistyped setting should not wait for jax and transformers.
    from jaxtune import hub
    from jaxtune.export.imatrix import load_or_collect
    from jaxtune.fast import FastLanguageModel

    for method in job.method:
        find_method(method)
    model_name = hub.trained_in(job.model)
    # a run's output folder has the name that its parts lack
    name = job.name or (Path(job.model).resolve().name if model_name != job.model else None)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name,
        devices=1,
        max_seq_length=None,
        revision=job.revision,
        token=job.token,
        **_loading(model_name, job),
    )
    if job.lora:
        return model.save_pretrained_gguf(job.output, save_method="lora", name=name, overwrite=job.overwrite)
    matrix = None if job.imatrix is None else load_or_collect(job.imatrix, model, tokenizer)
    if matrix is not None and job.save_imatrix is not None:
        matrix.save(job.save_imatrix)
    return model.save_pretrained_gguf(
        job.output,
        tokenizer,
        job.method,
        imatrix=matrix,
        system=job.system,
        name=name,
        verify=job.question or job.verify,
        overwrite=job.overwrite,
        deterministic=job.deterministic,
        processes=job.processes,
        pre_tokenizer=job.pre_tokenizer,
    )


def _loading(model_name: str, job: Export) -> dict:
    """Arguments of from_pretrained that keep the stored weights as they are, whatever they are stored in."""
    from jaxtune import hub

    checkpoint = hub.resolve(model_name, revision=job.revision, token=job.token)
    if checkpoint.kind == "bnb-4bit":
        return {"load_in_4bit": True}
    stored = {checkpoint.info(name).dtype.name for name in checkpoint.names()}
    exact = next((name for name in ("bfloat16", "float16") if stored == {name}), "float32")
    # None: bfloat16, or float32 on a CPU
    return {"load_in_4bit": job.load_in_4bit, "dtype": None if exact == "bfloat16" else exact}


if __name__ == "__main__":
    sys.exit(main())
