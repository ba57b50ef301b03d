"""`train` from start to end: learning, the record, continuing, starting from others, refusals."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from ttt import train
from ttt.config import compose, resolve
from ttt.dataloader import token_store
from ttt.errors import UserError
from ttt.infra import checkpoint, step_folders
from ttt.infra.progress import Spent
from ttt.infra.record import RunRecord
from ttt.plan import hardware
from ttt.plan.flops import model_flops
from ttt.plan.memory_plan import choose

SMALL = [
    "data=bytes",
    "training.sample_tokens=0",
    "size.pretrain_lr=3e-3",
    "training.optimizer_outer.optimizer_type=adamw",
    "size.intermediate_size=32",
    "size.window=24",
    "size.chunk=16",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.suffix_len=1",
    "model.num_attention_heads=2",
    "training.seq_length=64",
    "training.global_batch_size=4",
    "training.eval_batch_size=2",
    "training.eval_batches=2",
    "training.count_model_tokens=0",
    "training.inner_remat_freq=0",  # as much as fits, which is all
    "training.total_steps=6",
    "training.save_every_steps=3",
    "training.optimizer_outer.lr_decay_steps=6",
    "training.optimizer_outer.lr_warmup_steps=1",
    "backend.compilation_cache_dir=''",  # the tests' own is set already
]


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """Text that repeats itself, as bytes."""
    text = b"the quick brown fox jumps over the lazy dog; " * 400
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    tokens[::450] = 256
    root = tmp_path_factory.mktemp("data") / "text"
    attributes = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
    token_store.write(root, {"train": tokens, "val": tokens[1000:3000]}, attributes=attributes)
    return root


@pytest.fixture
def configure(tmp_path, store):
    """A small configuration from overrides, everything below tmp_path."""

    def make(*overrides, experiment="pretrain/pretrain-tiny-e2e"):
        paths = [
            f"deploy_paths.checkpoint={tmp_path}/checkpoints",
            f"deploy_paths.experiments={tmp_path}/experiments",
            f"+deploy_paths.data.text={store}",
            "training.dataset_name=text",
        ]
        return resolve(compose([f"+experiment=tiny/{experiment}", *SMALL, *paths, *overrides]))

    return make


def record_of(config) -> RunRecord:
    training = config.training
    folder = Path(config.deploy_paths.experiments) / training.exp_folder / training.exp_name
    return RunRecord(folder)


def weights_of(config, step=-1) -> dict[str, np.ndarray]:
    training = config.training
    folder = step_folders.run_folder(
        config.deploy_paths.checkpoint, training.exp_folder, training.exp_name
    )
    return checkpoint.read_flat(checkpoint.Checkpoints(folder).find(step), "model_weights")


def losses_of(config) -> list[float]:
    return [row["loss"] for row in record_of(config).metrics() if "loss" in row]


def train_until_killed(config, monkeypatch, step):
    """Train until the record of a step would be written."""
    log = RunRecord.log

    def die(record, number, **metrics):
        if number == step:
            raise KeyboardInterrupt
        log(record, number, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "log", die)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)


def test_a_run_learns_and_leaves_a_whole_record(configure):
    config = configure(
        "training.total_steps=40",
        "training.optimizer_outer.lr_decay_steps=40",
        "training.optimizer_outer.lr=2e-2",
        "training.eval_every_steps=20",
    )
    train.run(config)
    record = record_of(config)
    rows = [row for row in record.metrics() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[0]["loss"] == pytest.approx(np.log(258), rel=0.05)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert [row["step"] for row in record.metrics() if "eval_loss" in row] == [20]
    flops = model_flops(config.model, config.training).total  # per token
    for row in rows:
        speed = flops * row["tokens_per_second"] / jax.device_count() / 1e12
        assert row["model_tflops_per_second"] == pytest.approx(speed)
        assert "mfu" not in row  # nobody knows the peak of this CPU
    assert record.run()["status"] == "finished"
    assert record.run()["attempts"][0]["data"]["train"].startswith("sha256:")
    summary = json.loads((record.folder / "eval/loss_by_position-40.json").read_text())
    with np.load(record.folder / "eval/loss_by_position-40.npz") as arrays:
        mean = arrays["learning_nll"].sum() / arrays["learning_count"].sum()
        assert summary["loss"] == pytest.approx(mean)
        assert summary["chunk_loss"] == pytest.approx(arrays["learning_sequence_loss"].mean())
        assert arrays["learning_nll"].shape == (64,)
        nll, count = (arrays[f"learning_document_{x}"].sum() for x in ("nll", "count"))
        assert nll / count == pytest.approx(mean)
        # Documents of 450 bytes, of which the split begins in the third.
        assert set(arrays["learning_documents"]) <= {0, 350, 800, 1250, 1700}
    assert summary["loss"] != summary["loss_without_learning"]
    with (record.folder / "eval/loss_by_position-40.csv").open() as file:
        whole = [row for row in csv.DictReader(file) if row["measure"] == "loss"]
    assert [(row["method"], row["learning"]) for row in whole] == [
        ("e2e", "True"),
        ("e2e", "False"),
    ]
    assert float(whole[0]["value"]) == pytest.approx(summary["loss"])
    assert (record.folder / "loss_by_position-40.png").stat().st_size > 10_000


def test_what_auto_became_is_logged_and_stands_in_the_record(configure, monkeypatch, caplog):
    auto = ["model.remat_prefix=auto", "model.remat_suffix=auto", "training.inner_remat_freq=0"]
    fa = "pretrain/pretrain-tiny-fa"
    config = configure(*auto, "training.total_steps=1", experiment=fa)
    machine = hardware.find_hardware(config)
    roomy, tight = (choose(config, replace(machine, budget=size)) for size in (machine.budget, 0))
    assert roomy.chosen != tight.chosen
    budget = int(tight.memory.total / 1.1)
    monkeypatch.setattr(hardware, "find_hardware", lambda config: replace(machine, budget=budget))
    with caplog.at_level("INFO"):
        train.run(config)
    recorded = OmegaConf.load(record_of(config).folder / "config.yaml")
    for key, value in tight.chosen.items():
        assert OmegaConf.select(recorded, key) == value
    assert f"chosen: model.remat_prefix={tight.config.model.remat_prefix}" in caplog.text
    assert tight.describe().split(",")[0] in caplog.text
    assert "it may not fit. By the same prediction these fit" in caplog.text
    assert "were predicted in all" in caplog.text


def test_a_killed_run_goes_on_bit_for_bit(configure, monkeypatch):
    straight = configure("training.exp_name=straight")
    train.run(straight)

    killed = configure("training.exp_name=killed")
    train_until_killed(killed, monkeypatch, step=5)
    assert record_of(killed).run()["status"] == "interrupted"
    train.run(killed)
    assert losses_of(killed) == losses_of(straight)
    assert [row["step"] for row in record_of(killed).metrics()] == [0, 1, 2, 3, 4, 5, 6, 6]
    jax.tree.map(np.testing.assert_array_equal, weights_of(killed), weights_of(straight))


def test_a_finished_run_says_so_and_changes_nothing(configure, caplog):
    config = configure("training.total_steps=1")
    train.run(config)
    folder = record_of(config).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        train.run(config)
    assert "is finished at step 1" in caplog.text
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_changed_setting_is_refused_with_both_values_and_the_ways_out(configure):
    train.run(configure("training.total_steps=1"))
    with pytest.raises(UserError) as refusal:
        train.run(configure("training.total_steps=2", "training.optimizer_outer.lr=5e-3"))
    for part in ("optimizer_outer.lr: 0.003 -> 0.005", "exp_name", "allow_config_change=true"):
        assert part in str(refusal.value)
    allowed = configure(
        "training.total_steps=2",
        "training.optimizer_outer.lr=5e-3",
        "training.allow_config_change=true",
    )
    train.run(allowed)
    assert len(losses_of(allowed)) == 2


def test_other_data_under_the_same_name_is_refused(configure, tmp_path, store):
    train.run(configure("training.total_steps=1"))
    other = tmp_path / "other"
    tokens = np.arange(20_000, dtype=np.int32) % 256
    token_store.write(other, {"train": tokens, "val": tokens[:2000]}, attributes={})
    with pytest.raises(UserError, match=r"data \(train\): sha256"):
        train.run(configure("training.total_steps=2", f"deploy_paths.data.text={other}"))


def test_a_finished_record_without_its_checkpoints_is_not_overwritten(configure):
    config = configure("training.total_steps=1")
    train.run(config)
    folder = Path(config.deploy_paths.checkpoint)
    folder.rename(folder.with_name("moved"))
    with pytest.raises(UserError, match="records a finished run"):
        train.run(config)


def test_test_time_training_starts_from_full_attention_by_name(configure):
    parent = configure(
        "model.suffix_len=0", "training.total_steps=1", experiment="pretrain/pretrain-tiny-fa"
    )
    train.run(parent)
    child = configure(
        "training.load_part=params",
        "training.resume_exp_name=pretrain-tiny-fa",
        "training.total_steps=1",
    )
    train.run(child)
    account = record_of(child).run()["attempts"][0]["restored"]
    stacks = "language_model.model.h."
    assert f"{stacks}blocks.feed_forward.w1.weight" in account["restored"]
    assert sorted(account["restored"]) == sorted(weights_of(parent))
    # The last layer's MLP serves as the prime one now, and a new one stands where it was.
    mlps = [*(f"feed_forward.w{i}" for i in (1, 2, 3)), "ffn_norm", "ffn_post_norm"]
    new = [f"{stacks}blocks.{part}.weight[-1:]" for part in mlps]
    assert account["initialised"] == new
    moved = f"{new[0]} -> {stacks}prime_storage.feed_forward_prime.w1.weight"
    assert account["moved"][0] == moved


def test_a_parent_of_another_width_is_an_error_with_path_and_shapes(configure):
    train.run(configure("training.total_steps=1"))
    child = configure(
        "training.exp_name=child",
        "training.load_part=params",
        "training.resume_exp_name=pretrain-tiny-e2e",
        "model.intermediate_size=48",
    )
    with pytest.raises(UserError) as refusal:
        train.run(child)
    assert "blocks.feed_forward.w1.weight: float32[2, 16, 48] expected" in str(refusal.value)
    assert "float32[2, 16, 32] in the checkpoint" in str(refusal.value)
    assert not record_of(child).folder.exists()


def test_loading_all_goes_on_where_the_other_run_stopped(configure):
    straight = configure("training.exp_name=straight")
    train.run(straight)
    branch = configure(
        "training.exp_name=branch",
        "training.load_part=all",
        "training.resume_exp_name=straight",
        "training.resume_step=3",
    )
    train.run(branch)
    assert losses_of(branch) == losses_of(straight)[3:]
    jax.tree.map(np.testing.assert_array_equal, weights_of(branch), weights_of(straight))


WSD = ["training.optimizer_outer.schedule=wsd"]
BRANCH = ["training.load_part=all", "training.resume_exp_name=stable", "training.exp_name=branch"]


def test_a_decay_branch_of_a_stable_run_is_the_straight_run_even_if_killed(configure, monkeypatch):
    configure = partial(configure, experiment="pretrain/pretrain-tiny-swa")
    muon = [*WSD, "training.optimizer_outer.optimizer_type=muon", "model.suffix_len=0"]
    stable = configure(
        *muon, "training.exp_name=stable", "training.optimizer_outer.lr_decay_start=6"
    )
    train.run(stable)
    decayed = [*muon, "training.optimizer_outer.lr_decay_start=3"]
    straight = configure(*decayed, "training.exp_name=straight")
    train.run(straight)
    assert losses_of(straight)[:4] == losses_of(stable)[:4]
    assert losses_of(straight)[5] != losses_of(stable)[5]

    branch = configure(*decayed, *BRANCH, "training.resume_step=3", "training.save_every_steps=1")
    train_until_killed(branch, monkeypatch, step=5)
    train.run(branch)
    assert record_of(branch).run()["attempts"][1]["restored"]["from"].endswith("branch/4")
    assert losses_of(branch) == losses_of(straight)[3:]
    jax.tree.map(np.testing.assert_array_equal, weights_of(branch), weights_of(straight))


@pytest.mark.parametrize(
    ("parent", "branch", "message"),
    [
        (["lr_decay_start=4"], [], r"resume_step=-1: .*stable/6 .* stable part, steps 1 to 4; set"),
        (["schedule=cosine"], [], r"trained with schedule=cosine, which has no stable part"),
        ([], ["training.optimizer_outer.lr_decay_start=5"], r"lr_decay_start=5 .* at least 6"),
        ([], ["training.optimizer_outer.lr=1e-2"], r"optimizer_outer.lr: 0.003 -> 0.01"),
        ([], ["training.ilr_warmup_steps=7"], r"training.ilr_warmup_steps: 0 -> 7"),
        (
            [],
            ["training.seq_length=32", "training.global_batch_size=2", "training.data_seed=1"],
            r"data_seed: 0 -> 1\n.*global_batch_size: 4 -> 2\n.*seq_length: 64 -> 32\n"
            r".*load_part=params.*allow_config_change=true",
        ),
        ([], ["training.dummy_dataset=true"], r"data \(train\): sha256:\w+ -> random tokens"),
        ([], ["training.optimizer_outer.optimizer_type=muon"], r"state of adamw.* set it to adamw"),
    ],
)
def test_a_branch_that_would_not_go_on_as_its_parent_is_refused(configure, parent, branch, message):
    simulated = [*WSD, "training.runtime_mode=simulate"]
    whole = "training.optimizer_outer.lr_decay_start=6"
    settings = [f"training.optimizer_outer.{setting}" for setting in parent]
    train.run(configure(*simulated, whole, *settings, "training.exp_name=stable"))
    longer = ["training.total_steps=8", "training.optimizer_outer.lr_decay_steps=8"]
    with pytest.raises(UserError, match=f"(?s){message}"):
        train.run(configure(*simulated, whole, *longer, *BRANCH, *branch))
    assert not record_of(configure(*BRANCH)).folder.exists()


def test_a_branch_may_be_of_another_length_whose_warm_ups_are_over_too(configure):
    simulated = [*WSD, "training.runtime_mode=simulate"]
    stable = ["training.optimizer_outer.lr_decay_start=6", "training.ilr_warmup_steps=3"]
    train.run(configure(*simulated, *stable, "training.exp_name=stable"))
    longer = ["training.total_steps=8", "training.optimizer_outer.lr_decay_steps=8"]
    warm = ["training.optimizer_outer.lr_warmup_steps=4", "training.ilr_warmup_steps=5"]
    branch = configure(*simulated, *stable, *longer, *warm, *BRANCH)
    train.run(branch)
    assert record_of(branch).run()["status"] == "finished"


def test_all_of_a_run_that_is_at_its_end_already_is_refused(configure):
    train.run(configure("training.total_steps=1"))
    parent = ["training.load_part=all", "training.resume_exp_name=pretrain-tiny-e2e"]
    child = configure("training.exp_name=child", "training.total_steps=1", *parent)
    with pytest.raises(UserError, match=r"total_steps=1: .*/1 has taken as many steps"):
        train.run(child)
    assert not record_of(child).folder.exists()


def test_a_missing_parent_is_named_with_its_folder(configure):
    config = configure("training.load_part=params", "training.resume_exp_name=nobody")
    with pytest.raises(UserError, match=r"no checkpoint in .*/checkpoints/default/nobody"):
        train.run(config)


def test_full_attention_and_sliding_window_run_too(configure):
    for method in ("fa", "swa"):
        config = configure(
            "training.total_steps=1",
            "model.suffix_len=0",
            experiment=f"pretrain/pretrain-tiny-{method}",
        )
        train.run(config)
        summary = record_of(config).folder / "eval/loss_by_position-1.json"
        assert "loss_without_learning" not in json.loads(summary.read_text())


def test_without_its_data_a_published_experiment_says_where_it_looked_and_what_to_run(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "ttt.train", "+experiment=760m/extension/ext-760m-e2e-32K"],
        cwd=tmp_path,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "data/books3" in ran.stderr
    assert "scripts/00_data_fetch.py --datasets books3 --billing-project PROJECT" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("learning", "warned"), [(2.52, False), (3.3, True), (1.9, False)])
def test_an_inner_rate_that_destroys_the_model_is_named(learning, warned, monkeypatch, caplog):
    """2.02 to 3.33 nats is what the published rate did to the MLPs of a real model."""
    losses = iter([SimpleNamespace(loss=learning), SimpleNamespace(loss=2.5)])
    monkeypatch.setattr(train, "score", lambda *args, **kwargs: next(losses))
    training = SimpleNamespace(
        eval_start_batches=1, eval_split="val", optimizer_inner=SimpleNamespace(lr=1.0)
    )
    run = SimpleNamespace(
        config=SimpleNamespace(training=training),
        spent=Spent(),
        record=SimpleNamespace(note=lambda **noted: None, logged=lambda *key: True),
    )
    start = SimpleNamespace(parent=None, state=SimpleNamespace(step=0))
    with caplog.at_level("WARNING", logger="ttt.train"):
        train.evaluate_start(run, start, None, lambda: None, learning=True)
    assert ("lower training.optimizer_inner.lr" in caplog.text) is warned
