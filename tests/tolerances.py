"""Every tolerance of the test suite, in one place. They are not loosened to make a test pass."""

LOGITS = 1e-5  # float32 logits against transformers, largest difference over largest logit
LOSS = 1e-5  # float32 loss of a step against PEFT + torch, relative
WEIGHTS = 1e-4  # adapter weights after 20 steps against PEFT + torch, relative to their largest
GRADIENT = 1e-5  # a kernel's gradient against autodiff of its reference, float32
VISION_GRADIENT = (
    5e-5  # adapter gradients of a whole model, float32, against PEFT, over the largest of a leaf
)
REWRITTEN = 1e-6  # a float32 program in another form: the same sums in the same order, each element relative
MERGED = 5e-5  # float32 logits of merged weights against base plus adapter: the same sums in another order
SAMPLED_LOGPROBS = (
    1e-4  # log-probs of generated tokens, float32, against the model's own forward pass: other sums
)
GPU_LOGITS = 2e-5  # the same on a GPU, float32 products: other summation orders
BF16 = 6e-3  # bfloat16 kernels against float32 references, norm of the difference over the norm
# Losses and log-probabilities from bfloat16 arrays, relative: products are exact in float32, the order of sums differs.
BF16_LOSS_SUM = 1e-4
LLAMA_CPP_LOGITS = 1e-4  # float32 logits of llama.cpp for a float32 .gguf file against transformers
LLAMA_CPP_GELU = 2e-3  # the same where the MLP has GELU, which llama.cpp looks up in a table of 16-bit floats
GGUF_BLOCKS = 0.98  # part of the K-quant blocks made in JAX that are those of the exact NumPy path, at least
GGUF_ERROR = 1.0005  # root mean square error of blocks made in JAX over that of the NumPy path, at most
# e4m3 has 3 bits of fraction: rounding errs by up to 1/16, 2.6 % in the root mean square, and a product of two rounded
# sides by √2 of that (3.7 %). e5m2 has 2 bits (5.3 %), and beside an e4m3 weight that makes 5.9 %.
FP8 = 4.5e-2  # e4m3 products against float32, norm of the difference over the norm
FP8_GRADIENT = 7e-2  # e5m2 by e4m3 products against float32
RL_LOSS = 2e-5  # float32 losses, gradients and metrics of rl/losses against TRL, relative to the largest of an array
ADVANTAGE = 2e-4  # advantages against TRL: near-equal rewards are divided by a small standard deviation
SAMPLER_GAP = (
    1e-4  # float32 log-probabilities of the engine, which merges the adapter, against those of the trainer
)
# What bfloat16 adds: to log-probs of an answer's tokens, root mean square, and to the loss of an untrained model. The
# logits of tiny models with large random weights are large.
BF16_LOGPROBS = 0.1
BF16_LOSS = 0.05
VLLM_LOGPROBS = (
    1e-4  # float32 log-probabilities of vLLM's tokens against the trainer's: torch's kernels, other sums
)
# Losses and adapter weights after ten steps on several devices against one, float32, norm of the difference over the
# norm: only the order of sums differs.
DEVICES = 1e-5
