"""Several processes over loopback train as one does, hand runs over, and end together."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import SMALL, losses_of, record_of, weights_of

from ttt import train
from ttt.config import compose, resolve
from ttt.infra.checkpoint import Checkpoints, read_flat

FEW = [
    *SMALL[:-1],
    "training.dummy_dataset=true",
    "training.global_batch_size=8",
    "training.accum_steps=2",
    "training.eval_batch_size=4",
    "training.eval_batches=1",
    "training.optimizer_outer.lr_decay_steps=8",
    "training.save_every_steps=2",
]
SWA = ["+experiment=tiny/pretrain/pretrain-tiny-swa", "model.suffix_len=0"]
HANGS_AFTER_SECONDS = 1200
pytestmark = pytest.mark.slow


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        *SWA,
        *FEW,
        f"deploy_paths.checkpoint={folder}/checkpoints",
        f"deploy_paths.experiments={folder}/experiments",
        f"backend.compilation_cache_dir={jax.config.jax_compilation_cache_dir}",
        *more,
    ]


def free_address() -> str:
    """A port to listen on, below those that systems hand out to outgoing connections.

    One of those can be taken by any program between this call and the coordinator's start.
    """
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError:
                continue
        return f"127.0.0.1:{port}"


def start(folder: Path, count: int, *more: str) -> list[subprocess.Popen]:
    """`train` in so many processes, which find each other by environment variables."""
    address = free_address()
    processes = []
    folder.mkdir(exist_ok=True)
    for number in range(count):
        cluster = {
            "TTT_COORDINATOR_ADDRESS": address,
            "TTT_NUM_PROCESSES": str(count),
            "TTT_PROCESS_ID": str(number),
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, "-m", "ttt.train", "backend=distributed"]
        with (folder / f"log-{count}-{number}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, *overrides(folder, *more)],
                    cwd=Path(__file__).parents[1],
                    env=os.environ | cluster,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def wait(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes. A process that hangs is killed in the end, and the test fails."""
    limit = time.monotonic() + HANGS_AFTER_SECONDS
    try:
        return [process.wait(max(0.0, limit - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def logs(folder: Path, count: int) -> list[str]:
    return [(folder / f"log-{count}-{number}").read_text() for number in range(count)]


def test_a_run_goes_from_one_process_to_two_to_four_and_back_with_the_losses_of_one(tmp_path):
    straight = resolve(compose(overrides(tmp_path / "straight", "training.total_steps=8")))
    train.run(straight)
    moved = tmp_path / "moved"
    config = resolve(compose(overrides(moved, "training.total_steps=2")))
    train.run(config)
    for count, steps, how in ((2, 4, "fsdp"), (4, 6, "fsdp")):
        more = [f"training.total_steps={steps}", f"backend.sharding={how}"]
        codes = wait(start(moved, count, *more))
        assert codes == [0] * count, logs(moved, count)
    train.run(resolve(compose(overrides(moved, "training.total_steps=8"))))

    assert losses_of(config) == pytest.approx(losses_of(straight), abs=1e-5)
    for name, weights in weights_of(straight).items():
        assert weights_of(config)[name] == pytest.approx(weights, abs=1e-5), name
    # One process wrote, nothing twice; the others said nothing.
    rows = record_of(config).metrics()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "final_eval_loss" in row] == [2, 4, 6, 8]
    attempts = record_of(config).run()["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["finished"] * 4
    assert [len(attempt["hardware"]["devices"]) for attempt in attempts] == [1, 2, 4, 1]
    first, second = logs(moved, 2)
    assert "train 4/4" in first
    for word in ("train ", "checkpoint", "position"):
        assert word not in second


SAVING = """
import sys
import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from ttt.infra import mesh
from ttt.infra.checkpoint import Checkpoints

folder, address, number = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, int(number))
devices = mesh.device_mesh()
layout = mesh.Layout(devices, (("divided", ("data",)), ("**", ())))
whole = np.arange(3 * 8, dtype=np.float32).reshape(3, 8)
parts = layout.place([{"divided": part, "shared": part} for part in (whole[:1], whole[1:])])
assert not parts[0]["divided"].is_fully_addressable
stacks = {name: mesh.joined([part[name] for part in parts]) for name in parts[0]}
checkpoints = Checkpoints(folder)
checkpoints.save(1, model_weights=stacks, opt_state={"n": np.ones(1)}, loader_state={}, manifest={})
checkpoints.wait()
"""


def test_stacks_divided_among_two_processes_are_saved_as_one(tmp_path):
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path / "run"), address, str(number)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in (0, 1)
    ]
    assert wait(processes) == [0, 0]
    stored = read_flat(Checkpoints(tmp_path / "run").find(1), "model_weights")
    for name in ("divided", "shared"):
        np.testing.assert_array_equal(stored[name], np.arange(24).reshape(3, 8))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_says_why(tmp_path, victim):
    processes = start(tmp_path, 2, "training.total_steps=1000000", "training.save_every_steps=0")
    metrics = tmp_path / "experiments/default/pretrain-tiny-swa/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert [process.poll() for process in processes] == [None, None], logs(tmp_path, 2)
        time.sleep(0.2)
    processes[victim].send_signal(signal.SIGKILL)
    codes = wait(processes)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, None)
    said = logs(tmp_path, 2)[1 - victim]
    assert "another process of the run ended" in said or "another task died" in said


def test_processes_end_together_where_the_first_is_refused(tmp_path):
    folder = tmp_path / "run"
    config = resolve(compose(overrides(folder, "training.total_steps=1")))
    train.run(config)
    run_json = record_of(config).folder / "run.json"
    before = json.loads(run_json.read_text())
    codes = wait(start(folder, 2, "training.total_steps=2", "training.seq_length=32"))
    assert codes == [2, 2], logs(folder, 2)
    assert "trained with other settings" in logs(folder, 2)[0]
    assert json.loads(run_json.read_text()) == before
