"""VLLMConfig: which vLLM server to ask, or how to start one. Imports neither jax nor transformers."""

import dataclasses
from typing import Literal

from jaxtune.settings import check_at_least


@dataclasses.dataclass(frozen=True)
class VLLMConfig:
    """A vLLM server that answers in the place of the embedded engine."""

    use_vllm: bool = False
    """Sample with vLLM instead of the embedded engine."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """server: one that runs already; colocate: one started for this run."""
    vllm_server_base_url: str | None = None
    """Address of the server. None = made of host and port."""
    vllm_server_host: str = "0.0.0.0"
    """Host of the server."""
    vllm_server_port: int = 8000
    """Port of the server."""
    vllm_server_timeout: float = 240.0
    """Seconds to wait for the server to be up."""
    vllm_request_timeout: float = 1800.0
    """Seconds that vLLM may take for the completions made at a time."""
    vllm_python: str | None = None
    """Python of the environment that vLLM is installed in (colocate). None = the environment variable
    JAXTUNE_VLLM_PYTHON, or this one."""
    vllm_server_args: tuple[str, ...] = ()
    """More arguments for the server that is started (colocate), such as --enforce-eager."""
    vllm_base: Literal["policy", "checkpoint"] = "policy"
    """What is served (colocate). policy: the weights that jaxtune computes with, the 4-bit ones dequantised;
    checkpoint: the 16-bit ones of the checkpoint, which an adapter trained in 4 bits has never seen."""
    vllm_adapter_dir: str | None = None
    """Folder that jaxtune and the server both see, for the adapters on their way. None = in shared memory."""
    vllm_logprob_warning: float = 0.1
    """Warn where log-probabilities of vLLM and jaxtune differ by more, on average (nats per token)."""
    vllm_logprob_limit: float | None = 1.0
    """Stop where they do by more: another model is served. None = never."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the device's memory for vLLM."""
    vllm_max_model_length: int | None = None
    """Longest sequence that vLLM prepares for. None = what is needed."""
    vllm_tensor_parallel_size: int = 1
    """Devices that vLLM spreads the model over."""

    @property
    def share_beside_jax(self) -> float:
        """Of a GPU's memory, which a server of this run takes."""
        starts = self.use_vllm and self.vllm_mode == "colocate"
        return self.vllm_gpu_memory_utilization if starts else 0.0

    def check_server(self) -> None:
        """Raises ValueError naming a setting that cannot be meant."""
        check_at_least(self, 1, ["vllm_server_port", "vllm_tensor_parallel_size", "vllm_max_model_length"])
        for name in ("vllm_server_timeout", "vllm_request_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
