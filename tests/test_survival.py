"""What a run does when it is asked to stop, killed, starved of disk, or fed bad numbers."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import (  # noqa: F401 - fixtures
    SMALL,
    configure,
    losses_of,
    record_of,
    store,
    weights_of,
)

from ttt import train
from ttt.config import compose, differences, resolve, to_dict
from ttt.dataloader import lm_dataset, token_store
from ttt.entry import Job, exit_codes
from ttt.errors import RunError, Stopped, UserError
from ttt.infra import checkpoint, step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.lock import LOCK_FILE, RunLock
from ttt.infra.preemption import StopRequest
from ttt.infra.progress import Spent
from ttt.infra.record import RunRecord
from ttt.knobs import Config
from ttt.model.loop import Evaluator
from ttt.training import step as training_step
from ttt.training import steps

ROOT = Path(__file__).parents[1]
CACHE = [f"backend.compilation_cache_dir={jax.config.jax_compilation_cache_dir}"]
MEASURED = ("seconds", "per_second", "mfu")


def checkpoints_of(config) -> Checkpoints:
    training = config.training
    root = config.deploy_paths.checkpoint
    return Checkpoints(step_folders.run_folder(root, training.exp_folder, training.exp_name))


def numbers_of(config) -> list[dict]:
    """Every logged line without times."""
    return [
        {name: row[name] for name in row if not name.endswith(MEASURED)}
        for row in record_of(config).metrics()
    ]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def when_logged(monkeypatch, step, act):
    """Call `act` right after a step's line is in the record, once."""
    log, done = RunRecord.log, []

    def log_and_act(record, at, **metrics):
        log(record, at, **metrics)
        if at == step and not done:
            done.append(at)
            act()

    monkeypatch.setattr(RunRecord, "log", log_and_act)


def wait_for_checkpoint(config, step):
    """Until the save that is under way is done, so that the next fault hits the one after it."""
    while checkpoints_of(config).latest() != step:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, store, compiled_once):  # noqa: F811
    """A run of six steps left in peace: its configuration; tests only read it."""
    folder = tmp_path_factory.mktemp("straight")
    paths = [
        f"deploy_paths.checkpoint={folder}/checkpoints",
        f"deploy_paths.experiments={folder}/experiments",
        f"+deploy_paths.data.text={store}",
        "training.dataset_name=text",
    ]
    overrides = ["+experiment=tiny/pretrain/pretrain-tiny-e2e", *SMALL, *paths, *OFTEN]
    config = resolve(compose(overrides))
    train.run(config)
    return config


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of this file that compute the same numbers share their compiled programs."""
    steps, evaluators = [], []

    def shared(make, made):
        def get(settings, *arguments):
            config = settings if isinstance(settings, Config) else None
            told = to_dict(config) if config else {"training": asdict(settings)}
            for known, thing in made:
                if not differences(known, told):
                    return thing
            made.append((told, make(settings, *arguments)))
            return made[-1][1]

        return get

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "compile_step", shared(training_step.compile_step, steps))
        patch.setattr(train, "Evaluator", shared(train.Evaluator, evaluators))
        yield


OFTEN = ["training.save_every_steps=2", "training.eval_every_steps=2"]


def assert_equal_runs(config, straight):
    """Parameters, optimizer state, loader position and every logged number."""
    assert numbers_of(config) == numbers_of(straight)
    ours, theirs = checkpoints_of(config), checkpoints_of(straight)
    for item in ("model_weights", "opt_state"):
        got, wanted = (checkpoint.read_flat(c.find(), item) for c in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert ours.loader_state(-1) == theirs.loader_state(-1)
    assert record_of(config).run()["status"] == "finished"


# ---- killed ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_in_a_step_in_a_save_and_in_an_evaluation_ends_with_the_same_numbers():
    tool = ROOT / "tools" / "kill_anywhere.py"
    kills = ["--kills", "3", "--moments", "step,save,evaluation", "--steps", "40", "--seed", "1"]
    plain = ["method=swa", "model.suffix_len=0"]  # compiles in half the time
    command = [sys.executable, str(tool), *kills, *plain, *CACHE]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told == {
        "kills": 3,
        "by_moment": {"step": 1, "save": 1, "evaluation": 1},
        "different": [],
    }


# ---- asked to stop -----------------------------------------------------------------------


def test_asked_to_stop_a_run_saves_that_step_and_the_same_command_goes_on(
    configure,  # noqa: F811
    straight,
    monkeypatch,
):
    config = configure(*OFTEN)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        when_logged(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match=r"after step 3 of 6, as SIGTERM asked.*same command"):
            train.run(config)
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints_of(config).latest() == 3
    assert record_of(config).run()["status"] == "interrupted"
    train.run(config)
    assert_equal_runs(config, straight)


def test_asked_to_stop_in_an_evaluation_a_run_saves_and_evaluates_when_it_goes_on(
    configure,  # noqa: F811
    straight,
    monkeypatch,
):
    config = configure(*OFTEN, "training.save_every_steps=0")
    with monkeypatch.context() as patch:
        score = Evaluator.__call__

        def ask(*arguments, **options):
            if record_of(config).logged(2, "loss"):  # there is an evaluation before the first step
                os.kill(os.getpid(), signal.SIGUSR1)
            return score(*arguments, **options)

        patch.setattr(Evaluator, "__call__", ask)
        with pytest.raises(Stopped, match="after step 2 of 6, as SIGUSR1 asked"):
            train.run(config)
    assert numbers_of(config) == numbers_of(straight)[:3]
    train.run(config)
    assert_equal_runs(config, straight)


LISTENING = """
import sys, time
from ttt.infra.preemption import StopRequest
with StopRequest() as stop:
    print("listening", flush=True)
    time.sleep(600) if sys.argv[1] == "busy" else None
    while stop.signal_number is None:
        time.sleep(0.01)
print(stop.name, flush=True)
"""


def started(code: str, *arguments) -> subprocess.Popen:
    """Python code in a process of its own; a context manager, which waits for its end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def listening(mode: str) -> subprocess.Popen:
    process = started(LISTENING, mode)
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "Ctrl-C")],
)
def test_one_signal_is_a_request_and_no_end(number, name):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
        assert stop.name == name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_leaves_at_once():
    with listening("idle") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "Ctrl-C\n"
    with listening("busy") as process:
        while process.poll() is None:  # it sleeps for minutes, and is gone once it heard two
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
    assert process.returncode == 130


def test_stopping_and_failing_have_exit_codes_of_their_own(capsys):
    for error, code in ((Stopped("later", signal.SIGTERM), 75), (RunError("full"), 1)):
        with pytest.raises(SystemExit) as leaving, exit_codes():
            raise error
        assert leaving.value.code == code
    assert capsys.readouterr().err == "later\nerror: full\n"


def test_a_job_submitted_as_it_is_queues_itself_once_more():
    job = Job(lambda config: None)
    again = job.checkpoint({"some": "config"})
    assert again.function is job
    assert again.args == ({"some": "config"},)


@pytest.mark.slow
def test_a_submitted_job_asked_to_stop_is_queued_again_and_goes_on_by_itself(tmp_path, store):  # noqa: F811
    folder = tmp_path / "experiments"
    command = [
        sys.executable,
        "-m",
        "ttt.train",
        "--multirun",
        "hydra/launcher=submitit_local_ttt",
        "+experiment=tiny/pretrain/pretrain-tiny-e2e",
        *SMALL,
        "training.total_steps=300",
        f"deploy_paths.checkpoint={tmp_path}/checkpoints",
        f"deploy_paths.experiments={folder}",
        f"+deploy_paths.data.text={store}",
        "training.dataset_name=text",
        "method=swa",
        "model.suffix_len=0",
        *CACHE,
    ]
    record = RunRecord(folder / "default" / "pretrain-tiny-e2e")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not record.metrics() and process.poll() is None:
            time.sleep(0.01)
        holder = json.loads((record.folder / LOCK_FILE).read_text())["pid"]
        os.kill(holder, signal.SIGUSR2)  # as submitit asks
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert [attempt["status"] for attempt in record.run()["attempts"]] == [
        "interrupted",
        "finished",
    ]
    steps = [row["step"] for row in record.metrics() if "loss" in row]
    assert steps == list(range(1, 301))


def test_time_limits_never_end_a_submitted_run():
    cfg = compose(["+deploy=submitit", "+experiment=tiny/pretrain/pretrain-tiny-e2e"])
    assert cfg.training.exp_name == "pretrain-tiny-e2e"
    from hydra_plugins.submitit_ttt import SlurmTTT

    assert SlurmTTT().max_num_timeout >= 1000


# ---- saving ------------------------------------------------------------------------------


def test_time_decides_on_checkpoints_where_steps_do_not(configure):  # noqa: F811
    config = configure(
        "training.save_every_steps=0",
        "training.save_every_minutes=1e-9",
        "training.save_milestone_freq=2",
        "training.total_steps=5",
    )
    train.run(config)
    assert checkpoints_of(config).steps() == [2, 4, 5]


def test_the_record_says_where_the_time_went(straight):
    rows = [row for row in record_of(straight).metrics() if "loss" in row]
    assert all(row["step_seconds"] > 0 and row["data_wait_seconds"] >= 0 for row in rows)
    # A save after a step delays the line of the next.
    assert [row["step"] for row in rows if row.get("save_seconds", 0) > 0] == [3, 5]
    evaluated = [row for row in record_of(straight).metrics() if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert all(row["evaluation_seconds"] > 0 for row in evaluated)
    seconds = record_of(straight).run()["attempts"][0]["seconds"]
    assert seconds.keys() == {"data_wait", "compile", "step", "save", "evaluation"}
    assert seconds["step"] == pytest.approx(sum(row["step_seconds"] for row in rows), abs=0.01)


def test_time_is_counted_by_name_in_all_and_since_it_was_taken():
    now = [0.0]
    spent = Spent(clock=lambda: now[0])
    for what, seconds in (("step", 2.0), ("save", 5.0), ("step", 1.0)):
        with spent(what):
            now[0] += seconds
    assert spent.take() == {"step": 3.0, "save": 5.0}
    with spent("step"):
        now[0] += 1.0
    taken = spent.take()
    assert (taken["step"], taken["save"]) == (1.0, 0.0)
    assert spent.total == {"step": 4.0, "save": 5.0}
    assert str(spent) == "save 5.0, step 4.0"


# ---- broken checkpoints ------------------------------------------------------------------


def damage(checkpoints: Checkpoints, step: int) -> None:
    """Truncate a checkpoint's largest file."""
    files = [path for path in (checkpoints.folder / str(step)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_a_run_goes_on_from_its_newest_good_checkpoint_and_says_so(
    configure,  # noqa: F811
    straight,
    caplog,
):
    config = configure(*OFTEN)
    train.run(config)
    checkpoints = checkpoints_of(config)
    damage(checkpoints, 6)
    caplog.set_level(logging.WARNING, "ttt")
    train.run(config)
    assert "CHECKPOINT 6 IS BROKEN" in caplog.text
    assert "FALLING BACK TO THE CHECKPOINT OF STEP 4" in caplog.text
    assert_equal_runs(config, straight)
    assert checkpoints.steps() == [4, 6]
    assert (checkpoints.folder / "6.broken").is_dir()

    damage(checkpoints, 4)
    damage(checkpoints, 6)
    before = contents(Path(config.deploy_paths.checkpoint).parent)
    with pytest.raises(UserError) as refusal:
        train.run(config)
    for part in ("no checkpoint in", "/4/", "/6/", "Nothing was changed"):
        assert part in str(refusal.value)
    assert contents(Path(config.deploy_paths.checkpoint).parent) == before


# ---- the disk ----------------------------------------------------------------------------


@pytest.fixture
def file_size_limit():
    """Lets the system refuse to write beyond so many bytes of a file.

    The compile cache would be such a file too, when a busy machine is slow to compile.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)
    jax.config.update("jax_enable_compilation_cache", True)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_ends_the_run_and_leaves_the_last_checkpoint_whole(
    configure,  # noqa: F811
    straight,
    monkeypatch,
    file_size_limit,
):
    config = configure(*OFTEN)
    with monkeypatch.context() as patch:
        when_logged(patch, 3, lambda: wait_for_checkpoint(config, 2) or file_size_limit(1000))
        with pytest.raises(RunError, match=r"File too large.*\n.*step 2, is whole.*\n?.*goes on"):
            train.run(config)
    file_size_limit(None)
    assert checkpoints_of(config).find_good() == 2
    train.run(config)
    assert_equal_runs(config, straight)


@pytest.mark.parametrize("path", ["checkpoint", "experiments"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_compiled(
    configure,  # noqa: F811
    tmp_path,
    monkeypatch,
    path,
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(training_step, "compile_step", lambda *arguments: pytest.fail("compiled"))
    with pytest.raises(UserError, match=rf"cannot write to .*file.*deploy_paths\.{path}"):
        train.run(configure(f"deploy_paths.{path}={tmp_path}/file"))


def test_a_read_only_folder_is_a_users_error(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write to a read-only folder, unless capsh takes cap_dac_override")
    with RunLock(tmp_path / "run") as lock, pytest.raises(UserError, match="cannot write to"):
        lock.make()


@pytest.mark.parametrize("path", ["checkpoint", "experiments"])
def test_a_vanished_mount_ends_the_run_and_nothing_is_written_in_its_place(
    configure,  # noqa: F811
    straight,
    monkeypatch,
    path,
):
    config = configure(*OFTEN, "training.eval_every_steps=0")
    mount = Path(getattr(config.deploy_paths, path))
    away = mount.with_name("away")

    def unmount():
        wait_for_checkpoint(config, 2)
        mount.rename(away)
        mount.mkdir()

    with monkeypatch.context() as patch:
        when_logged(patch, 4, unmount)
        with pytest.raises(RunError, match=r"vanished or was replaced|No such file"):
            train.run(config)
    assert not list(mount.iterdir())
    mount.rmdir()
    away.rename(mount)
    train.run(config)
    assert losses_of(config) == losses_of(straight)
    jax.tree.map(np.testing.assert_array_equal, weights_of(config), weights_of(straight))


# ---- numbers and data that are bad -------------------------------------------------------


def poison(monkeypatch, *bad_steps):
    """Make the loss of some steps NaN: their targets are no tokens."""
    compile_step = training_step.compile_step

    def compile_and_poison(config, state, batch, layout):
        compiled = compile_step(config, state, batch, layout)

        def step(state, batch):
            if int(state.step) + 1 in bad_steps:
                batch = batch._replace(targets=batch.targets + 1_000_000)
            return compiled(state, batch)

        return step

    monkeypatch.setattr(training_step, "compile_step", compile_and_poison)


def test_bad_numbers_end_the_run_name_the_samples_and_keep_the_last_checkpoint(
    configure,  # noqa: F811
    straight,
    monkeypatch,
):
    config = configure(*OFTEN)
    with monkeypatch.context() as patch:
        poison(patch, 3)
        with pytest.raises(RunError, match=r"step 3: loss nan.*\n.*of step 2, is whole"):
            train.run(config)
    row = record_of(config).metrics()[-1]
    assert np.isnan(row["loss"])
    source = lm_dataset.open_source(
        config.deploy_paths.data["text"], "train", seq_length=64, vocab_size=258, bos_token_id=256
    )
    order = {"global_batch_size": 4, "seed": 0}
    assert row["bad_samples"] == lm_dataset.samples_of_batch(source, 2, **order)
    batches = lm_dataset.train_batches(source, **order, bos_token_id=256)
    third = [next(batches) for _ in range(3)][2]
    for inputs, index in zip(third.inputs, row["bad_samples"], strict=True):
        np.testing.assert_array_equal(inputs, source[index][:-1])
    train.run(config)  # without the fault, the same command goes on
    assert_equal_runs(config, straight)


def test_bad_steps_are_left_out_up_to_so_many_in_a_row(configure, monkeypatch):  # noqa: F811
    config = configure(*OFTEN, "training.skip_bad_steps=2", "training.total_steps=8")
    states = []
    with monkeypatch.context() as patch:
        poison(patch, 2, 3, 5, 6, 7)
        save = steps.save

        def note(run, state, batches):
            states.append((int(state.step), np.asarray(jax.tree.leaves(state.model)[0])))
            save(run, state, batches)

        patch.setattr(steps, "save", note)
        with pytest.raises(RunError, match=r"step 7: loss nan"):
            train.run(config)
    rows = [row for row in record_of(config).metrics() if "loss" in row]
    assert [row["step"] for row in rows if "bad_samples" in row] == [2, 3, 5, 6, 7]
    # The learning rate goes on where the optimizer stands, and no step it did not take moved it.
    rates = [row["learning_rate"] for row in rows]
    assert rates[1] == rates[2] == rates[3]
    assert rates[3] != rates[4] == rates[5]
    assert [step for step, _ in states] == [2, 4, 6]
    assert all(np.isfinite(weights).all() for _, weights in states)
    assert not np.array_equal(states[0][1], states[1][1])
    # Killed in the middle of a bad stretch, a run still counts all of it.
    with monkeypatch.context() as patch:
        poison(patch, 7)
        with pytest.raises(RunError, match=r"step 7: loss nan"):
            train.run(config)


def test_bad_data_in_the_middle_of_a_store_is_named_by_split_and_sample(
    configure,  # noqa: F811
    tmp_path,
):
    tokens = np.arange(20_000, dtype=np.int32) % 256
    source = lm_dataset.TokenSource(tokens, 64, 258, "")
    bad = lm_dataset.samples_of_batch(source, 3, global_batch_size=4, seed=0)[1]
    tokens[bad * 64 + 5] = 999
    token_store.write(tmp_path / "bad", {"train": tokens, "val": tokens[:1000]}, attributes={})
    config = configure(*OFTEN, f"deploy_paths.data.text={tmp_path}/bad")
    with pytest.raises(UserError, match=rf"bad/train, sample {bad}: token id 999 at position 5"):
        train.run(config)
    assert [row["step"] for row in record_of(config).metrics() if "loss" in row] == [1, 2, 3]
    assert record_of(config).run()["status"] == "failed"
    assert checkpoints_of(config).find_good() == 2


# ---- two runs ----------------------------------------------------------------------------

HOLDING = """
import pathlib, sys, time
from ttt.infra.lock import RunLock
with RunLock(*map(pathlib.Path, sys.argv[1:])) as lock:
    lock.make()
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_on_one_folder_is_refused_until_the_first_is_dead(
    configure,  # noqa: F811
    straight,
):
    config = configure(*OFTEN)
    folder = checkpoints_of(config).folder
    with started(HOLDING, folder) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another run .* {folder} \(process {holder.pid} "):
            train.run(config)
        assert not record_of(config).folder.exists()
        holder.kill()
    train.run(config)
    assert_equal_runs(config, straight)


def test_a_lock_covers_every_folder_and_is_let_go(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    with RunLock(*folders) as lock:
        lock.make()
        for folder in folders:
            with pytest.raises(UserError, match="another run"), RunLock(folder):
                pass
        with RunLock(*folders, active=False) as other:  # another process of the same run
            other.make()
            other.check()
        lock.check()
    with RunLock(*folders) as lock:
        lock.make()
