"""vLLM in the place of the embedded engine: a server in an environment of its own, which gets the adapter at each sync.

    adapter -> PEFT folder in shared memory -> load_lora_adapter -> completions -> the one before is unloaded

Each version has a new name and a new folder, since vLLM keeps what it has computed of a prompt under the name and the
path of an adapter: a changed adapter under the old ones would go on with the old one's keys and values. The folder
appears by a rename, so that none is read half written.
"""

import atexit
import copy
import importlib.util
import os
import shutil
import sys
import tempfile
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np

from jaxtune.data.image_encoder import EncodedPrompt
from jaxtune.export.adapter import save_adapter
from jaxtune.export.merged import save_merged
from jaxtune.generate import Generations, Sampling
from jaxtune.model import Model
from jaxtune.rl.reference import without_adapter
from jaxtune.rl.vllm_config import VLLMConfig
from jaxtune.rl.vllm_requests import TRUST_TEMPLATE, generations, question, sampling_fields
from jaxtune.rl.vllm_server import ServedModel, VLLMError, VLLMProcess, VLLMServer, free_port

PYTHON_VARIABLE = "JAXTUNE_VLLM_PYTHON"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for
EMBEDDED = "leave use_vllm out: the embedded engine samples from any adapter"
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
_SHARED_MEMORY = Path("/dev/shm")
_SPARE = 200_000_000  # bytes that are left free there


class VLLMEngine:
    """vLLM with `generate` as the embedded engine has it.

    The server runs already (vllm_mode="server"), or is one of this run (vllm_mode="colocate"). It is started, or looked
    for, when it is first needed, and ends with `close` or with this process.

    Args:
        model: answers are those of its weights and its adapter, as they are at each `sync`.
        args: which server.
        folder: for the log, and for weights that have to be written.
        length: tokens of prompt and answer at most; None: the model's own.
        logprobs_mode: what a server that is started reports: at the temperature and after all cuts, or before either.

    Raises:
        ValueError: vLLM cannot express this model, or is not installed where it is looked for.
    """

    def __init__(
        self,
        model: Model,
        args: VLLMConfig,
        folder: str | Path,
        *,
        length: int | None = None,
        logprobs_mode: LogprobsMode = "raw_logprobs",
    ):
        args.check_server()
        self.model = model
        self._rank = None if model.lora is None else adapter_rank(model)
        self._args, self._folder, self._logprobs_mode = args, Path(folder), logprobs_mode
        self._length = args.vllm_max_model_length or length or model.max_seq_length
        self._starts = args.vllm_mode == "colocate"
        if self._starts:
            self._python = find_python(args)
            check_base(model, args)
        self._server: VLLMServer | None = None
        self._served = ServedModel("", 0)
        self._adapter: Path | None = None  # the folder that is loaded, under its name
        self._run, self._version = uuid.uuid4().hex[:8], 0
        self._folders: list[Path] = []  # removed in the end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the server ------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of a server that runs already."""
        args = self._args
        return args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"

    def _connected(self) -> VLLMServer:
        """The server; started or looked for if there is none yet."""
        if self._server is None:
            atexit.register(self.close)
            try:
                self._server = self._start() if self._starts else VLLMServer(self.address)
                self._server.wait(self._args.vllm_server_timeout)
                self._served = self._server.served_model()
                if self._served.max_length < self._length:
                    raise VLLMError(
                        f"vLLM at {self._server.url} takes {self._served.max_length} tokens, {self._length} are "
                        f"needed; start it with --max-model-len {self._length}, or set vllm_max_model_length if "
                        "prompt and completion together are never longer"
                    )
            except BaseException:
                self.close()
                raise
        return self._server

    def _start(self) -> VLLMServer:
        base = served_folder(self.model, self._args)
        if base is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            base = Path(tempfile.mkdtemp(prefix="vllm-base-", dir=self._folder)).resolve()
            self._folders.append(base)
            save_policy_base(self.model, base)
        port = free_port()
        arguments = self._server_arguments(base, port)
        folders = self._folders if self._rank is None else [self._adapter_room(), *self._folders]
        process = VLLMProcess(self._python, arguments, self._folder / "vllm.log", folders)
        return VLLMServer(f"http://127.0.0.1:{port}", process)

    def _server_arguments(self, base: Path, port: int) -> list[str]:
        args = self._args
        values = {
            "model": base,
            "served-model-name": "base",
            "host": "127.0.0.1",
            "port": port,
            "dtype": np.dtype(self.model.dtype).name,
            "max-model-len": self._length,
            "generation-config": "vllm",
            "logprobs-mode": self._logprobs_mode,
            "gpu-memory-utilization": args.vllm_gpu_memory_utilization,
            "tensor-parallel-size": args.vllm_tensor_parallel_size,
        }
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        if self._rank is not None:
            room = next(rank for rank in RANKS if rank >= self._rank)
            flags += ["--enable-lora", "--max-lora-rank", str(room)]
        if self.model.processor is not None:
            flags.append(TRUST_TEMPLATE)
        return [*flags, *args.vllm_server_args]

    # -- versions --------------------------------------------------------------------------------------------

    def _adapter_room(self) -> Path:
        """The folder for adapters, made at its first use."""
        made = [folder for folder in self._folders if folder.name.startswith("jaxtune-")]
        if not made:
            parent = self._args.vllm_adapter_dir or _shared_memory(4 * self.model.num_trainable())
            Path(parent).mkdir(parents=True, exist_ok=True)
            room = Path(tempfile.mkdtemp(prefix="jaxtune-", dir=parent)).resolve()
            room.chmod(0o755)  # the server may belong to somebody else
            made = [room]
            self._folders += made
        return made[0]

    def sync(self) -> None:
        """Gives the server the adapter as it is now, under a new name; the one before is forgotten.

        Raises:
            VLLMError: there is no server, or it refuses. ValueError: the adapter holds NaN.
        """
        server = self._connected()
        if self._rank is None:
            return
        self._version += 1
        folder = self._adapter_room() / f"jaxtune-{self._run}-v{self._version}"
        save_adapter(self.model, folder, with_tokenizer=False, of_checkpoint=False)
        server.load_adapter(folder.name, folder, self._rank)
        before, self._adapter = self._adapter, folder
        if before is not None:
            server.unload_adapter(before.name)
            shutil.rmtree(before, ignore_errors=True)

    # -- answers ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        streams: Sequence[tuple[int, int]] | None = None,
        seen: Sequence[EncodedPrompt] | None = None,
    ) -> Generations:
        """Answers of the last synced adapter; arguments and result as for `jaxtune.generate.Engine.generate`.

        Log-probabilities are what the server reports: see `logprobs_mode`.

        Args:
            seen: each prompt with its images.

        Raises:
            VLLMError: no server, no answer in time, a refusal, or an answer that is none.
        """
        if self._adapter is None:  # nothing is synced, or closed since
            self.sync()
        fields = sampling_fields(sampling or Sampling(), stop_strings)
        fields["model"] = self._served.name if self._adapter is None else self._adapter.name
        fields["stop_token_ids"] = self.model.stop_ids()
        asked = []
        for i, prompt in enumerate(prompts):
            number, first = (i, 0) if streams is None else streams[i]
            # vLLM seeds sample j of a request with seed + j: neighbours must not share these.
            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) + first
            its = fields | {"max_tokens": min(max_new_tokens, self._room(len(prompt))), "seed": own}
            asked.append(question(i, prompt, None if seen is None else seen[i], n, its))
        try:
            wanted = [(one.route, one.payload) for one in asked]
            answers = self._connected().complete(wanted, self._args.vllm_request_timeout)
        except VLLMError as error:
            if any(one.has_images for one in asked) and not self._starts:
                error.add_note(
                    f"A server that takes images is started with {TRUST_TEMPLATE} among its arguments."
                )
            raise
        return Generations([one for pair in zip(answers, asked, strict=True) for one in generations(*pair)])

    def _room(self, prompt: int) -> int:
        """Tokens that may come behind a prompt of so many."""
        room = self._served.max_length - prompt
        if room < 1:
            raise VLLMError(
                f"a prompt has {prompt} tokens and vLLM takes {self._served.max_length} of prompt and completion; "
                "start it with a larger --max-model-len (vllm_max_model_length), or leave longer prompts out"
            )
        return room

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
        except VLLMError as error:  # it is gone, which may be why this ends
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
    assert lora is not None
    if lora.use_dora:
        raise ValueError("use_vllm=True: vLLM does not serve DoRA adapters (use_dora=True); " + EMBEDDED)
    if lora.modules_to_save:
        raise ValueError(
            f"use_vllm=True: vLLM does not serve weights that are trained whole (modules_to_save="
            f"{', '.join(lora.modules_to_save)}); {EMBEDDED}"
        )
    inside, paths = f"{model.module.decoder_path}.", [path.rpartition(".")[0] for path in model.trainable]
    if outside := [path for path in paths if not path.startswith((inside, "lm_head"))]:
        raise ValueError(
            "use_vllm=True: vLLM serves adapters of the language model's layers, and this one is on others "
            f"({outside[0]}, …); leave the tower out (get_peft_model(finetune_vision_layers=False)), or {EMBEDDED}"
        )
    if lora.r > RANKS[-1]:
        raise ValueError(
            f"use_vllm=True: vLLM serves ranks up to {RANKS[-1]}, the adapter has r={lora.r}; {EMBEDDED}"
        )
    return lora.r


def find_python(args: VLLMConfig) -> str:
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


def check_base(model: Model, args: VLLMConfig) -> None:
    """Raises ValueError where vLLM could not load the checkpoint that it is to serve."""
    if args.vllm_base == "checkpoint" and model.checkpoint.kind != "safetensors":
        raise ValueError(
            f"vllm_base='checkpoint': {model.name_or_path} is stored as {model.checkpoint.kind}, and vLLM needs 16-bit "
            "weights; use vllm_base='policy', which writes them"
        )
    if args.vllm_base == "checkpoint" and model.checkpoint.text_side is not None:
        raise ValueError(
            f"vllm_base='checkpoint': {model.name_or_path} is the whole vision-language model, and text_only=True "
            "trains its text model; use vllm_base='policy', which writes that"
        )


def served_folder(model: Model, args: VLLMConfig) -> Path | None:
    """The folder of the checkpoint where that is what is to be served; None: it has to be written first."""
    changed = any(path.endswith(".codes") for path in model.base) or (model.lora is None and model.trainable)
    same = model.checkpoint.kind == "safetensors" and model.checkpoint.text_side is None and not changed
    return model.checkpoint.path if same or args.vllm_base == "checkpoint" else None


def save_policy_base(model: Model, folder: str | Path) -> None:
    """Write the weights that the adapter is put on, dequantised where they have 4 bits, for vLLM to serve.

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
