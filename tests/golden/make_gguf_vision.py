"""Make gguf_vision.json: what llama.cpp's own converter makes of the models of tests/gguf_vision_cases.py.

    python tests/golden/make_gguf_vision.py LLAMA_CPP_SOURCE

The source is as for make_gguf_conversion.py, the committed file from the same version. The converter's recognition of
tokenizers, and its first try of sentencepiece, are replaced: these have bytes for tokens.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]


def no_sentencepiece(_) -> None:
    raise FileNotFoundError


def main(source: Path) -> None:
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    import convert_hf_to_gguf
    import gguf_cases
    import gguf_vision_cases
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    TextModel._set_vocab_sentencepiece = no_sentencepiece
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.gguf"

        def convert(case: Path, *options: str) -> None:
            sys.argv = ["convert", str(case), "--outfile", str(target), *options]
            convert_hf_to_gguf.main()

        for name in gguf_vision_cases.CASES:
            case = gguf_vision_cases.write_case(name, Path(folder) / name)
            convert(case, "--outtype", "f32")
            found[name] = {"text": gguf_cases.summary(target)}
            convert(case, "--outtype", "f32", "--mmproj")
            found[name]["mmproj"] = gguf_cases.summary(target)
            for dtype in ("f16", "bf16"):
                convert(case, "--outtype", dtype, "--mmproj")
                found[name][dtype] = gguf_vision_cases.kinds(target)
    lines = json.dumps(found, indent=None, separators=(",", ":"), ensure_ascii=False)
    (HERE / "gguf_vision.json").write_text(lines.replace('],["', '],\n["') + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
