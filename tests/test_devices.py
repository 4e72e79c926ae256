"""Several devices give what one gives: the runs of devices_program, on 8 devices that a CPU plays; and what is sent."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vision
from devices_program import DPO_LAYOUTS, GRPO_LAYOUTS, LAYOUTS, VISION_GRPO_LAYOUTS, VISION_LAYOUTS
from processes_program import TIMEOUT
from tolerances import DEVICES

from jaxtune.checkpoint import checkpoint_steps, remove_leftovers
from jaxtune.cluster import launcher
from jaxtune.config import ClusterArguments, LoadArguments, SFTConfig
from jaxtune.data import Batches
from jaxtune.devices import ONE_DEVICE, make_layout
from jaxtune.fast import FastLanguageModel
from jaxtune.metrics import read_history

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("roofline", ROOT / "scripts" / "bench" / "roofline.py")
assert spec is not None and spec.loader is not None
roofline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(roofline)


@pytest.fixture(scope="module")
def folder(tiny_model_dir) -> Path:
    return tiny_model_dir("llama")


def environment(devices: int, programs: Path) -> dict[str, str]:
    """Of a program whose CPU plays so many devices; `programs` keeps what it compiles for the next."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(programs),
    }


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """Compiled ones, so that the same step is compiled once for all processes of this module."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory) -> Path:
    parts = {
        "text_config": {"num_hidden_layers": 2},
        "vision_config": {"depth": 2, "fullatt_block_indexes": [1]},
    }
    model = tiny_vision.make_model(tiny_vision.make_config("qwen2_5_vl", **parts))
    return tiny_vision.save(model, tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def out(folder, vision_folder, programs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("devices")
    done = subprocess.run(
        [sys.executable, "tests/devices_program.py", str(folder), str(vision_folder), str(out)],
        capture_output=True, text=True, cwd=ROOT, timeout=900, env=environment(8, programs),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def results(out) -> dict[str, np.ndarray]:
    with np.load(out / "results.npz") as file:
        return dict(file)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= DEVICES * np.linalg.norm(want)


SEVERAL = [f"{data}x{fsdp}" for data, fsdp, _ in LAYOUTS if data * fsdp > 1]


@pytest.mark.parametrize("name", [*SEVERAL, "resumed"])
def test_ten_steps_are_those_of_one_device(results, name):
    """Packing, accumulation, dropout, noise, steps that do not fill the devices; resumed: half on 4, half on 8."""
    assert len(results["sft 1x1 loss"]) == 10
    assert_same(results[f"sft {name} loss"], results["sft 1x1 loss"])
    assert_same(results[f"sft {name} weights"], results["sft 1x1 weights"])


def test_evaluation_is_that_of_one_device(results):
    for name in ("8x1", "1x8"):
        assert_same(results[f"eval {name}"], results["eval 1x1"])


@pytest.mark.parametrize("name", [f"{data}x{fsdp}" for data, fsdp in GRPO_LAYOUTS[1:]])
def test_a_grpo_step_is_that_of_one_device(results, name):
    assert_same(results[f"grpo {name} metrics"], results["grpo 1x1 metrics"])
    assert_same(results[f"grpo {name} weights"], results["grpo 1x1 weights"])


@pytest.mark.parametrize("kind", [f"vision {data}x{fsdp}" for data, fsdp, _ in VISION_LAYOUTS[1:]])
def test_rows_with_images_train_as_on_one_device(results, kind):
    """Each device has its rows' images to itself."""
    for name in ("loss", "weights", "eval"):
        assert_same(results[f"{kind} {name}"], results[f"vision 1x1 {name}"])


@pytest.mark.parametrize("layout", [f"{data}x{fsdp}" for data, fsdp in DPO_LAYOUTS[1:]])
@pytest.mark.parametrize("kind", ["dpo", "vision dpo"])
def test_dpo_is_that_of_one_device(results, kind, layout):
    for name in ("loss", "weights", "metrics"):
        assert_same(results[f"{kind} {layout} {name}"], results[f"{kind} 1x1 {name}"])


@pytest.mark.parametrize("kind", [f"vision grpo {data}x{fsdp}" for data, fsdp in VISION_GRPO_LAYOUTS[1:]])
def test_grpo_on_images_is_that_of_one_device(results, kind):
    """Completions, rewards, losses and weights; each device has its rows' images to itself."""
    for name in ("loss", "weights", "metrics", "eval"):
        assert_same(results[f"{kind} {name}"], results[f"vision grpo 1x1 {name}"])


@pytest.fixture(scope="module")
def leaves(folder):
    """(those that fsdp splits, bytes by dtype; the trained ones, bytes) of the program's model."""
    from devices_program import TARGETS

    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=TARGETS)
    codes = sum(x.nbytes for path, x in model.base.items() if path.endswith((".codes", ".absmax")))
    whole = {path: model.base[path].nbytes for path in ("model.embed_tokens.weight", "lm_head.weight")}
    return codes, whole, sum(x.nbytes for x in model.trainable.values())


def test_memory_of_the_base_falls_with_fsdp(results, leaves):
    codes, whole, _ = leaves
    split = codes + sum(whole.values())
    for fsdp in (2, 4, 8):
        assert results[f"bytes 1x{fsdp}"] == results["bytes 1x1"] - split * (fsdp - 1) // fsdp
    assert results["bytes 8x1"] == results["bytes 1x1"]


SCALARS = {("all-reduce", "s32"): 8}  # label tokens, tokens


def test_data_sends_gradients_only(out, leaves):
    _, _, trained = leaves
    sent = roofline.traffic((out / "program 4x1.txt").read_text())
    assert sent == SCALARS | {("all-reduce", "f32"): trained + 8}  # loss and accuracy


def test_fsdp_gathers_codes_and_no_weights_of_layers(out, leaves):
    """Two micro-batches, each forwards and backwards: four times the codes. Floats: the head once, and the embedded
    tokens (not their table)."""
    codes, whole, trained = leaves
    rows = 2 * 4  # micro-batches, devices
    sent = roofline.traffic((out / "program 1x4.txt").read_text())
    assert sent == SCALARS | {
        ("all-reduce", "f32"): trained + 8,
        ("all-gather", "u8"): 4 * codes,
        ("all-gather", "f32"): whole["lm_head.weight"],
        ("all-gather", "s32"): rows * 64 * 4,
        ("all-to-all", "f32"): 2 * 64 * 128 * 4,
    }


def test_a_batch_is_the_sum_of_its_parts():
    """What each process makes, side by side, is what one makes; also where rows are missing."""
    from datasets import Dataset

    rows = [{"input_ids": [i] * (i + 1), "labels": [i] * (i + 1)} for i in range(11)]

    def batches(part, **changes):
        how = {"batch_size": 4, "accumulation": 2, "max_length": 16, "packed": False, "rows_per_step": 7}
        return Batches(Dataset.from_list(rows), part=part, **how | changes)

    one, parts = batches((0, 1)), [batches((i, 2)) for i in range(2)]
    assert one.steps_per_epoch == 2
    for n in range(4):
        made = [part.step(n) for part in parts]
        for name, array in one.step(n).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in made], axis=1), array)
        assert sorted(np.concatenate([part.own_rows(n) for part in parts])) == sorted(one.rows(n))
    for both in zip(one.eval_batches(), *(part.eval_batches() for part in parts), strict=True):
        np.testing.assert_array_equal(
            np.concatenate([b["input_ids"] for b in both[1:]]), both[0]["input_ids"]
        )
    with pytest.raises(ValueError, match="batch_size=4 does not divide into 3 parts"):
        batches((0, 3))


def test_total_batch_size_decides_accumulation():
    args = SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert args.batch_shape(1) == (3, 2, 6) and args.batch_shape(4) == (3, 8, 24)
    args = SFTConfig(per_device_train_batch_size=2, total_batch_size=12)
    assert [args.batch_shape(n) for n in (1, 2, 4)] == [(6, 2, 12), (3, 4, 12), (2, 8, 12)]


def test_layouts_that_cannot_be():
    assert make_layout(0) is ONE_DEVICE  # a CPU host has one unless more are asked for
    with pytest.raises(ValueError, match="devices=2: there are 1"):
        make_layout(0, devices=2)
    with pytest.raises(ValueError, match="data=2 × fsdp=1 is not devices=1"):
        make_layout(0, devices=1, data=2, fsdp=1)
    for wrong in ({"fsdp": 0}, {"data": -1}, {"devices": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            LoadArguments(**wrong)
    with pytest.raises(ValueError, match="expected one of 'auto', a number"):
        LoadArguments(fsdp="all")  # pyrefly: ignore


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_processes(
    folder: Path, out: Path, programs: Path, count: int, layout: tuple[int, int, int], *action: str
) -> list[tuple]:
    """(exit status, output, seconds after the first that ended) of each process of processes_program; 4 devices in all
    where they are two."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    env = environment(2 if count == 2 else 8, programs) | {"JAX_COORDINATOR_BIND_ADDRESS": address}
    words = [sys.executable, "tests/processes_program.py", str(folder), str(out), address]
    logs = [(out.parent / f"{action[0]}{number}.txt").open("w+") for number in range(count)]
    running = [
        subprocess.Popen(
            [*words, str(number), str(count), *map(str, layout), *action],
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
        )
        for number, log in enumerate(logs)
    ]  # fmt: skip
    ended: dict[int, float] = {}
    began = time.monotonic()
    while len(ended) < count and time.monotonic() - began < 300:
        ended |= {
            i: time.monotonic() for i, p in enumerate(running) if i not in ended and p.poll() is not None
        }
        time.sleep(0.1)
    for process in running:
        process.kill()
    found = []
    for number, (process, log) in enumerate(zip(running, logs, strict=True)):
        log.seek(0)
        found.append((process.wait(), log.read(), ended.get(number, np.inf) - min(ended.values(), default=0)))
        log.close()
    return found


def test_a_process_killed_while_two_save_leaves_whole_checkpoints(programs, tmp_path):
    """The other ends too, and of what was being written nothing looks like a checkpoint."""
    from saves_program import MOMENTS
    from test_checkpoint import assert_whole

    ports = map(str, free_ports(len(MOMENTS)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/saves_program.py", str(tmp_path), str(TIMEOUT), *ports],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment(1, programs),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ended = json.loads(done.stdout)
    for case, killed in MOMENTS.items():
        other, log = ended[case][1 - killed], (tmp_path / f"{case}.{1 - killed}.txt").read_text()
        assert ended[case][killed][0] == -9, (case, (tmp_path / f"{case}.{killed}.txt").read_text()[-3000:])
        assert other[0] != 0 and other[1] < 2 * TIMEOUT + 5, (case, other, log[-3000:])
        assert checkpoint_steps(tmp_path / case) == [1], case
        assert_whole(tmp_path / case / "checkpoint-1", seed=1)
        remove_leftovers(tmp_path / case)
        assert [entry.name for entry in (tmp_path / case).iterdir()] == ["checkpoint-1"], case


def test_two_processes(folder, programs, results, tmp_path):
    """Two processes of two devices each. One is killed in the second save; they go on and one is told to end; one alone
    goes on from there. Every step of theirs is that of one device."""
    out = tmp_path / "run"
    lost, killed = run_processes(folder, out, programs, 2, (4, 1, 2), "kill")
    assert killed[0] == -9
    assert lost[0] != 0 and lost[2] < 2 * TIMEOUT + 5
    assert "tasks are unhealthy (stopped sending heartbeats):\n1" in lost[1], lost[1][-3000:]
    assert checkpoint_steps(out) == [5]
    losses = {record["step"]: record["loss"] for record in read_history(out / "history.jsonl")}

    for status, log, _ in run_processes(folder, out, programs, 2, (1, 4, 3), "term"):
        assert status == 128 + 15, log[-3000:]
    last = checkpoint_steps(out)[-1]
    assert 7 <= last <= 10  # how far the other was ahead when it heard of it
    again = {r["step"]: r["loss"] for r in read_history(out / "history.jsonl") if "loss" in r}
    assert list(again) == list(range(1, last + 1))

    ((status, log, _),) = run_processes(folder, out, programs, 1, (1, 1, 4), "all")
    assert status == 0, log[-3000:]
    assert_same(np.load(out / "weights.npy"), results["sft 1x1 weights"])
    for found in (losses, again):
        assert_same(np.asarray(list(found.values())), results["sft 1x1 loss"][: len(found)])


def test_two_processes_do_grpo_and_dpo(folder, vision_folder, programs, results, tmp_path):
    """Completions, rewards, losses and weights are those of one device; also from a checkpoint inside a generation, and
    on images."""
    out = tmp_path / "rl"
    for status, log, _ in run_processes(folder, out, programs, 2, (4, 1, 2), "rl", str(vision_folder)):
        assert status == 0, log[-3000:]
    with np.load(out / "results.npz") as found:
        for name in ("loss", "weights", "metrics", "eval"):
            assert_same(found[f"grpo run {name}"], results[f"grpo run {name}"])
            assert_same(found[f"grpo resumed {name}"], results[f"grpo run {name}"])
            assert_same(found[f"vision grpo 1x1 {name}"], results[f"vision grpo 1x1 {name}"])
        for name in ("loss", "weights", "metrics"):
            assert_same(found[f"dpo 1x1 {name}"], results[f"dpo 1x1 {name}"])


def test_the_command_of_two_processes(folder, programs, tmp_path):
    """As docs/devices.md prints it, in two shells: the first speaks and writes."""
    rows = [{"text": f"the number {i} is " + "long " * i} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(
        f"model_name: {folder}\ndataset: {tmp_path / 'rows.jsonl'}\noutput_dir: {tmp_path / 'run'}\nmax_steps: 2\n"
        "max_seq_length: 64\nper_device_train_batch_size: 1\nsave_strategy: 'no'\nr: 4\ntarget_modules: [q_proj]\n"
        "remat: all\nlogging_steps: 1\ndtype: float32\n"
    )
    address = f"127.0.0.1:{free_ports(1)[0]}"
    words = f"-m jaxtune.train --config {tmp_path / 'run.yaml'} --total_batch_size 4 --coordinator {address}".split()
    env = environment(1, programs) | {"JAX_COORDINATOR_BIND_ADDRESS": address}
    running = [
        subprocess.Popen(
            [sys.executable, *words, "--num_processes", "2", "--process_id", str(number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env,
        )
        for number in range(2)
    ]  # fmt: skip
    (said, log), (silent, other) = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], log[-2000:] + other[-2000:]
    assert "(2, 2 processes)" in said and "2 devices (data=2, fsdp=1" in said and "jaxtune" not in silent
    history = read_history(tmp_path / "run" / "history.jsonl")
    assert [record["step"] for record in history if "loss" in record] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    """So that all can save, and none waits for one that has gone."""
    import pickle

    from jaxtune import cluster

    assert cluster.gathered(lambda: 3) == [3]
    monkeypatch.setattr(cluster.jax, "process_count", lambda: 2)
    for other, error, message in (
        ((None, "RewardError: bad"), RuntimeError, "process 1 failed: RewardError: bad"),
        ((5, None), ZeroDivisionError, "division"),
    ):
        monkeypatch.setattr(cluster, "_all_bytes", lambda own, other=other: [own, pickle.dumps(other)])
        with pytest.raises(error, match=message):
            cluster.gathered(lambda other=other: 1 if other[1] else 1 / 0)
    assert cluster.gathered(lambda: 3) == [3, 5]


def test_rollouts_that_several_hosts_do_not_make(monkeypatch):
    from types import SimpleNamespace

    from jaxtune.rl import sources
    from jaxtune.rl.config import GRPOConfig

    monkeypatch.setattr(sources.cluster, "part", lambda: (0, 2))
    model: Any = SimpleNamespace(layout=SimpleNamespace(fsdp=2))
    with pytest.raises(ValueError, match="use_vllm=True is for the GPUs of one host"):
        sources.make_rollout(model, GRPOConfig(use_vllm=True), None, None)
    with pytest.raises(ValueError, match="fsdp=2: in a run of several processes"):
        sources.make_rollout(model, GRPOConfig(), None, None)


def test_launchers_and_their_settings(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    assert launcher() is None
    for name, variables in {
        "SLURM (srun)": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        "MPI": {"PMI_SIZE": "2", "PMI_RANK": "1"},
        "Kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
        None: {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    }.items():
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            assert launcher() == name
    with pytest.raises(ValueError, match="need a coordinator"):
        ClusterArguments(num_processes=2)
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        ClusterArguments("host")


def test_rollouts_are_split_by_prompts():
    """Each device's engine gets a part of the prompts and says which; the answers come back in the order of all."""
    from types import SimpleNamespace

    import jax

    from jaxtune.rl.config import GRPOConfig
    from jaxtune.rl.rollout import EngineRollout, Request, chosen_sampling

    class Engine:
        def generate(self, prompts, *, n, streams, **_):
            assert [[p] for p, _ in streams] == prompts
            return [
                SimpleNamespace(token_ids=[p, j], logprobs=[0.0, 0.0]) for p, _ in streams for j in range(n)
            ]

    for engines in (1, 2, 3):
        rollout = EngineRollout.__new__(EngineRollout)
        rollout._chosen = chosen_sampling(GRPOConfig())
        rollout._devices, rollout._engines = [jax.devices()[0]] * engines, [Engine() for _ in range(engines)]
        ids = [[p] for p in (0, 0, 1, 1)]
        made = rollout.generate(Request([""] * 4, ids, group=2, seed=0, max_new_tokens=4))
        assert made.completion_ids == [[0, 0], [0, 1], [1, 0], [1, 1]]
