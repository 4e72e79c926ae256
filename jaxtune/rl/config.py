"""GRPOConfig: TRL's names and defaults, and what Unsloth's notebooks pass besides."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jaxtune.config import TrainingConfig
from jaxtune.rl.losses.options import Correction, GRPOLossOptions, Level, LossType
from jaxtune.rl.vllm_config import VLLMConfig
from jaxtune.settings import FOREIGN, ForeignNames, check_at_least, tolerant

Plain = bool | int | float | str

# Names of generation_kwargs and of vLLM's SamplingParams -> the name here, and the value that changes nothing.
SAMPLING_NAMES = {
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "top_k": ("top_k", 0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "max_new_tokens": ("max_new_tokens", None),
    "max_tokens": ("max_new_tokens", 16),
    "seed": ("seed", None),
    "stop": ("stop_strings", None),
    "stop_strings": ("stop_strings", None),
}
SAMPLING_IGNORED = {
    "do_sample",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "use_cache",
    "logprobs",
    "n",
}
_POSITIVE = """num_generations_eval max_completion_length generation_batch_size steps_per_generation num_iterations
    max_prompt_length num_completions_to_print max_tool_calling_iterations ref_model_sync_steps""".split()
_NOT_NEGATIVE = """top_k epsilon epsilon_high delta beta entropy_target entropy_coef_delta max_resample_rounds
    reward_timeout off_policy_mask_threshold dataloader_num_workers""".split()


@tolerant
@dataclasses.dataclass(frozen=True)
class GRPOConfig(VLLMConfig, TrainingConfig):
    """Group relative policy optimisation (arXiv 2402.03300), with TRL's defaults, and what TrainingConfig has."""

    FOREIGN: ClassVar[ForeignNames] = FOREIGN.extended(
        ignored="""activation_checkpointing activation_checkpointing_kwargs cache_implementation
            cast_lm_head_to_fp32 dataloader_drop_last dataset_num_proc
            ds3_gather_for_generation group_by_length log_multimodal train_sampling_strategy
            transformers_continuous_batching_config unsloth_grpo_mini_batch
            unsloth_logit_chunk_multiplier unsloth_num_chunks use_transformers_continuous_batching
            use_transformers_paged vllm_enable_sleep_mode vllm_group_port vllm_model_impl""",
        refused={
            "log_completions_hub_repo": (None, "upload the folder output_dir/completions"),
            "neftune_noise_alpha": (None, "leave it out"),
            "vllm_structured_outputs_regex": (None, "leave it out"),
        },
    )

    FREE_SETTINGS: ClassVar[frozenset[str]] = TrainingConfig.FREE_SETTINGS | set(
        """num_generations_eval max_prompt_length too_long chat_template_kwargs dataloader_num_workers reward_timeout
        log_completions num_completions_to_print log_unique_prompts vllm_server_base_url vllm_server_host
        vllm_server_port vllm_server_timeout vllm_gpu_memory_utilization vllm_request_timeout vllm_python
        vllm_server_args vllm_adapter_dir vllm_logprob_warning vllm_logprob_limit vllm_tensor_parallel_size""".split()
    )

    learning_rate: float = 1e-6
    """Peak learning rate (LoRA wants more: 5e-6 to 5e-5)."""
    shuffle_dataset: bool = True
    """Take the prompts in random order, another one each epoch."""
    disable_dropout: bool = False
    """No dropout in the adapter while training."""

    # -- rollouts ----------------------------------------------------------------------------------
    num_generations: int = 8
    """Completions of each prompt: a group, within which rewards are compared."""
    num_generations_eval: int | None = None
    """The same in evaluation. None = num_generations."""
    max_completion_length: int = 512
    """Most tokens of a completion."""
    max_prompt_length: int | None = None
    """Prompts of more tokens are too long (older notebooks). None = what the model was loaded for."""
    too_long: Literal["drop", "raise"] = "drop"
    """Prompts that are too long, which are never cut, or empty: leave them out and tell which, or stop."""
    generation_batch_size: int | None = None
    """Completions made at a time. None = per_device_train_batch_size * steps_per_generation."""
    steps_per_generation: int | None = None
    """Forward passes that the completions made at a time are for. None = gradient_accumulation_steps."""
    num_iterations: int = 1
    """How often the completions made at a time are trained on (µ)."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in training."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 = all."""
    min_p: float | None = None
    """Sample from tokens at least this times as likely as the likeliest. None = all."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that are there already by this."""
    generation_kwargs: dict[str, Plain | tuple[str, ...]] | None = None
    """Sampling alone, over the above: temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed,
    stop_strings."""
    chat_template_kwargs: dict[str, Plain] | None = None
    """Variables for the chat template, such as {"enable_thinking": false}."""
    dataloader_num_workers: int = 0
    """Processes that open and process images ahead of their completions. 0 = one for each core but one, 8 at most."""
    max_tool_calling_iterations: int | None = None
    """Most rounds of tool calls in a completion. None = as many as fit."""
    rollout_weights: Literal["auto", "merged", "lora"] = "auto"
    """What the embedded engine samples from: a 16-bit copy with the adapter merged in, or the weights as trained."""
    shared_prefix: bool = False
    """Compute a prompt once for all its completions; micro-batches then hold whole groups. Worth it where prompts are
    not much shorter than completions."""
    max_resample_rounds: int = 0
    """DAPO's dynamic sampling (arXiv 2503.14476): groups whose rewards are all equal are given other prompts, up to so
    many times a generation; 0 = never, as in TRL."""

    # -- rewards -----------------------------------------------------------------------------------
    reward_weights: tuple[float, ...] | None = None
    """A weight for each reward function. None = all 1."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group or the batch; true = group, false = none."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Sum the rewards of several functions before the group's baseline is taken, or after (GDPO)."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take. None = any."""

    # -- objective ---------------------------------------------------------------------------------
    loss_type: LossType = "dapo"
    """How token losses are made and averaged; see jaxtune.rl.losses.grpo."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference; 0 = no reference."""
    sync_ref_model: bool = False
    """Move the reference towards the model as training goes on (arXiv 2404.09656); full fine-tuning only, as in TRL."""
    ref_model_mixup_alpha: float = 0.6
    """How far: reference = α * model + (1 - α) * reference."""
    ref_model_sync_steps: int = 512
    """How often, in optimizer steps."""
    epsilon: float = 0.2
    """Ratios below 1 - epsilon are clipped."""
    epsilon_high: float | None = None
    """Ratios above 1 + epsilon_high are clipped (cispo: above epsilon_high itself). None = epsilon."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative (two-sided clipping). None = not."""
    importance_sampling_level: Level = "token"
    """One ratio a token, or one a completion (GSPO)."""
    sapo_temperature_neg: float = 1.05
    """SAPO's temperature where the advantage is not positive."""
    sapo_temperature_pos: float = 1.0
    """SAPO's temperature where the advantage is positive."""
    vespo_k_pos: float = 2.0
    """VESPO's k where the advantage is not negative."""
    vespo_lambda_pos: float = 3.0
    """VESPO's λ where the advantage is not negative."""
    vespo_k_neg: float = 3.0
    """VESPO's k where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """VESPO's λ where the advantage is negative."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio, which makes its gradient unbiased."""
    mask_truncated_completions: bool = False
    """Do not train on completions that were cut at max_completion_length."""
    top_entropy_quantile: float = 1.0
    """Train on this share of the tokens, those of the highest entropy."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy of a token, which is maximised."""
    use_adaptive_entropy: bool = False
    """Move entropy_coef towards entropy_target, step by step."""
    entropy_coef_min: float = 0.0
    """Least adaptive coefficient."""
    entropy_coef_max: float = 1.0
    """Largest adaptive coefficient."""
    entropy_coef_delta: float = 0.005
    """Change of the adaptive coefficient in one step."""
    entropy_target: float = 0.2
    """Entropy (nats per token) up to which the adaptive bonus is given."""
    off_policy_mask_threshold: float | None = None
    """Leave out completions with a negative advantage that the policy has moved from by more (nats per token)."""
    importance_sampling_correction: bool | None = None
    """Correct for the sampler's log-probabilities. None = with vLLM, if vllm_importance_sampling_correction."""
    vllm_importance_sampling_correction: bool = True
    """Correct for the difference between vLLM's log-probabilities and the trainer's."""
    vllm_importance_sampling_mode: Correction = "sequence_mask"
    """One ratio a completion or a token; out of bounds it is masked to 0 or truncated."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper bound of that ratio."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of that ratio."""

    # -- completions -------------------------------------------------------------------------------
    log_completions: bool = False
    """Print completions with their rewards at each log, and write all of them to output_dir/completions."""
    num_completions_to_print: int | None = None
    """Completions to print. None = all."""
    log_unique_prompts: bool = False
    """Print one completion of each prompt only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, _POSITIVE)
        check_at_least(self, 0, _NOT_NEGATIVE)
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, got {self.num_generations}: an advantage is a comparison "
                "within a group"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.top_p <= 1 or not 0 <= (self.min_p or 0) <= 1:
            raise ValueError(f"top_p and min_p are probabilities, got {self.top_p} and {self.min_p}")
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in [0, 1], got {self.ref_model_mixup_alpha}")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError("sync_ref_model=True needs a reference, and there is none with beta=0")
        self.check_server()
        self.loss_options()
        self._check_batches()
        self._check_correction()

    def _normalise(self) -> None:
        super()._normalise()
        put = functools.partial(object.__setattr__, self)
        if isinstance(self.scale_rewards, bool):
            put("scale_rewards", "group" if self.scale_rewards else "none")
        if self.reward_weights is not None:
            put("reward_weights", tuple(map(float, self.reward_weights)))
        put("vllm_server_args", tuple(map(str, self.vllm_server_args)))
        if self.generation_kwargs is not None:
            put("generation_kwargs", _sampling_arguments(self.generation_kwargs))

    def _check_batches(self) -> None:
        rows, group = self.per_device_train_batch_size, self.num_generations
        if self.generation_batch_size is not None:
            if self.steps_per_generation is not None:
                raise ValueError("give generation_batch_size or steps_per_generation, not both")
            if self.generation_batch_size % rows or self.generation_batch_size % group:
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of "
                    f"per_device_train_batch_size={rows} and of num_generations={group}"
                )
        elif self.generation_rows % group:
            warnings.warn(
                f"per_device_train_batch_size is raised from {rows} to num_generations={group}: completions are made "
                f"{self.generation_rows} at a time, which is no whole number of groups",
                stacklevel=4,
            )
            object.__setattr__(self, "per_device_train_batch_size", group)
        if self.shared_prefix and rows % group:
            raise ValueError(
                f"shared_prefix=True needs whole groups: per_device_train_batch_size={rows} must be a multiple of "
                f"num_generations={group}"
            )
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % self.group(train=False):
            raise ValueError(
                f"per_device_eval_batch_size={self.per_device_eval_batch_size} must be a multiple of the "
                f"{self.group(train=False)} completions of each prompt in evaluation (num_generations_eval)"
            )

    def _check_correction(self) -> None:
        mode = self.vllm_importance_sampling_mode
        if self.loss_type == "vespo" and self.corrects_sampler and mode.startswith("sequence"):
            raise ValueError(
                f"loss_type='vespo' needs vllm_importance_sampling_mode 'token_truncate' or 'token_mask', got {mode!r}"
            )

    @classmethod
    def translated(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with Unsloth's vllm_sampling_params (SamplingParams or a dict) among the generation_kwargs."""
        given = dict(given)
        cap = given.pop("vllm_importance_sampling_cap", None)
        if cap is not None:
            given["vllm_importance_sampling_clip_max"] = cap
        params = given.pop("vllm_sampling_params", None)
        if params is not None:
            if not isinstance(params, Mapping):
                params = {name: getattr(params, name, None) for name in SAMPLING_NAMES}
            chosen = {
                n: v
                for n, v in params.items()
                if n not in SAMPLING_NAMES or v not in (None, [], SAMPLING_NAMES[n][1])
            }
            given["generation_kwargs"] = {**chosen, **(given.get("generation_kwargs") or {})}
        return given

    def loss_options(self) -> GRPOLossOptions:
        """The static options of grpo_loss."""
        names = [field.name for field in dataclasses.fields(GRPOLossOptions)]
        values = {name: getattr(self, name) for name in names}
        return GRPOLossOptions(**values | {"vllm_importance_sampling_correction": self.corrects_sampler})

    def on_devices(self, devices: int) -> "GRPOConfig":
        """The same run with micro-batches that are those of all devices together."""
        return dataclasses.replace(
            self,
            per_device_train_batch_size=self.per_device_train_batch_size * devices,
            per_device_eval_batch_size=self.per_device_eval_batch_size * devices,
        )

    @property
    def generation_steps(self) -> int:
        """Forward passes that one generation is for."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size // self.per_device_train_batch_size
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def generation_rows(self) -> int:
        """Completions made at a time."""
        return self.per_device_train_batch_size * self.generation_steps

    def group(self, *, train: bool) -> int:
        """Completions of each prompt."""
        return self.num_generations if train else self.num_generations_eval or self.num_generations

    @property
    def corrects_sampler(self) -> bool:
        """Whether the sampler's log-probabilities are corrected for."""
        if self.importance_sampling_correction is not None:
            return self.importance_sampling_correction
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether some step trains on completions of an earlier policy, or corrects for the sampler (TRL's rule)."""
        window = self.generation_steps * self.num_iterations
        return self.gradient_accumulation_steps % window != 0 or self.corrects_sampler

    @property
    def per_token(self) -> list[str]:
        """What experience has of each token, where the sampler says its log-probabilities."""
        needed = {
            "mask": True,
            "old_log_probs": self.needs_old_log_probs,
            "ref_log_probs": self.beta != 0,
            "sampling_log_probs": self.corrects_sampler or self.off_policy_mask_threshold is not None,
        }
        return [name for name, is_needed in needed.items() if is_needed]


def _sampling_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """generation_kwargs under one set of names."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        if name in SAMPLING_IGNORED or value is None:
            continue
        if name not in SAMPLING_NAMES:
            raise ValueError(
                f"generation_kwargs: {name}={value!r} is not supported; it takes {', '.join(SAMPLING_NAMES)}"
            )
        own = SAMPLING_NAMES[name][0]
        if own == "top_k" and value < 0:
            value = 0  # vLLM's other way to say that all are kept
        if own == "stop_strings":
            value = (value,) if isinstance(value, str) else tuple(value)
        out[own] = value
    return out
