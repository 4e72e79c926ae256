"""Make gguf_conversion.json: what llama.cpp's own converter makes of the models of tests/gguf_cases.py.

    python tests/golden/make_gguf_conversion.py LLAMA_CPP_SOURCE SMOLLM2_FOLDER

The source is llama.cpp's repository, or vendor/llama.cpp of the llama-cpp-python sdist; the committed file is from
version 0.3.36 of that. Needs torch, transformers and sentencepiece. The converter knows byte-level tokenizers by
a hash of published ones, as SmolLM2's; for the others its recognition is replaced by the name that gguf_cases says.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]


def main(source: Path, smollm2: Path) -> None:
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    import convert_hf_to_gguf
    import gguf_cases
    from conversion.base import TextModel

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.gguf"

        def convert(case: Path) -> dict:
            sys.argv = ["convert", str(case), "--outfile", str(target), "--outtype", "f32"]
            convert_hf_to_gguf.main()
            return gguf_cases.summary(target)

        (Path(folder) / "smollm2").symlink_to(smollm2)
        found["smollm2"] = {"keys": convert(Path(folder) / "smollm2")["keys"]}
        TextModel.get_vocab_base_pre = lambda self, tokenizer: gguf_cases.pre_tokenizer(self.dir_model.name)
        for name in gguf_cases.CASES:
            (Path(folder) / name).mkdir()
            found[name] = convert(gguf_cases.write_case(name, Path(folder) / name))
    lines = json.dumps(found, indent=None, separators=(",", ":"), ensure_ascii=False)
    (HERE / "gguf_conversion.json").write_text(lines.replace('],["', '],\n["') + "\n", "utf-8")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:3]))
