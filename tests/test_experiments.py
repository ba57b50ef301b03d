"""Every experiment resolves, the published ones to their published values."""

import json
import os
from functools import cache
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from ttt.config import Config, compose, config_dir, experiments, resolve, to_dict

BESIDE = Path(__file__).parents[2] / "shared" / "published_experiments.json"
PUBLISHED = Path(os.environ.get("TTT_PUBLISHED", BESIDE))
EXPECTED = json.loads(PUBLISHED.read_text()) if PUBLISHED.is_file() else {}

needs_published = pytest.mark.skipif(
    not EXPECTED, reason=f"no published values at {PUBLISHED}: set TTT_PUBLISHED"
)


@cache
def experiment(name: str, *overrides: str) -> Config:
    return resolve(compose([f"+experiment={name}", *overrides]))


def contradictions(expected: dict, actual: dict, prefix: str = "") -> dict:
    """Expected values (`???`: unset when published) that differ or are absent."""
    found = {}
    for key, value in expected.items():
        if isinstance(value, dict):
            found |= contradictions(value, actual[key], f"{prefix}{key}.")
        elif value != "???" and actual.get(key, "absent") != value:
            found[prefix + key] = (value, actual.get(key, "absent"))
    return found


@needs_published
def test_all_22_published_experiments_are_there():
    assert len(EXPECTED) == 22
    assert EXPECTED.keys() <= set(experiments())


@needs_published
@pytest.mark.parametrize("name", EXPECTED)
def test_published_experiment_resolves_to_its_published_values(name):
    assert contradictions(EXPECTED[name], to_dict(experiment(name))) == {}


@needs_published
def test_a_differing_and_an_absent_value_would_be_found():
    actual = {"training": {"seq_length": 8192, "optimizer_outer": {}}}
    expected = {"training": {"seq_length": 4096, "optimizer_outer": {"lr": 1e-3, "b1": "???"}}}
    assert contradictions(expected, actual) == {
        "training.seq_length": (4096, 8192),
        "training.optimizer_outer.lr": (1e-3, "absent"),
    }


@pytest.mark.parametrize("method", ["e2e", "fa", "swa"])
def test_tiny_experiment_is_small_and_learns_bytes(method):
    config = experiment(f"tiny/pretrain/pretrain-tiny-{method}")
    model = config.model
    assert (model.vocab_size, model.bos_token_id, model.eos_token_id) == (258, 256, 257)
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (128, 256, 4)
    assert model.suffix_len == (1 if method == "e2e" else 0)
    assert model.rope_theta == 10000
    assert model.compute_dtype == model.param_dtype == model.state_dtype == "fp32"
    assert config.training.dataset_name == "builtin"
    assert config.training.train_mode == ("meta" if method == "e2e" else "pretrain")


@pytest.mark.parametrize("name", [name for name in experiments() if "/extension/" in name])
def test_extension_takes_the_parameters_of_its_pretraining(name):
    training = experiment(name).training
    size, _, own = name.split("/")
    parent = f"pretrain-{size}-{own.split('-')[2]}"
    assert (training.load_part, training.resume_exp_name) == ("params", parent)
    assert f"{size}/pretrain/{parent}" in experiments()
    assert training.exp_name == own


def test_rules_follow_the_command_line():
    training = experiment("760m/pretrain/pretrain-760m-e2e", "training.total_steps=200").training
    outer = training.optimizer_outer
    assert (outer.lr_warmup_steps, outer.lr_decay_steps) == (20, 200)
    assert training.ilr_warmup_steps == 20

    full = experiment("3b/extension/ext-3b-fa-32K", "training.seq_length=65536")
    assert full.model.mini_batch_size == 65536
    assert full.model.rope_theta == 5e6
    assert full.training.global_batch_size == 32


def test_a_stated_value_wins_over_its_rule():
    training = experiment(
        "125m/extension/ext-125m-fa-32K",
        "training.total_steps=200",
        "training.optimizer_outer.lr_warmup_steps=7",
        "training.global_batch_size=2",
    ).training
    assert training.optimizer_outer.lr_warmup_steps == 7
    assert training.optimizer_outer.lr_decay_steps == 200
    assert training.global_batch_size == 2


def test_choices_of_an_experiment_can_be_replaced():
    config = experiment("760m/extension/ext-760m-fa-32K", "model=125m", "context=16K")
    assert (config.model.name, config.model.rope_theta) == ("125m", 1e6)
    assert (config.training.seq_length, config.training.global_batch_size) == (16384, 64)
    swa = experiment("125m/pretrain/pretrain-125m-e2e", "method=swa")
    assert (swa.training.train_mode, swa.model.suffix_len) == ("pretrain", 0)
    assert (swa.model.intermediate_size, swa.model.mini_batch_size) == (2048, 1024)


def test_paths_come_from_the_environment_without_a_deploy(monkeypatch):
    for name in ("TTT_DATA", "TTT_CHECKPOINTS", "TTT_EXPERIMENTS", "TTT_COMPILATION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    name = "760m/extension/ext-760m-e2e-32K"
    paths = experiment.__wrapped__(name).deploy_paths
    assert paths.data["books3"] == "./data/books3"
    assert (paths.checkpoint, paths.experiments) == ("./checkpoints", "./experiments")

    monkeypatch.setenv("TTT_DATA", "/d")
    monkeypatch.setenv("TTT_CHECKPOINTS", "/c")
    monkeypatch.setenv("TTT_EXPERIMENTS", "/e")
    monkeypatch.setenv("TTT_COMPILATION_CACHE", "")
    config = experiment.__wrapped__(name, "+deploy_paths.data.mine=/elsewhere")
    assert config.deploy_paths.data == {
        "dclm_filter_8k": "/d/dclm_filter_8k",
        "books3": "/d/books3",
        "builtin": "/d/builtin",
        "mine": "/elsewhere",
    }
    assert (config.deploy_paths.checkpoint, config.deploy_paths.experiments) == ("/c", "/e")
    assert config.backend.compilation_cache_dir == ""


def with_hydra(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=True)


def test_deploy_interactive_stays_in_this_process():
    cfg = with_hydra("+deploy=interactive", "+experiment=tiny/pretrain/pretrain-tiny-fa")
    assert cfg.hydra.launcher._target_.endswith("BasicLauncher")
    assert cfg.backend.distributed is False


def test_deploy_submitit_starts_slurm_jobs_of_one_distributed_task_per_node():
    cfg = with_hydra("+deploy=submitit", "+experiment=tiny/pretrain/pretrain-tiny-fa")
    assert cfg.hydra.launcher._target_.endswith("SlurmTTTLauncher")
    assert cfg.hydra.launcher.tasks_per_node == 1
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.backend.distributed is True


def test_local_background_launcher_is_registered():
    cfg = with_hydra("hydra/launcher=submitit_local_ttt")
    assert cfg.hydra.launcher._target_.endswith("LocalTTTLauncher")
    assert cfg.hydra.launcher.timeout_min == 24 * 60
