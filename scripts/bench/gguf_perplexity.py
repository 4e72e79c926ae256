"""Perplexity in llama.cpp of a model exported by each method, with and without an importance matrix.

    PYTHONPATH=tests python scripts/bench/gguf_perplexity.py MODEL TEST.jsonl [TRAIN.jsonl]

The text is the first `--tokens` tokens of the rows' columns question and answer; the matrix is collected from the same
columns of the other file. llama.cpp's libraries: JAXTUNE_LLAMA_CPP, or what scripts/test.sh has fetched.
About 20 minutes for SmolLM2-135M on 2 CPU cores; needs disk for all files.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from llamacpp import LlamaCpp

from jaxtune import FastLanguageModel
from jaxtune.export.imatrix import collect_imatrix
from jaxtune.export.save_gguf import save_gguf
from jaxtune.export.type_mix import METHODS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTED = ("q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q4_0", "q3_k_m", "q2_k")


def texts(path: str, count: int) -> list[str]:
    """The rows as plain texts."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()[:count]]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("test")
    parser.add_argument("train", nargs="?")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=300, help="of the file for the matrix")
    arguments = parser.parse_args()

    model, tokenizer = FastLanguageModel.from_pretrained(
        arguments.model, max_seq_length=None, dtype="float32", load_in_16bit=True
    )
    llama_cpp = LlamaCpp(os.environ.get("JAXTUNE_LLAMA_CPP", ROOT / ".cache" / "llama_cpp"))
    ids = tokenizer("".join(texts(arguments.test, 200)))["input_ids"][: arguments.tokens]
    methods = list(dict.fromkeys(method.name for method in METHODS.values()))

    def measure(chosen: list[str], folder: Path, matrix=None) -> dict[str, tuple[float, float]]:
        """method -> (MB, perplexity)."""
        files = save_gguf(model, folder, tokenizer, chosen, imatrix=matrix, progress=False)["gguf_files"]
        found = {}
        for method, file in zip(chosen, map(Path, files), strict=True):
            with llama_cpp.load(file, context=512) as loaded:
                found[method] = file.stat().st_size / 1e6, loaded.perplexity(ids)
        return found

    with tempfile.TemporaryDirectory() as folder:
        plain = measure(methods, Path(folder) / "plain")
        weighted = {}
        if arguments.train:
            matrix = collect_imatrix(model, texts(arguments.train, arguments.rows), tokenizer)
            weighted = measure(list(WEIGHTED), Path(folder) / "weighted", matrix)
    print(f"{len(ids)} tokens in windows of 512, the second half of each counted\n")
    print("| method | MB | perplexity | with imatrix |\n|---|---|---|---|")
    for method, (size, perplexity) in plain.items():
        better = f"{weighted[method][1]:.3f}" if method in weighted else ""
        print(f"| {method} | {size:.1f} | {perplexity:.3f} | {better} |")


if __name__ == "__main__":
    main()
