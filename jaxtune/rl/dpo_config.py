"""DPOConfig: TRL's names and defaults, and what Unsloth's notebooks pass besides."""

import dataclasses
import functools
from typing import ClassVar, Literal

from jaxtune.config import TrainingConfig
from jaxtune.rl.losses.dpo import Divergence, DPOLossOptions, LossType
from jaxtune.settings import FOREIGN, ForeignNames, check_at_least, tolerant


@tolerant
@dataclasses.dataclass(frozen=True)
class DPOConfig(TrainingConfig):
    """Direct preference optimisation (arXiv 2305.18290), with TRL's defaults, and what TrainingConfig has."""

    FOREIGN: ClassVar[ForeignNames] = FOREIGN.extended(
        aliases={"max_seq_length": "max_length"},
        # The two old limits cut prompts and completions apart; max_length is what cuts now.
        ignored="activation_checkpointing activation_checkpointing_kwargs activation_offloading "
        "max_prompt_length "
        "max_completion_length padding_free ref_model_mixup_alpha ref_model_sync_steps",
        refused={
            "dataloader_drop_last": (False, "the short last step is padded with empty rows instead"),
            "group_by_length": (False, "leave it out"),
            "neftune_noise_alpha": (None, "leave it out"),
            "pad_token": (None, "set tokenizer.pad_token"),
            "sync_ref_model": (False, "the reference is the model as it was at the start"),
            "truncation_mode": ("keep_start", "sequences are cut on the right"),
        },
    )
    FREE_SETTINGS: ClassVar[frozenset[str]] = TrainingConfig.FREE_SETTINGS | {
        "dataloader_num_workers",
        "dataset_num_proc",
        "precompute_ref_batch_size",
    }

    learning_rate: float = 1e-6
    """Peak learning rate (LoRA wants more: about 1e-5)."""
    disable_dropout: bool = True
    """No dropout in the adapter while training."""

    # -- data --------------------------------------------------------------------------------------
    max_length: int | None = 1024
    """Longest prompt with its completion in tokens; longer ones are cut on the right (None = not)."""
    dataset_num_proc: int | None = None
    """Not needed: rows are tokenised in batches, on the tokenizer's own threads."""
    dataloader_num_workers: int = 0
    """Processes that open and process images ahead of the step. 0 = one for each core but one, 8 at most."""
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    """Order of the pairs in an epoch."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities once, before training, rather than in every step."""
    precompute_ref_batch_size: int | None = None
    """Pairs in one forward pass of that. None = per_device_train_batch_size, or per_device_eval_batch_size."""

    # -- objective ---------------------------------------------------------------------------------
    loss_type: tuple[LossType, ...] = ("sigmoid",)
    """One loss or several, which are added; see jaxtune.rl.losses.dpo."""
    loss_weights: tuple[float, ...] | None = None
    """A weight for each loss. None = all 1."""
    beta: float = 0.1
    """What leaving the reference costs."""
    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round (robust, exo_pair, aot, aot_unpaired)."""
    ld_alpha: float | None = None
    """Weight of the tokens beyond the length of the shorter completion of a pair (LD-DPO). None = 1."""
    f_divergence_type: Divergence = "reverse_kl"
    """Divergence from the reference (f-DPO)."""
    f_alpha_divergence_coef: float = 0.5
    """α of alpha_divergence."""
    use_weighting: bool = False
    """Weigh pairs by how likely the policy makes them (WPO)."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, ["max_length", "dataset_num_proc", "precompute_ref_batch_size"])
        check_at_least(self, 0, ["dataloader_num_workers"])
        self.loss_options()

    def _normalise(self) -> None:
        super()._normalise()
        put = functools.partial(object.__setattr__, self)
        put("loss_type", (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type))
        if self.loss_weights is not None:
            put("loss_weights", tuple(map(float, self.loss_weights)))
        put("f_divergence_type", getattr(self.f_divergence_type, "value", self.f_divergence_type))

    def loss_options(self) -> DPOLossOptions:
        """The static options of dpo_loss."""
        names = [field.name for field in dataclasses.fields(DPOLossOptions)]
        return DPOLossOptions(**{name: getattr(self, name) for name in names})
