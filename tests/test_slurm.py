"""`+deploy=submitit` through a real Slurm of two nodes, started and stopped by the tests.

Needs root and the programs of Slurm (tools/throwaway_slurm.py --install); .ci/run installs them.
"""

import importlib.util
import logging
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from ttt import train as command
from ttt.config import compose, resolve
from ttt.infra import distributed
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.record import RunRecord

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 1200
CACHE = [f"backend.compilation_cache_dir={jax.config.jax_compilation_cache_dir}"]
TINY = [
    "+experiment=tiny/pretrain/pretrain-tiny-e2e",
    "data=bytes",
    "training.sample_tokens=0",
    "backend.platform=cpu",
    *CACHE,
    "size.intermediate_size=32",
    "size.window=24",
    "size.chunk=16",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.suffix_len=1",
    "model.num_attention_heads=2",
    "training.dummy_dataset=true",
    "training.seq_length=64",
    "training.global_batch_size=4",
    "training.eval_batch_size=2",
    "training.eval_batches=2",
    "training.optimizer_outer.lr_decay_steps=100",
    "training.optimizer_outer.lr_warmup_steps=1",
    "training.ilr_warmup_steps=1",
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


def arguments(folder, *overrides) -> list[str]:
    return [
        "+deploy=submitit",
        *TINY,
        *overrides,
        f"deploy_paths.checkpoint={folder}/checkpoints",
        f"deploy_paths.experiments={folder}/experiments",
    ]


def start(folder, *overrides, environment):
    """The command in a process of its own, with its output in one stream."""
    train = [sys.executable, "-m", "ttt.train", *arguments(folder, *overrides)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        train, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def train(folder, *overrides, environment):
    """The exit code and the output of the command."""
    with start(folder, *overrides, environment=environment) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    return process.returncode, said


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The output of a command that ends with exit code 2 before it queues anything.

    In this process: starting another takes longer than the command.
    """
    handlers = logging.root.handlers[:]  # Hydra sets up its own

    def run(*overrides, environment):
        for name, value in {**environment, "HYDRA_FULL_ERROR": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train", *arguments(tmp_path, *overrides)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = "".join(capsys.readouterr())
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        return said

    yield run
    logging.root.handlers[:] = handlers


def wait(process, come):
    """Until `come()`; fails if the command ends before, or hangs."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not come():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def set_limit(environment, minutes):
    """Leave the running job that many minutes, rounded down, from now on."""
    query = ["squeue", "--noheader", "--states=RUNNING,COMPLETING,PENDING", "--format=%A %M"]
    line = subprocess.run(query, env=environment, capture_output=True, text=True, check=True).stdout
    number, ran_for = line.split()
    passed = ran_for.split(":")
    limit = f"TimeLimit={int(passed[-2]) + minutes}"
    subprocess.run(["scontrol", "update", f"JobId={number}", limit], env=environment, check=True)


def record_of(folder, name) -> RunRecord:
    return RunRecord(folder / "experiments" / "default" / name)


def logs(folder) -> str:
    return "\n".join(
        f"== {path.name}\n{path.read_text()[-4000:]}"
        for path in sorted(folder.glob("experiments/multirun/**/*_log.out"))
    )


def training_steps(record) -> list[int]:
    return [row["step"] for row in record.metrics() if "loss" in row]


@pytest.mark.slow
@needs_slurm
def test_two_nodes_train_and_a_time_limit_only_interrupts_them(tmp_path, slurm):
    short, long = (record_of(tmp_path, name) for name in ("short", "long"))
    two = ("hydra.launcher.nodes=2", "hydra.launcher.timeout_min=10")
    brief = ("training.exp_name=short", "training.total_steps=20")
    code, said = train(tmp_path, *two, *brief, environment=slurm)
    assert code == 0, said + logs(tmp_path)
    assert short.run()["status"] == "finished"
    assert training_steps(short) == list(range(1, 21))
    assert len(short.run()["attempts"][0]["hardware"]["devices"]) == 2

    # Steps that wait, so that the run meets its limit without work for the machine: Slurm looks
    # every 30 s for jobs whose signal is due.
    steps, slow = 120, slurm | {"PYTHONPATH": str(Path(__file__).parent / "slow_steps")}
    run = (*two, "training.exp_name=long", f"training.total_steps={steps}")
    with start(tmp_path, *run, environment=slow) as process:
        try:
            wait(process, lambda: len(long.metrics()) >= 3)
            # Starting takes how long it takes; from here on a minute or two are left, and the
            # signal, 120 s before the end, is due at once.
            set_limit(slurm, minutes=2)
            wait(process, lambda: long.run()["status"] == "interrupted")
            set_limit(slurm, minutes=10)
            said, _ = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0, said + logs(tmp_path)
    assert "asked to stop by SIGUSR2" in logs(tmp_path)
    status = [attempt["status"] for attempt in long.run()["attempts"]]
    assert status == ["interrupted", "finished"]
    assert training_steps(long) == list(range(1, steps + 1))
    folder = tmp_path / "checkpoints" / "default" / "long"
    assert Checkpoints(folder).find_good() == steps
    begin = [row["loss"] for row in short.metrics() if "loss" in row]
    assert [row["loss"] for row in long.metrics() if "loss" in row][:20] == begin


@pytest.mark.slow
@needs_slurm
def test_a_sweep_is_a_job_array_and_every_job_has_its_folder(tmp_path, slurm, refused):
    seeds = ("training.model_seed=0,1", "training.total_steps=3", *PLAIN)
    said = refused(*seeds, environment=slurm)
    assert "'training.exp_name=pretrain-tiny-e2e-${training.model_seed}'" in said
    assert not record_of(tmp_path, "pretrain-tiny-e2e").folder.exists()

    name = "training.exp_name=seed-${training.model_seed}"
    code, said = train(tmp_path, *seeds, name, environment=slurm)
    assert code == 0, said + logs(tmp_path)
    records = [record_of(tmp_path, f"seed-{seed}") for seed in range(2)]
    assert [training_steps(record) for record in records] == [[1, 2, 3]] * 2
    first = [next(row for row in record.metrics() if "loss" in row) for record in records]
    assert len({row["loss"] for row in first}) == 2


@pytest.mark.slow
@needs_slurm
def test_a_failing_job_is_reported_here_and_failed_to_slurm(tmp_path, slurm):
    parent = ("training.load_part=params", "training.resume_exp_name=nobody")
    code, said = train(tmp_path, *parent, *PLAIN, "training.total_steps=3", environment=slurm)
    assert code == 1, said
    assert "1 of 1 jobs failed" in said
    assert "nobody" in said
    assert "Traceback" not in said
    number = said.split("] job ", 1)[1].split(",")[0]
    query = ["squeue", "--jobs", number, "--states=all", "--noheader", "--format=%T"]
    state = ""
    while state in ("", "RUNNING", "COMPLETING"):  # the job may still be ending
        state = subprocess.run(query, env=slurm, capture_output=True, text=True, check=True)
        state = state.stdout.strip()
    assert state == "FAILED"


@pytest.mark.slow
@needs_slurm
def test_what_slurm_refuses_is_the_users_to_change(slurm, refused):
    partition = "hydra.launcher.partition=nowhere"
    said = refused(partition, "training.total_steps=3", environment=slurm)
    assert "invalid partition" in said
    assert "hydra.launcher.KEY=VALUE" in said


def test_without_slurm_the_command_says_what_to_do(tmp_path, refused):
    said = refused("training.total_steps=3", environment={"PATH": str(tmp_path)})
    assert "no sbatch, srun, squeue, scontrol" in said
    assert "leave +deploy=submitit away" in said


def test_a_faulty_configuration_is_told_before_it_is_queued(tmp_path, refused):
    faults = ("training.total_steps=3", "training.seq_length=-1", "training.accum_steps=0")
    said = refused(*faults, environment={"PATH": str(tmp_path)})
    assert "training.seq_length" in said
    assert "training.accum_steps" in said


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
