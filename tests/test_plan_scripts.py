"""Scripts 03 and 06 as their users meet them."""

import os
import shlex
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ttt.config import compose, resolve
from ttt.dataloader import token_store
from ttt.errors import UserError
from ttt.runs import execute, pilot

SCRIPTS = Path(__file__).parents[1] / "scripts"
MATRIX, PILOT = "03_pretrained_matrix.py", "06_phase1_pilot.py"


@pytest.fixture
def call(monkeypatch, run_script, tmp_path):
    """(exit code, what was said) of a script called in an empty folder, which stays empty."""
    monkeypatch.chdir(tmp_path)
    for name in ("TTT_DATA", "TTT_CHECKPOINTS", "TTT_EXPERIMENTS"):
        monkeypatch.delenv(name, raising=False)

    def run(script, *arguments):
        code, said = run_script(script, *arguments)
        assert os.listdir(tmp_path) == []
        return code, said

    return run


def commands(text: str) -> list[list[str]]:
    """The arguments of `train` in every line that a shell would run."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert all(line[:3] == ["uv", "run", "train"] for line in lines if line)
    return [line[3:] for line in lines if line]


@pytest.mark.parametrize("script", [MATRIX, PILOT])
def test_help_has_examples_and_exit_codes(call, script):
    code, said = call(script, "--help")
    assert code == 0
    assert f"scripts/{script}" in said.out
    assert "Exit codes" in said.out


def test_the_matrix_prints_commands_that_compose_in_order_of_dependency(call, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    code, said = call(
        MATRIX,
        "--dclm-path=/it's a/dclm",
        "--books-path=/books",
        "--checkpoint-path=/c",
        "--log-wandb",
        "--wandb-entity=us",
        "--wandb-project=p",
        "--size=125m",
        "--paths=B1,P1,S1",
        "--deploy=interactive",
        "--dummy-dataset",
    )
    assert code == 0
    assert "SECRET" not in said.out + said.err
    done = set()
    for arguments in commands(said.out):
        config = resolve(compose(arguments))
        training = config.training
        assert training.load_part == "none" or training.resume_exp_name in done
        done.add(training.exp_name)
        assert training.exp_folder == "pretrained_phase1"
        assert config.deploy_paths.data["dclm_filter_8k"] == "/it's a/dclm"
        assert config.deploy_paths.data["books3"] == "/books"
        assert config.deploy_paths.checkpoint == "/c"
        wandb = (training.log_wandb, training.wandb_entity, training.wandb_project)
        assert wandb == (True, "us", "p")
        assert training.dummy_dataset
    assert done == {
        "pretrain-125m-e2e",
        "ext-125m-e2e-32K",
        "pretrain-125m-fa",
        "ext-125m-swa-32K-from-fa",
        "adapt-125m-e2e-8K-from-fa",
        "ext-125m-e2e-32K-from-fa-bridge",
    }


def test_the_matrix_of_a_light_mode_needs_no_other_flag(call):
    code, said = call(MATRIX, "--runtime-mode", "token_stats")
    assert code == 0
    configs = [resolve(compose(arguments)) for arguments in commands(said.out)]
    assert {config.model.name for config in configs} == {"760m"}
    assert {config.training.runtime_mode for config in configs} == {"token_stats"}
    again = call(MATRIX, "--runtime-mode", "token_stats", "--dry-run")[1]
    assert again.out == said.out


@pytest.mark.parametrize("arguments", [[MATRIX, "--size", "tiny"], [PILOT, "--dry-run"]])
def test_commands_keep_the_cuda_plugin_that_is_installed(call, monkeypatch, arguments):
    monkeypatch.setattr("ttt.runs.plan.cuda_extra", lambda: "cuda13")
    code, said = call(*arguments)
    assert code == 0
    lines = [line for line in said.out.splitlines() if line.startswith("uv run")]
    assert lines
    assert all(line.startswith("uv run --exact --extra cuda13 train +exp") for line in lines)


def test_a_pilot_without_the_plugin_of_its_gpu_warns(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ttt.runs.execute.gpu_is_visible", lambda: True)
    flags = {"size": "tiny", "exp_folder": "f", "runtime_mode": "jax"}
    flags |= {"paths": "B1", "dclm_root": "x"}
    said = StringIO()
    with pytest.raises(UserError, match="No token store"):
        execute.run(pilot.prepare(flags), Console(file=said))
    assert "uv run --exact --extra cuda13" in said.getvalue()


SHORT = [
    "--runtime-mode=simulate",
    "--seeds=0",
    "--paths=B1",
    "--pretrain-steps=4",
    "--ext-steps=2",
    "--seq-length=64",
    "--global-batch-size=4",
]


@pytest.mark.slow
def test_the_pilot_reports_what_it_has_when_a_run_fails(monkeypatch, run_script, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("TTT_DATA", "TTT_CHECKPOINTS", "TTT_EXPERIMENTS"):
        monkeypatch.delenv(name, raising=False)
    token_store.write_random("few", {"train": 200, "val": 200}, vocab_size=258, seed=0)
    code, said = run_script(PILOT, *SHORT, "--dclm-root=few", "--exp-folder=bad")
    assert code == 1
    assert "fewer than training.global_batch_size=4" in said.err
    assert "pretrain-tiny-e2e-seed0" in (tmp_path / "experiments/bad/report/report.md").read_text()


def test_the_matrix_of_a_seed_matched_by_tokens(call):
    code, said = call(
        MATRIX,
        "--size=tiny",
        "--seeds=7",
        "--matching=tokens",
        "--paths=P1",
        "--runtime-mode=simulate",
    )
    assert code == 0
    configs = [resolve(compose(arguments)) for arguments in commands(said.out)]
    assert len(configs) == 2 + 3
    tokens = {}
    for config in configs:
        training = config.training
        kind = "P1" if "from" in training.exp_name or "-fa-" in training.exp_name else "B1"
        key = (kind, training.model_seed)
        steps = training.total_steps * training.global_batch_size * training.seq_length
        tokens[key] = tokens.get(key, 0) + steps
        assert training.runtime_mode == "simulate"
    assert set(tokens) == {("B1", 7), ("P1", 7)}
    assert len(set(tokens.values())) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        (MATRIX, ["--size", "3b"], "size '3b': must be one of tiny, 125m, 760m"),
        (MATRIX, ["--paths", "B1,X"], "path 'X': must be one of B1"),
        (MATRIX, ["--seeds", "one"], "--seeds 'one': must be whole numbers"),
        (MATRIX, ["--deploy", "cloud"], "deploy=cloud: no such choice"),
        (MATRIX, ["--exp-folder", "a/b"], "must name one folder"),
        (MATRIX, ["--override", "model.hiden_size=3"], "no such setting; correct its name"),
        (MATRIX, ["--override", "training.wandb_key=SECRET"], "WANDB_API_KEY"),
        (MATRIX, ["--runtime-mode", "torch"], "invalid choice: 'torch'"),
        (PILOT, ["--size", "7b"], "size '7b': must be one of"),
        (PILOT, ["--paths", "P9"], "path 'P9': must be one of"),
        (PILOT, ["--matching", "tokens,time"], "--matching 'time': must be one of"),
        (PILOT, ["--matching", "wall_clock"], "write --matching tokens,wall_clock"),
        (PILOT, ["--pretrain-steps", 0], "pretrain_steps=0: must be a whole number from 1"),
        (
            PILOT,
            ["--pretrain-steps", 200, "--adapt-steps", 200],
            "something must be left to pretrain on",
        ),
        (PILOT, ["--seq-length", 100], "a sequence must be whole chunks"),
        (PILOT, ["--data-root", "d", "--books-root", "b"], "give one or the other"),
        (PILOT, ["--size", "125m", "--paths", "B1"], "No token store at"),
        (PILOT, ["--dclm-root", "nowhere", "--paths", "B1"], "No token store at"),
        (PILOT, ["--override", "training.total_steps=3"], "the plan sets training.total_steps"),
    ],
)
def test_a_mistake_is_told_with_its_remedy_and_leaves_nothing_behind(call, script, arguments, told):
    code, said = call(script, *arguments)
    assert code == 2
    assert told in said.err
    assert "SECRET" not in said.err + said.out


def test_the_pilot_shows_its_plan_and_does_nothing(call):
    code, said = call(PILOT, "--dry-run", "--seeds", "0", "--paths", "B1,P1", "--exp-folder", "x")
    assert code == 0
    lines = [line for line in said.out.splitlines() if line.startswith("uv run train")]
    assert len(lines) == 5
    assert all("training.exp_folder=x" in line for line in lines)
    assert "P1 (tokens, seed 0): 696,320 tokens" in said.out
    assert "B1 (tokens, seed 0): 696,320 tokens" in said.out
    assert "wall-clock-matched runs follow" in said.out
