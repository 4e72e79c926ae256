"""vLLM's rollouts of the same shape as generate.py's, in an environment that has vLLM.

    python scripts/bench/vllm_rollouts.py --sequences 8 64 256 512       # Llama-3.1-8B, 512 + 1,024 tokens

Random weights, temperature 1, log-probs of the sampled tokens, prefix caching, nothing stops early, prompts as token
ids; tokens/s is new tokens over the whole call, prefill included. One H200, vLLM 0.24: 70 s to start, 70 s for these.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", nargs="+", type=int, default=[8, 64, 256, 512])
    parser.add_argument("--group", type=int, default=8, help="sequences that share a prompt")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=1024, help="tokens")
    args = parser.parse_args()

    import numpy as np
    import torch
    import vllm

    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    began = time.perf_counter()
    engine = vllm.LLM(
        model=folder, load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_num_seqs=512,
        gpu_memory_utilization=0.9, max_model_len=args.prompt + args.new + 16, enable_prefix_caching=True,
    )  # fmt: skip
    print(
        f"{torch.cuda.get_device_name()}, vLLM {vllm.__version__}: started in {time.perf_counter() - began:.0f} s",
        flush=True,
    )

    def seconds(groups: int, new: int, seed: int) -> tuple[float, int]:
        """Of generating, and the tokens made."""
        rng = np.random.default_rng(seed)
        prompts = [{"prompt_token_ids": rng.integers(4, 128000, args.prompt).tolist()} for _ in range(groups)]
        sampling = vllm.SamplingParams(
            n=args.group, temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=0
        )
        began = time.perf_counter()
        made = engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began, sum(len(c.token_ids) for row in made for c in row.outputs)

    seconds(2, 16, 0)
    for count in args.sequences:
        took, tokens = seconds(max(1, count // args.group), args.new, count)
        print(f"{count:5d} sequences {tokens / took:9.0f} tokens/s {took:8.2f} s", flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # kernels.py is there, which transformers would take for Hugging Face's package
    main()
