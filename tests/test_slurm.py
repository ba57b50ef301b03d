"""`+deploy=submitit` through a real Slurm of two nodes, started and stopped by the tests.

Needs root and the programs of Slurm (tools/throwaway_slurm.py --install); .ci/run installs them.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from ttt.config import compose, resolve
from ttt.infra import distributed
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.record import RunRecord

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 280
CACHE = [f"backend.compilation_cache_dir={jax.config.jax_compilation_cache_dir}"]
TINY = [
    *("+experiment=tiny/pretrain/pretrain-tiny-e2e", "backend.platform=cpu", *CACHE),
    *("size.intermediate_size=32", "size.window=24", "size.chunk=16"),
    *("model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=2"),
    *("model.suffix_len=1", "model.num_attention_heads=2", "training.dummy_dataset=true"),
    *("training.seq_length=64", "training.global_batch_size=4", "training.eval_batch_size=2"),
    *("training.eval_batches=2", "training.optimizer_outer.lr_decay_steps=100"),
    "training.optimizer_outer.lr_warmup_steps=1",
]
PLAIN = ["method=swa", "model.suffix_len=0"]  # compiles in half the time


def load_tool():
    path = ROOT / "tools" / "throwaway_slurm.py"
    spec = importlib.util.spec_from_file_location("throwaway_slurm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()
needs_slurm = pytest.mark.skipif(bool(TOOL.why_not()), reason=TOOL.why_not())


@pytest.fixture(scope="module")
def slurm():
    """Environment of commands that are to meet the Slurm."""
    with TOOL.cluster() as environment:
        yield environment


def train(folder, *overrides, environment):
    """The command, waited for; JAX's platform is a job's own affair."""
    command = [
        *(sys.executable, "-m", "ttt.train", "+deploy=submitit", *TINY, *overrides),
        f"deploy_paths.checkpoint={folder}/checkpoints",
        f"deploy_paths.experiments={folder}/experiments",
    ]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def record_of(folder, name) -> RunRecord:
    return RunRecord(folder / "experiments" / "default" / name)


def logs(folder) -> str:
    return "\n".join(
        f"== {path.name}\n{path.read_text()[-4000:]}"
        for path in sorted(folder.glob("experiments/multirun/**/*_log.out"))
    )


def training_steps(record) -> list[int]:
    return [row["step"] for row in record.metrics() if "loss" in row]


@needs_slurm
def test_two_nodes_train_and_a_time_limit_only_interrupts_them(tmp_path, slurm):
    short, long = (record_of(tmp_path, name) for name in ("short", "long"))
    two = ("hydra.launcher.nodes=2", "hydra.launcher.timeout_min=4")
    ran = train(
        tmp_path, *two, "training.exp_name=short", "training.total_steps=20", environment=slurm
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs(tmp_path)
    assert short.run()["status"] == "finished"
    assert training_steps(short) == list(range(1, 21))
    assert len(short.run()["attempts"][0]["hardware"]["devices"]) == 2

    # Longer than Slurm lets a job of one minute be: it looks every 30 s, and sends the signal when
    # the next look would be too late, 25 to 55 s after the start.
    steps = int(60 / min(row["step_seconds"] for row in short.metrics() if "loss" in row))
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=5")
    run = ("training.exp_name=long", f"training.total_steps={steps}")
    ran = train(tmp_path, "hydra.launcher.nodes=2", *limit, *run, environment=slurm)
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs(tmp_path)
    assert "asked to stop by SIGUSR2" in logs(tmp_path)
    status = [attempt["status"] for attempt in long.run()["attempts"]]
    assert status == ["interrupted"] * (len(status) - 1) + ["finished"]
    assert len(status) > 1
    assert training_steps(long) == list(range(1, steps + 1))
    folder = tmp_path / "checkpoints" / "default" / "long"
    assert Checkpoints(folder).find_good() == steps
    begin = [row["loss"] for row in short.metrics() if "loss" in row]
    assert [row["loss"] for row in long.metrics() if "loss" in row][:20] == begin


@needs_slurm
def test_a_sweep_is_a_job_array_and_every_job_has_its_folder(tmp_path, slurm):
    seeds = ("training.model_seed=0,1,2", "training.total_steps=3", *PLAIN)
    ran = train(tmp_path, *seeds, environment=slurm)
    assert ran.returncode == 2
    assert "'training.exp_name=pretrain-tiny-e2e-${training.model_seed}'" in ran.stderr
    assert not record_of(tmp_path, "pretrain-tiny-e2e").folder.exists()

    name = "training.exp_name=seed-${training.model_seed}"
    ran = train(tmp_path, *seeds, name, environment=slurm)
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs(tmp_path)
    records = [record_of(tmp_path, f"seed-{seed}") for seed in range(3)]
    assert [training_steps(record) for record in records] == [[1, 2, 3]] * 3
    assert len({record.metrics()[0]["loss"] for record in records}) == 3


@needs_slurm
def test_a_failing_job_is_reported_here_and_failed_to_slurm(tmp_path, slurm):
    parent = ("training.load_part=params", "training.resume_exp_name=nobody")
    ran = train(tmp_path, *parent, *PLAIN, "training.total_steps=3", environment=slurm)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 of 1 jobs failed" in ran.stderr
    assert "nobody" in ran.stderr
    assert "Traceback" not in ran.stderr
    number = ran.stdout.split("] job ", 1)[1].split(",")[0]
    ask = ["squeue", "--jobs", number, "--states=all", "--noheader", "--format=%T"]
    for _ in range(60):  # it may still be leaving
        told = subprocess.run(ask, env=slurm, capture_output=True, text=True).stdout.strip()
        if told == "FAILED":
            break
        time.sleep(0.5)
    assert told == "FAILED"


@needs_slurm
def test_what_slurm_refuses_is_the_users_to_change(tmp_path, slurm):
    ran = train(
        tmp_path, "hydra.launcher.partition=nowhere", "training.total_steps=3", environment=slurm
    )
    assert ran.returncode == 2
    assert "invalid partition" in ran.stderr
    assert "hydra.launcher.KEY=VALUE" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_slurm_the_command_says_what_to_do(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    ran = train(tmp_path, "training.total_steps=3", environment=environment)
    assert ran.returncode == 2
    assert "no sbatch, srun, squeue, scontrol" in ran.stderr
    assert "leave +deploy=submitit away" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_faulty_configuration_is_told_before_it_is_queued(tmp_path):
    faults = ("training.total_steps=3", "training.seq_length=-1", "training.accum_steps=0")
    ran = train(tmp_path, *faults, environment={**os.environ, "PATH": str(tmp_path)})
    assert ran.returncode == 2
    assert "training.seq_length" in ran.stderr
    assert "training.accum_steps" in ran.stderr


@pytest.mark.parametrize(
    ("tasks", "nodes", "devices"),
    [("2", "2", []), ("8", "2", None), ("1", "1", [])],  # JAX: none hidden; one to each process
)
def test_one_process_on_a_node_has_all_of_its_devices(monkeypatch, tasks, nodes, devices):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: given.append(a[3]))
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
    config = resolve(compose([TINY[0], "backend.distributed=true", *CACHE]))
    distributed.start(config.backend)
    assert given == [devices]
