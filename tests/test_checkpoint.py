"""Checkpoints: bit for bit, whole or not there (killed process, full disk), and only for the run that wrote them."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from datasets import Dataset

from jaxtune import checkpoint
from jaxtune.config import SFTConfig
from jaxtune.data import content_digest
from jaxtune.metrics import TrainerState


def make_run(seed: int = 0):
    """Trained leaves of several dtypes and an optimizer state with more than ten leaves in a list."""
    rng = np.random.default_rng(seed)
    arrays = {f"model.layers.0.{i}.lora_A": rng.standard_normal((3, 8, 4), np.float32) for i in range(4)}
    arrays["embed_tokens.weight"] = rng.standard_normal((16, 8)).astype(jnp.bfloat16)
    moments = [rng.standard_normal(5, np.float32) for _ in range(12)]
    adam = optax.ScaleByAdamState(np.int32(seed), arrays, {name: array * 2 for name, array in arrays.items()})
    opt_state = (adam, optax.EmptyState(), moments, {"codes": np.arange(256, dtype=np.uint8)})
    return jax.device_put((arrays, opt_state))


def save(output_dir, step, seed=0, write_model=lambda folder: None):
    trainable, opt_state = make_run(seed)
    return checkpoint.save_checkpoint(
        output_dir, trainable, opt_state, TrainerState(global_step=step), {"seed": seed}, write_model
    )


def assert_whole(folder, seed=0):
    """The checkpoint loads and holds exactly what save(seed) put into it."""
    expected = make_run(seed)
    loaded = checkpoint.load_checkpoint(folder, *make_run(seed=99))
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    state, run = checkpoint.read_state(folder)
    assert (state.global_step, run) == (int(folder.name.split("-")[1]), {"seed": seed})


def test_round_trip_is_bitwise(tmp_path):
    folder = save(tmp_path, 7, write_model=lambda folder: (folder / "adapter_config.json").write_text("{}"))
    assert folder == tmp_path / "checkpoint-7"
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "adapter_config.json", "state", "trainer_state.json"
    ]  # fmt: skip
    assert_whole(folder)


def test_state_survives_exactly(tmp_path):
    state = TrainerState(
        global_step=3,
        max_steps=9,
        epoch=1 / 3,
        num_input_tokens_seen=2**40,
        log_history=[{"loss": 0.1 + 0.2, "step": 2}],
        total_loss=float(np.float32(1 / 3)),
        window={"loss": 1e-300, "steps": 1},
    )
    folder = checkpoint.save_checkpoint(tmp_path, *make_run(), state, {}, lambda folder: None)
    assert checkpoint.read_state(folder)[0] == state


def test_saving_again_replaces(tmp_path):
    save(tmp_path, 5, seed=1)
    assert_whole(save(tmp_path, 5, seed=2), seed=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def test_finding(tmp_path):
    assert checkpoint.find_checkpoint(None, tmp_path) is None
    assert checkpoint.find_checkpoint(False, tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint-N folder"):
        checkpoint.find_checkpoint(True, tmp_path / "missing")
    for name in ("checkpoint-9", "checkpoint-10", "tmp-checkpoint-11", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert checkpoint.checkpoint_steps(tmp_path) == [9, 10]
    assert checkpoint.find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint.find_checkpoint(str(tmp_path / "checkpoint-9"), "x") == tmp_path / "checkpoint-9"
    with pytest.raises(FileNotFoundError, match="checkpoint-1"):
        checkpoint.find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint of jaxtune"):
        checkpoint.read_state(tmp_path / "checkpoint-10")


def test_failure_while_writing_leaves_nothing(tmp_path):
    save(tmp_path, 1)

    def fail(folder):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path, 2, write_model=fail)
    assert "the last whole one is checkpoint-1" in caught.value.__notes__[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


# One process; each case runs in a fork of it made before JAX has started, because importing takes the time.
FORKS = """
import json, os, resource, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import test_checkpoint as t

def kill_at(event, path, times=1):
    seen = 0
    def hook(name, arguments):
        nonlocal seen
        if name == event and str(arguments[0]).endswith(path):
            seen += 1
            if seen == times:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def child(folder, case):
    t.save(folder, 1)
    if case["again"]:
        t.save(folder, 2, seed=1)
    if "bytes" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["bytes"],) * 2)
    if "kill" in case:
        kill_at(*case["kill"])
    try:
        t.save(folder, 2, seed=2, write_model=lambda part: (part / "adapter.bin").write_bytes(b"x" * 100))
    except (OSError, ValueError) as error:
        os._exit(3)
    os._exit(0)

os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Orbax reports failed writes there
for number, case in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        child(Path(sys.argv[2]) / str(number), case)
    status = os.waitpid(pid, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""


def run_in_forks(cases, folder) -> list[int]:
    """Exit codes: -9 killed, 3 failed to write, 0 written."""
    from pathlib import Path

    script = FORKS.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(cases), str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(line) for line in done.stdout.split()]


def test_killed_process_leaves_only_whole_checkpoints(tmp_path):
    new, old = "tmp-checkpoint-2", "tmp-checkpoint-2-old"
    moments = {  # what the process was about to do when it was killed -> steps that are there afterwards
        ("os.mkdir", new): [1],
        ("os.rename", "state.orbax-checkpoint-tmp"): [1],
        ("open", "adapter.bin"): [1],
        ("open", "trainer_state.json"): [1],
        ("open", "trainer_state.json", 2): [1],  # written, being forced to the disk
        ("os.rename", new): [1],
    }
    replacing = {
        ("open", "trainer_state.json", 2): [1, 2],
        ("os.rename", "/checkpoint-2"): [1, 2],
        ("os.rename", new): [1],
        ("shutil.rmtree", old): [1, 2],
    }
    cases = [{"again": False, "kill": moment, "steps": steps} for moment, steps in moments.items()]
    cases += [{"again": True, "kill": moment, "steps": steps} for moment, steps in replacing.items()]
    cases.append({"again": False, "steps": [1, 2]})
    assert run_in_forks(cases, tmp_path) == [-9] * (len(cases) - 1) + [0]
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        assert checkpoint.checkpoint_steps(folder) == case["steps"], case
        assert_whole(folder / "checkpoint-1")
        if 2 in case["steps"]:
            replaced = not case["again"] or case["kill"][0] == "shutil.rmtree"
            assert_whole(folder / "checkpoint-2", seed=2 if replaced else 1)
        checkpoint.remove_leftovers(folder)
        assert sorted(entry.name for entry in folder.iterdir()) == [
            f"checkpoint-{step}" for step in case["steps"]
        ]


def test_full_disk_leaves_only_whole_checkpoints(tmp_path):
    cases = [{"again": again, "bytes": size} for again, size in ((False, 20), (False, 5000), (True, 1500))]
    assert run_in_forks(cases, tmp_path) == [3] * len(cases)
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        checkpoint.remove_leftovers(
            folder
        )  # Orbax's threads may still write while the folder is being deleted
        expected = ["checkpoint-1", "checkpoint-2"] if case["again"] else ["checkpoint-1"]
        assert sorted(entry.name for entry in folder.iterdir()) == expected
        assert_whole(folder / "checkpoint-1")
        if case["again"]:
            assert_whole(folder / "checkpoint-2", seed=1)


def test_fingerprint_names_what_differs():
    model = SimpleNamespace(
        trainable={"a.lora_A": jnp.ones((4, 2))},
        base={"a.weight": jnp.ones((4, 4)), "scale": jnp.float32(1), "codes": jnp.zeros((2, 3), jnp.uint8)},
        lora=SimpleNamespace(r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=False, use_dora=False),
        dtype=jnp.bfloat16,
        compute_dtype=None,
    )
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    args = SFTConfig(max_steps=10, warmup_ratio=0.1)

    def fingerprint(args=args, steps=10, rows=rows, **changes):
        changed = SimpleNamespace(**vars(model) | changes)
        data = {"rows of data": len(rows), "data (digest)": content_digest(Dataset.from_list(rows))}
        return checkpoint.fingerprint(args, steps, changed, data)

    saved = fingerprint()
    assert json.loads(json.dumps(saved)) == saved
    free = dataclasses.replace(
        args, output_dir="b", save_steps=3, logging_steps=1, report_to="wandb", warmup_ratio=0.05
    )
    checkpoint.check_fingerprint(saved, fingerprint(free), "checkpoint-1")

    changes = {
        "learning_rate": fingerprint(dataclasses.replace(args, learning_rate=1e-3)),
        "seed": fingerprint(dataclasses.replace(args, seed=1)),
        "steps of the schedule": fingerprint(steps=11, args=dataclasses.replace(args, warmup_steps=1)),
        "dtype": fingerprint(dtype=jnp.float32),
        "compute_dtype": fingerprint(compute_dtype="fp8"),
        "lora_alpha": fingerprint(lora=SimpleNamespace(**vars(model.lora) | {"lora_alpha": 16})),
        "trained weights": fingerprint(trainable={"a.lora_A": jnp.ones((4, 3))}),
        "frozen weights": fingerprint(base=model.base | {"scale": jnp.float32(2)}),
        "rows of data": fingerprint(rows=rows[:1]),
        "data": fingerprint(
            rows=[{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]
        ),
    }
    for name, now in changes.items():
        with pytest.raises(ValueError, match="differs in what decides the result") as caught:
            checkpoint.check_fingerprint(saved, now, "checkpoint-1")
        lines = str(caught.value).splitlines()[1:-1]
        assert any(line.startswith(f"  {name}") for line in lines), (name, lines)
        assert len(lines) <= 2

    constant = dataclasses.replace(args, lr_scheduler_type="constant", warmup_ratio=0.0)
    checkpoint.check_fingerprint(fingerprint(constant), fingerprint(constant, steps=20), "checkpoint-1")


def test_removing_checkpoints(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.remove_checkpoints(tmp_path, [1, 3])
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]
