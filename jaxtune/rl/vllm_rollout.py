"""Completions from vLLM: a server in an environment of its own, which gets the adapter as it is at each sync.

    adapter -> PEFT folder in shared memory -> load_lora_adapter -> /v1/completions -> the one before is unloaded

Each version has a new name and a new folder, since vLLM keeps what it has computed of a prompt under the name and the
path of an adapter: a changed adapter under the old ones would go on with the old one's keys and values. The folder
appears by a rename, so that none is read half written.
"""

import atexit
import copy
import importlib.util
import math
import os
import shutil
import sys
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.export.adapter import save_adapter
from jaxtune.export.merged import save_merged
from jaxtune.model import Model
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.rollout import Completions, Request, chosen_sampling
from jaxtune.rl.vllm_server import ServedModel, VLLMError, VLLMProcess, VLLMServer, free_port

PYTHON_VARIABLE = "JAXTUNE_VLLM_PYTHON"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for
EMBEDDED = "leave use_vllm out: the embedded engine samples from any adapter"
_SHARED_MEMORY = Path("/dev/shm")
_SPARE = 200_000_000  # bytes that are left free there


class VLLMRollout:
    """vLLM: a server that runs already (vllm_mode="server"), or one of this run (vllm_mode="colocate").

    It is started, or looked for, when the first completions are wanted, and ends with `close` or with this process.

    Raises:
        ValueError: vLLM cannot express this model, or is not installed where it is looked for.
    """

    makes_prompt_ids = False

    def __init__(self, model: Model, args: GRPOConfig):
        self._rank = adapter_rank(model)
        self._model, self._args, self._chosen = model, args, chosen_sampling(args)
        self._length = args.vllm_max_model_length or model.max_seq_length
        self._starts = args.vllm_mode == "colocate"
        if self._starts:
            self._python = find_python(args)
            check_base(model, args)
        self._fields = self._sampling_fields()
        self._logprobs_known = self._logprobs_are_whole()
        self._server: VLLMServer | None = None
        self._served = ServedModel("", 0)
        self._adapter: Path | None = None  # the folder that is loaded, under its name
        self._run, self._version = uuid.uuid4().hex[:8], 0
        self._folders: list[Path] = []  # removed in the end

    # -- the server ------------------------------------------------------------------------------------------

    def _connected(self) -> VLLMServer:
        """The server; started or looked for if there is none yet."""
        if self._server is None:
            atexit.register(self.close)
            try:
                self._server = self._start() if self._starts else VLLMServer(self._address())
                self._server.wait(self._args.vllm_server_timeout)
                self._served = self._server.served_model()
                if self._served.max_length < self._length:
                    raise VLLMError(
                        f"vLLM at {self._server.url} takes {self._served.max_length} tokens, training needs "
                        f"{self._length}; start it with --max-model-len {self._length}, or set "
                        "vllm_max_model_length if prompt and completion together are never longer"
                    )
            except BaseException:
                self.close()
                raise
        return self._server

    def _address(self) -> str:
        args = self._args
        return args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"

    def _start(self) -> VLLMServer:
        output = Path(self._args.output_dir)
        base = served_folder(self._model, self._args)
        if base is None:
            output.mkdir(parents=True, exist_ok=True)
            base = Path(tempfile.mkdtemp(prefix="vllm-base-", dir=output)).resolve()
            self._folders.append(base)
            save_policy_base(self._model, base)
        port = free_port()
        arguments = self._server_arguments(base, port)
        folders = [self._adapter_room(), *self._folders]
        process = VLLMProcess(self._python, arguments, output / "vllm.log", folders)
        return VLLMServer(f"http://127.0.0.1:{port}", process)

    def _server_arguments(self, base: Path, port: int) -> list[str]:
        args = self._args
        values = {
            "model": base,
            "served-model-name": "base",
            "host": "127.0.0.1",
            "port": port,
            "dtype": np.dtype(self._model.dtype).name,
            "max-model-len": self._length,
            "max-lora-rank": next(rank for rank in RANKS if rank >= self._rank),
            "generation-config": "vllm",
            "logprobs-mode": self._logprobs_mode(),
            "gpu-memory-utilization": args.vllm_gpu_memory_utilization,
            "tensor-parallel-size": args.vllm_tensor_parallel_size,
        }
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [*flags, "--enable-lora", *args.vllm_server_args]

    # -- versions --------------------------------------------------------------------------------------------

    def _adapter_room(self) -> Path:
        """The folder for adapters, made at its first use."""
        made = [folder for folder in self._folders if folder.name.startswith("jaxtune-")]
        if not made:
            parent = self._args.vllm_adapter_dir or _shared_memory(4 * self._model.num_trainable())
            Path(parent).mkdir(parents=True, exist_ok=True)
            room = Path(tempfile.mkdtemp(prefix="jaxtune-", dir=parent)).resolve()
            room.chmod(0o755)  # the server may belong to somebody else
            made = [room]
            self._folders += made
        return made[0]

    def sync(self, step: int) -> None:
        """Gives the server the adapter as it is now, under a new name; the one before is forgotten.

        Raises:
            VLLMError: there is no server, or it refuses. ValueError: the adapter holds NaN.
        """
        server = self._connected()
        self._version += 1
        folder = self._adapter_room() / f"jaxtune-{self._run}-v{self._version}"
        save_adapter(self._model, folder, with_tokenizer=False)
        server.load_adapter(folder.name, folder, self._rank)
        before, self._adapter = self._adapter, folder
        if before is not None:
            server.unload_adapter(before.name)
            shutil.rmtree(before, ignore_errors=True)

    # -- completions -----------------------------------------------------------------------------------------

    def generate(self, request: Request) -> Completions:
        """Completions of the last synced adapter.

        Raises:
            VLLMError: no server, no answer in time, a refusal, or an answer that is none.
        """
        assert request.prompt_ids is not None
        if self._adapter is None:  # closed since the last sync
            self.sync(0)
        assert self._adapter is not None
        payloads = [
            self._payload(request, number) for number in range(len(request.prompt_ids) // request.group)
        ]
        answers = self._connected().complete(payloads, self._args.vllm_request_timeout)
        choices = [one for answer in answers for one in self._choices(answer, request.group)]
        log_probs = [[float(x) for x in choice["logprobs"]["token_logprobs"]] for choice in choices]
        if not self._logprobs_known:
            log_probs = [[math.nan] * len(row) for row in log_probs]
        return Completions(
            prompt_ids=request.prompt_ids,
            completion_ids=[list(choice["token_ids"]) for choice in choices],
            logprobs=log_probs,
        )

    def _sampling_fields(self) -> dict[str, Any]:
        """What is the same in every request."""
        sampling = self._chosen.sampling
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(self._chosen.stop_strings),
            "include_stop_str_in_output": True,
            "stop_token_ids": self._model.stop_ids(),
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }

    def _payload(self, request: Request, number: int) -> dict[str, Any]:
        """The request for one prompt's completions."""
        assert request.prompt_ids is not None and self._adapter is not None
        prompt = request.prompt_ids[number * request.group]
        room = self._served.max_length - len(prompt)
        if room < 1:
            raise VLLMError(
                f"a prompt has {len(prompt)} tokens and vLLM takes {self._served.max_length} of prompt and completion; "
                "start it with a larger --max-model-len (vllm_max_model_length), or set max_prompt_length"
            )
        # vLLM seeds sample i of a prompt with seed + i: neighbours must not share these.
        seed = np.random.SeedSequence([request.seed + self._chosen.seed, number]).generate_state(1)[0]
        return self._fields | {
            "model": self._adapter.name,
            "prompt": [int(token) for token in prompt],
            "n": request.group,
            "max_tokens": min(request.max_new_tokens, self._chosen.max_new_tokens, room),
            "seed": int(seed),
        }

    def _choices(self, answer: Any, count: int) -> list[dict[str, Any]]:
        """The samples of one answer, in order."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            for choice in choices:
                ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
                if len(ids) != len(log_probs) or None in log_probs:
                    raise ValueError(f"{len(ids)} tokens with log-probabilities {log_probs}")
            if len(choices) != count:
                raise ValueError(f"{len(choices)} samples instead of {count}")
        except (KeyError, TypeError, ValueError) as error:
            raise VLLMError(
                f"vLLM's answer is not what was asked for ({type(error).__name__}: {error}); expected {count} choices "
                f"with token_ids and logprobs, as vLLM gives since 0.10.2; it began {str(answer)[:300]!r}"
            ) from error
        return choices

    # -- log-probabilities -----------------------------------------------------------------------------------

    def _logprobs_mode(self) -> str:
        """What the server that is started reports: at temperature 1 what the model says, before anything is cut."""
        return "raw_logprobs" if self._chosen.sampling.temperature == 1 else "processed_logprobs"

    def _logprobs_are_whole(self) -> bool:
        """Whether the server's log-probabilities are of all tokens at the temperature, as the trainer's are.

        vLLM reports them either before temperature and cutting, or after both, renormalised over what was kept.
        """
        if not self._chosen.sampling.cuts() or (self._starts and self._logprobs_mode() == "raw_logprobs"):
            return True
        where = "" if self._starts else " on a server of your own"
        warnings.warn(
            "with top_k, top_p, min_p or repetition_penalty vLLM's log-probabilities are of the tokens that are kept"
            f"{where}, and cannot be compared with the trainer's: they are neither measured nor corrected for"
            + (
                " (temperature=1 would allow it)"
                if self._starts
                else ' (vllm_mode="colocate" would allow it)'
            ),
            stacklevel=4,
        )
        return False

    # -- the rest --------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Nothing: the server keeps its memory."""

    def forecast(self, groups: int, group: int, prompt: int) -> str:
        if not self._starts:
            return f"{groups} x {group} completions from vLLM at {self._address()}"
        share = self._args.vllm_gpu_memory_utilization
        return f"{groups} x {group} completions from vLLM, which takes {share:.0%} of the device's memory"

    def close(self) -> None:
        """Ends a server of this run, makes another one forget the adapter, and removes the folders."""
        atexit.unregister(self.close)
        server, adapter = self._server, self._adapter
        self._server = self._adapter = None
        try:
            if server is not None and self._starts:
                server.close()
            elif server is not None and adapter is not None:
                server.unload_adapter(adapter.name)
        except VLLMError as error:  # it is gone, which may be why training ends
            warnings.warn(f"the adapter could not be unloaded: {error}", stacklevel=2)
        finally:
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)
            self._folders = []


def adapter_rank(model: Model) -> int:
    """The rank of an adapter that vLLM can serve.

    Raises:
        ValueError: it cannot serve this one.
    """
    lora = model.lora
    if lora is None:
        raise ValueError(
            "use_vllm=True needs an adapter (get_peft_model): a server gets new versions as adapters; "
            + EMBEDDED
        )
    if lora.use_dora:
        raise ValueError("use_vllm=True: vLLM does not serve DoRA adapters (use_dora=True); " + EMBEDDED)
    if lora.modules_to_save:
        raise ValueError(
            f"use_vllm=True: vLLM does not serve weights that are trained whole (modules_to_save="
            f"{', '.join(lora.modules_to_save)}); {EMBEDDED}"
        )
    if lora.r > RANKS[-1]:
        raise ValueError(
            f"use_vllm=True: vLLM serves ranks up to {RANKS[-1]}, the adapter has r={lora.r}; {EMBEDDED}"
        )
    return lora.r


def find_python(args: GRPOConfig) -> str:
    """The Python to start vLLM with.

    Raises:
        ValueError: there is none.
    """
    chosen = args.vllm_python or os.environ.get(PYTHON_VARIABLE)
    advice = (
        f"; install vLLM in an environment of its own and give its Python (vllm_python=…, or {PYTHON_VARIABLE}), name "
        'a server that runs (vllm_mode="server"), or leave use_vllm out (the embedded engine)'
    )
    if chosen is None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("use_vllm=True: vLLM is not installed here" + advice)
        return sys.executable
    found = shutil.which(os.path.expanduser(chosen))
    if found is None:
        raise ValueError(f"use_vllm=True: {chosen} is no program" + advice)
    return os.path.abspath(found)


def _is_quantised(model: Model) -> bool:
    return any(path.endswith(".codes") for path in model.base)


def check_base(model: Model, args: GRPOConfig) -> None:
    """Raises ValueError where vLLM could not load the checkpoint that it is to serve."""
    if args.vllm_base == "checkpoint" and model.checkpoint.kind != "safetensors":
        raise ValueError(
            f"vllm_base='checkpoint': {model.name_or_path} is stored as {model.checkpoint.kind}, and vLLM needs 16-bit "
            "weights; use vllm_base='policy', which writes them"
        )


def served_folder(model: Model, args: GRPOConfig) -> Path | None:
    """The folder of the checkpoint where that is what is to be served; None: it has to be written first."""
    same = model.checkpoint.kind == "safetensors" and not _is_quantised(model)
    return model.checkpoint.path if same or args.vllm_base == "checkpoint" else None


def save_policy_base(model: Model, folder: str | Path) -> None:
    """Write the weights that training puts the adapter on, dequantised where they have 4 bits, for vLLM to serve.

    Args:
        model: with its adapter, which is left out.
        folder: to make; it takes 2 bytes a weight (4 for a model in float32).
    """
    base = copy.copy(model)
    base.base = without_adapter(model.base)
    save_merged(base, folder, dtype=np.dtype(model.dtype).name, progress=False)


def _shared_memory(nbytes: int) -> str:
    """Shared memory where there is room for two versions of an adapter, else the folder for temporary files."""
    if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK):
        if shutil.disk_usage(_SHARED_MEMORY).free > 2 * nbytes + _SPARE:
            return str(_SHARED_MEMORY)
    return tempfile.gettempdir()


def check_adapter(policy: float, reference: float) -> None:
    """Judges the mean |Δ log p| between vLLM and the trainer's model, with the adapter as it is now and as it began.

    Raises:
        VLLMError: vLLM is nearer to the latter by far: it takes adapters without using them.
    """
    if reference < policy / 2:
        raise VLLMError(
            f"vLLM samples without the adapter as trained: its log-probabilities are {reference:.3g} (nats per token, "
            f"on average) from those of the model that training began with, and {policy:.3g} from those of the model "
            "as it is now, although it has loaded each version. Try --enforce-eager among its arguments "
            f"(vllm_server_args), which leaves CUDA graphs out, another version of vLLM, or {EMBEDDED}"
        )


def check_gap(gap: float, args: GRPOConfig, warn: bool = True) -> bool:
    """Judges the mean |Δ log p| (nats per token) between vLLM and the trainer.

    Returns:
        whether it is above the bound for warnings (a warning is given if `warn`).

    Raises:
        VLLMError: it is above the limit.
    """
    where = f"log-probabilities of vLLM and of the trainer differ by {gap:.3g} on average (nats per token)"
    if args.vllm_logprob_limit is not None and gap > args.vllm_logprob_limit:
        raise VLLMError(
            f"{where}, more than vllm_logprob_limit={args.vllm_logprob_limit}: the server has another base model, or "
            "reports log-probabilities before the temperature. A server for this run serves the base that "
            "jaxtune.rl.vllm_rollout.save_policy_base writes (or the checkpoint, where training is not in 4 bits), "
            "with --logprobs-mode processed_logprobs"
        )
    if gap > args.vllm_logprob_warning and warn:
        advice = (
            ""
            if args.corrects_sampler
            else "; vllm_importance_sampling_correction=True corrects for the difference"
        )
        base = "" if args.vllm_base == "policy" else "; vllm_base='policy' serves the weights as trained"
        warnings.warn(
            f"{where}, more than vllm_logprob_warning={args.vllm_logprob_warning}{base}{advice}", stacklevel=2
        )
    return gap > args.vllm_logprob_warning
