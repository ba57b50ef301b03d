"""Configurations are checked whole, records keep no secrets, exit codes tell what happened."""

import copy
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache

import cloudpickle
import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ttt import config as config_module
from ttt import entry
from ttt.config import (
    ConfigError,
    compose,
    config_dir,
    differences,
    extension_batch_size,
    full_attention_rope_theta,
    narrowed_width,
    resolve,
    to_dict,
    with_stored,
)
from ttt.entry import Job, exit_codes, hydra_entry
from ttt.errors import RunError, Stopped, UserError
from ttt.globs import is_glob, matches
from ttt.infra import distributed

E2E = "tiny/pretrain/pretrain-tiny-e2e"


@cache
def composed(name):
    return compose([f"+experiment={name}"])


def changed(changes, name=E2E):
    """The composed experiment with `changes` (dotted key -> value) made to it."""
    cfg = copy.deepcopy(composed(name))
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def faults(changes, name=E2E):
    with pytest.raises(ConfigError) as caught:
        resolve(changed(changes, name))
    return caught.value.faults


# ---- faults --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model.seq_modeling_block": "swa"}, ["=swa", "self_attention, SWA"]),
        ({"training.train_mode": "mta"}, ["=mta", "did you mean meta?"]),
        ({"training.load_part": "param"}, ["did you mean params?"]),
        ({"model.remat_prefix": "full"}, ["none, dots, attention, block, chunk"]),
        ({"model.compute_dtype": "bf17"}, ["did you mean bf16?"]),
        ({"backend.platform": "gpu"}, ["auto, cpu, cuda, tpu"]),
        ({"training.optimizer_outer.optimizer_type": "adam"}, ["did you mean adamw?"]),
        ({"training.optimizer_inner.optimizer_type": "adamw"}, ["must be one of sgd"]),
        ({"model.suffix_len": 5}, ["suffix_len=5", "num_hidden_layers=4", "lower suffix_len"]),
        ({"model.suffix_len": 0}, ["train_mode=meta", "suffix_len=0", "needs suffix blocks"]),
        ({"model.prime": False}, ["prime=False", "set model.prime=true"]),
        (
            {"training.spec_inner": ["**.wte.**"]},
            ["**.wte.**", "suffix_blocks.feed_forward_prime.**"],
        ),
        ({"model.seq_modeling_block": "self_attention"}, ["set model.seq_modeling_block=SWA"]),
        ({"model.sliding_window_size": 0}, ["sliding_window_size=0", "at least 1"]),
        ({"model.mini_batch_size": 0}, ["mini_batch_size=0", "at least 1"]),
        ({"training.seq_length": 100}, ["seq_length=100", "=128", "multiple of mini_batch_size"]),
        ({"model.num_attention_heads": 3}, ["hidden_size=128", "num_attention_heads=3"]),
        ({"model.num_attention_heads": 128}, ["num_attention_heads=128", "even width"]),
        ({"training.accum_steps": 3}, ["global_batch_size=1", "accum_steps=3"]),
        ({"training.global_batch_size": -4}, ["global_batch_size=-4", "at least 1"]),
        ({"model.bos_token_id": 2048}, ["bos_token_id=2048", "vocab_size=2048"]),
        ({"model.eos_token_id": -1}, ["eos_token_id=-1", "not be negative"]),
        ({"training.optimizer_outer.lr": 0}, ["lr=0", "above 0"]),
        ({"training.optimizer_outer.end_lr": 1}, ["end_lr=1.0", "lr=0.012"]),
        ({"training.optimizer_outer.lr": float("nan")}, ["finite number"]),
        ({"training.optimizer_outer.b2": 1.0}, ["b2=1.0", "[0, 1)"]),
        ({"training.optimizer_outer.lr_warmup_steps": 5000}, ["lr_warmup_steps=5000", "warm-up"]),
        ({"training.optimizer_outer.schedule": "wds"}, ["did you mean wsd?"]),
        (
            {
                "training.optimizer_outer.schedule": "wsd",
                "training.optimizer_outer.lr_decay_start": 3,
            },
            ["lr_decay_start=3", "between lr_warmup_steps and lr_decay_steps"],
        ),
        ({"training.optimizer_inner.lr": -1}, ["optimizer_inner.lr=-1", "above 0"]),
        ({"training.ilr_warmup_steps": -1}, ["ilr_warmup_steps=-1"]),
        ({"training.ilr_init": -0.1}, ["ilr_init=-0.1"]),
        ({"training.eval_batches": -1}, ["eval_batches=-1"]),
        ({"training.seq_length": 0}, ["seq_length=0", "at least 1"]),
        ({"training.total_steps": 0}, ["total_steps=0", "at least 1"]),
        ({"training.load_part": "params"}, ["load_part=params", "resume_exp_name=NAME"]),
        ({"training.resume_exp_name": "x"}, ["load_part=none", "resume_exp_name=x"]),
        ({"training.resume_step": -2}, ["resume_step=-2", "set it to -1"]),
        ({"training.exp_name": ""}, ["exp_name=:", "one folder"]),
        ({"training.exp_name": "a/b"}, ["exp_name=a/b", "one folder"]),
        ({"training.exp_folder": ".."}, ["exp_folder=..", "one folder"]),
        ({"training.dataset_name": "books"}, ["dataset_name=books", "+deploy_paths.data.NAME"]),
        ({"training.spec_outer": ["a..b"]}, ["a..b", "dotted globs"]),
        ({"training.spec_outer": []}, ["spec_outer=[]", "dotted globs"]),
        ({"training.spec_outer": "**"}, ["spec_outer=**", "[a,b]"]),
        ({"training.log_wandb": True, "training.wandb_project": ""}, ["wandb_project=NAME"]),
        ({"backend.fake_devices": 8, "backend.platform": "cuda"}, ["fake_devices=8", "=cuda"]),
        ({"backend.sharding": "fspd"}, ["=fspd", "did you mean fsdp?"]),
        ({"backend.state_parallel": 3}, ["state_parallel=3", "num_key_value_heads=", "divisor"]),
        ({"backend.num_processes": 2}, ["num_processes=2", "process_id=-1", "set all or none"]),
        (
            {
                "backend.distributed": True,
                "backend.coordinator_address": "host:1",
                "backend.num_processes": 2,
                "backend.process_id": 2,
            },
            ["process_id=2", "process_id below num_processes"],
        ),
        (
            {
                "backend.coordinator_address": "host:1",
                "backend.num_processes": 2,
                "backend.process_id": 0,
            },
            ["coordinator_address=host:1", "set backend.distributed=true"],
        ),
        ({"model.num_key_value_heads": 3}, ["=4", "num_key_value_heads=3", "a divisor of"]),
        ({"model.head_dim": 33}, ["head_dim=33", "even width", "set head_dim"]),
        (
            {"model.layer_types": ["sliding_attention"] * 5, "model.seq_modeling_block": ""},
            ["num_hidden_layers=4", "no layer reaches the last entries", "shorten layer_types"],
        ),
        (
            {"model.layer_types": ["sliding_atention"], "model.seq_modeling_block": ""},
            ["there are full_attention, sliding_attention", "did you mean sliding_attention?"],
        ),
        ({"model.layer_types": ["sliding_attention"]}, ["one of the two", "layer_types=[]"]),
        ({"model.seq_modeling_block": ""}, ["one of the two"]),
        ({"evaluation.suites": ["needls"]}, ["did you mean needles?"]),
        ({"training.seq_length": "???"}, ["training.seq_length=???", "add training.seq_length="]),
        ({"training.seq_length": "long"}, ["seq_length=long", "whole number"]),
        ({"training.seq_length": True}, ["seq_length=True", "whole number"]),
        ({"training.dummy_dataset": "maybe"}, ["dummy_dataset=maybe", "true or false"]),
        ({"training.exp_name": 123}, ["exp_name=123", "quote"]),
        ({"training.totl_steps": 3}, ["training.totl_steps", "did you mean training.total_steps?"]),
        ({"trainin": 3}, ["trainin: no such setting"]),
        ({"model.vocab_size": "${size.vocabulary}"}, ["cannot be derived", "size.vocabulary"]),
    ],
    ids=str,
)
def test_one_mistake_is_one_fault_with_value_rule_and_remedy(changes, fragments):
    found = faults(changes)
    assert len(found) == 1, found
    for fragment in fragments:
        assert fragment in found[0]


def test_all_faults_are_reported_at_once():
    found = faults(
        {
            "model.suffix_len": 9,
            "model.compute_dtype": "fp8",
            "training.total_steps": "ten",
            "training.exp_name": "a/b",
            "training.dataset_name": "nowhere",
            "training.no_such": 1,
            "backend.fake_devices": -1,
        }
    )
    assert len(found) == 7
    message = str(ConfigError(found))
    assert message.startswith("7 faults in the configuration:\n  1. ")
    assert all(fault in message for fault in found)


def test_what_follows_from_a_faulty_setting_is_no_fault_of_its_own():
    # warm-up, decay and inner warm-up all follow from the number of steps
    assert [fault.split(":")[0] for fault in faults({"training.total_steps": "ten"})] == [
        "training.total_steps=ten"
    ]


def test_whole_floats_count_as_whole_numbers():
    assert resolve(changed({"training.total_steps": 1e3})).training.total_steps == 1000


def test_dummy_dataset_needs_no_place_for_its_data():
    training = {"training.dataset_name": "nowhere", "training.dummy_dataset": True}
    assert resolve(changed(training)).training.dummy_dataset


@pytest.mark.parametrize(
    "glob",
    [
        "**.suffix_blocks.feed_forward.**",
        "**.suffix_blocks.*_norm.**",
        "**.suffix_blocks.seq_modeling_block.wq.*",
        "**.lm_head.*",
    ],
)
def test_other_parameters_of_the_suffix_can_be_fast(glob):
    assert resolve(changed({"training.spec_inner": [glob]})).training.spec_inner == (glob,)


def test_only_what_the_mixer_has_can_be_fast():
    glob = {"training.spec_inner": ["**.seq_modeling_block.*.bias"]}
    assert "no parameter of the suffix" in faults(glob)[0]
    assert resolve(changed(glob | {"model.attention_bias": True}))


def test_a_cycle_of_mixers_learns_only_if_all_of_them_can():
    cycle = {"model.layer_types": ["sliding_attention", "full_attention"]}
    (fault,) = faults(cycle | {"model.seq_modeling_block": ""})
    assert "test-time training runs on sliding window; set model.seq_modeling_block=SWA" in fault


def test_every_unknown_setting_of_a_command_line_is_named_with_what_else_is_wrong():
    with pytest.raises(ConfigError) as caught:
        compose(
            [
                f"+experiment={E2E}",
                "training.totl_steps=3",
                "model.hiden_size=4",
                "sise.chunk=2",
                "training.accum_steps=3",
            ]
        )
    assert [fault.split(":")[0] for fault in caught.value.faults[:3]] == [
        "training.totl_steps",
        "model.hiden_size",
        "sise.chunk",
    ]
    assert "did you mean training.total_steps?" in caught.value.faults[0]
    assert "did you mean model.hidden_size?" in caught.value.faults[1]
    assert "accum_steps=3" in caught.value.faults[3]
    assert len(caught.value.faults) == 4


def test_config_error_survives_pickling():
    error = ConfigError(["a", "b"])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.faults, str(again)) == (ConfigError, ("a", "b"), str(error))


def test_naming_nothing_lists_the_experiments():
    with pytest.raises(UserError, match=r"\+experiment=NAME(.|\n)*tiny/pretrain/pretrain-tiny-fa"):
        resolve(compose([]))


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("training.totl_steps=3", "did you mean training.total_steps?"),
        ("+experiment=tiny/pretrain/pretrain-tiny-e2", "such as tiny/pretrain/pretrain-tiny-e2e"),
        ("+experiment=ext-760m-e2e-32K", "760m/extension/ext-760m-e2e-32K"),
        ("experiment=tiny/pretrain/pretrain-tiny-e2e", "use +experiment="),
        ("+backend=local", "write backend=NAME, without a +"),
        ("+deploy=slurm", "default, interactive, submitit"),
        ("training.total_steps=[", "grammar"),
    ],
)
def test_what_hydra_refuses_is_said_with_a_way_out(override, fragment):
    with pytest.raises(UserError) as caught:
        compose([override])
    assert fragment in str(caught.value)


# ---- rules of the config files -------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "theta"),
    [(512, 5e5), (8192, 5e5), (16384, 1e6), (32768, 2e6), (65536, 5e6), (131072, 1e7)],
)
def test_rope_theta_of_full_attention_grows_with_the_context(length, theta):
    assert full_attention_rope_theta(5e5, length) == theta


@given(st.integers(1, 64), st.integers(1, 8192), st.data())
def test_narrowed_mlps_never_cost_less_and_at_most_128_wide_more(layers, width, data):
    suffix = data.draw(st.integers(0, layers))
    narrow = narrowed_width(width, layers, suffix)
    assert narrow % 128 == 0
    assert 0 <= narrow * (layers + suffix) - width * layers < 128 * (layers + suffix)


def test_extension_batch_holds_twice_the_tokens_and_never_nothing():
    assert extension_batch_size(128, 8192, 131072) == 16
    assert extension_batch_size(1, 8, 1000) == 1


# ---- records -------------------------------------------------------------------------


def test_the_record_is_json_and_holds_no_secret():
    record = to_dict(resolve(changed({"training.wandb_key": "hush-hush"})))
    assert "hush" not in json.dumps(record)
    assert record["training"]["optimizer_outer"]["lr"] == 12e-3
    assert record["training"]["spec_outer"] == ["**"]
    stores = {"dclm_filter_8k", "books3", "builtin", "builtin_bpe", "builtin_imported"}
    assert record["deploy_paths"]["data"].keys() >= stores


def test_a_secret_of_the_wrong_type_is_masked_too():
    assert "12345" not in faults({"training.wandb_key": 12345})[0]


def test_differences_are_those_that_change_the_numbers():
    before = to_dict(resolve(composed(E2E)))
    neutral = {
        "training.exp_folder": "other",
        "training.save_every_steps": 7,
        "training.eval_batches": 2,
        "training.keep_checkpoints": 9,
        "model.loss_block": 64,
        "training.inner_remat_freq": 4,
        "training.wandb_project": "p",
        "training.allow_config_change": True,
        "model.remat_suffix": "block",
        "backend.platform": "cpu",
        "deploy_paths.checkpoint": "/elsewhere",
    }
    telling = {"training.data_seed": 1, "model.qk_norm": False, "training.optimizer_outer.lr": 2e-3}
    after = to_dict(resolve(changed(neutral | telling)))
    assert differences(before, after) == {
        "model.qk_norm": (True, False),
        "training.data_seed": (0, 1),
        "training.optimizer_outer.lr": (12e-3, 2e-3),
    }


def test_longer_runs_differ_by_their_schedule_alone():
    before = to_dict(resolve(composed(E2E)))
    longer = to_dict(resolve(changed({"training.total_steps": 300})))
    assert set(differences(before, longer)) == {
        "training.optimizer_outer.lr_warmup_steps",
        "training.optimizer_outer.lr_decay_start",
        "training.optimizer_outer.lr_decay_steps",
        "training.ilr_warmup_steps",
    }
    assert differences({"model": {}}, {"model": {"new": 1}}) == {"model.new": (None, 1)}


def test_a_record_from_before_there_were_schedules_is_of_a_cosine():
    now = to_dict(resolve(composed(E2E)))
    then = copy.deepcopy(now)
    for key in ("schedule", "lr_decay_start"):
        del then["training"]["optimizer_outer"][key]
    assert differences(then, now) == {}
    wsd = resolve(changed({"training.optimizer_outer.schedule": "wsd"}))
    assert differences(then, to_dict(wsd)) == {
        "training.optimizer_outer.schedule": ("cosine", "wsd")
    }
    assert with_stored(wsd, then).training.optimizer_outer.schedule == "cosine"


def test_every_neutral_glob_selects_a_setting():
    keys = config_module._LEAVES
    unused = [g for g in config_module._NEUTRAL if not any(matches(g, key) for key in keys)]
    assert unused == []


# ---- globs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "name", "answer"),
    [
        ("**", "a", True),
        ("**", "a.b.c", True),
        ("a.**", "a", True),
        ("a.**.d", "a.d", True),
        ("a.**.d", "a.b.c.d", True),
        ("a.**.d", "a.b.c", False),
        ("**.b.**", "a.b", True),
        ("**.b.**", "a.bb.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("*", "a.b", False),
        ("w*.x", "w12.x", True),
        ("*_norm", "ffn_norm", True),
        ("*_norm", "ffn_norms", False),
        ("A", "a", False),
    ],
)
def test_glob_matches(glob, name, answer):
    assert matches(glob, name) is answer


NAMES = st.lists(st.sampled_from(["a", "b", "blocks", "w1"]), min_size=1, max_size=5)


@given(NAMES, NAMES)
def test_double_star_is_any_number_of_segments(left, right):
    name = ".".join(left + right)
    assert matches(name, name)
    assert matches(".".join([*left, "**", *right]), name)
    assert matches(".".join(["**", *right]), name)
    assert matches(".".join([*("*" for _ in left), *right]), name)


@pytest.mark.parametrize("text", ["**", "a.b", "*", "w*.**", "a_1.*_x*y"])
def test_well_formed_globs(text):
    assert is_glob(text)


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a..b", "a**", "***", "a b", "a[0]", "a?"])
def test_ill_formed_globs(text):
    assert not is_glob(text)


# ---- the command line ----------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `run` as a command with arguments in an empty folder and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    handlers, level = logging.root.handlers[:], logging.root.level

    def call(run, *arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        try:
            hydra_entry(run)()
        except SystemExit as leaving:
            return leaving.code
        return 0

    yield call
    logging.root.handlers[:], logging.root.level = handlers, level


def fail(error):
    def run(config):
        raise error

    return run


def test_the_command_hands_a_checked_config_to_run_and_leaves_nothing_behind(command, tmp_path):
    seen = []
    assert command(seen.append, f"+experiment={E2E}", "training.total_steps=20") == 0
    assert [config.training.optimizer_outer.lr_decay_steps for config in seen] == [20]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (fail(UserError("the store is gone")), 2, "error: the store is gone\n"),
        (fail(RuntimeError("boom")), 1, "RuntimeError: boom"),
        (fail(KeyboardInterrupt()), 130, "interrupted"),
        (fail(RunError("the disk is full")), 1, "error: the disk is full\n"),
        (fail(Stopped("the same command goes on", signal.SIGTERM)), 75, "the same command goes on"),
        (lambda config: 7, 7, ""),
    ],
)
def test_exit_code_tells_mistakes_failures_and_interrupts_apart(command, capsys, run, code, said):
    assert command(run, f"+experiment={E2E}") == code
    error = capsys.readouterr().err
    assert said in error
    assert ("Traceback" in error) == ("RuntimeError" in said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "+experiment=NAME"),
        (["+experiment=tiny/pretrain/pretrain-tiny-e2"], "no such choice"),
        ([f"+experiment={E2E}", "training.sep_length=1"], "did you mean training.seq_length?"),
        ([f"+experiment={E2E}", "training.sep_length=1", "model.hiden_size=2"], "2 faults"),
        ([f"+experiment={E2E}", "training.seq_length=100"], "1 fault"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_no_traceback(command, capsys, arguments, said):
    assert command(fail(RuntimeError("ran")), *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_sweep_that_is_asked_to_stop_starts_no_other_job(command, capsys):
    seen = []

    def run(config):
        seen.append(config.training.total_steps)
        raise Stopped("the same command goes on", signal.SIGTERM)

    assert command(run, "-m", f"+experiment={E2E}", "training.total_steps=10,20") == 75
    assert seen == [10]
    assert "the same command goes on" in capsys.readouterr().err


def test_a_sweep_runs_every_job_and_reports_a_failed_one(command, capsys):
    seen = []

    def run(config):
        seen.append(config.training.total_steps)
        if config.training.total_steps == 10:
            raise UserError("not ten")

    assert command(run, "-m", f"+experiment={E2E}", "training.total_steps=10,20") == 2
    assert seen == [10, 20]
    assert "error: not ten" in capsys.readouterr().err


def test_help_shows_examples_and_experiments(command, capsys):
    assert command(fail(RuntimeError("ran")), "--help") == 0
    text = capsys.readouterr().out
    assert "train +experiment=NAME [KEY=VALUE ...]" in text
    assert "  760m/extension/ext-760m-e2e-32K\n" in text


def test_jobs_can_be_sent_to_other_processes():
    job = cloudpickle.loads(cloudpickle.dumps(Job(os.path.basename)))
    assert job.run is os.path.basename


def test_exit_codes_serve_scripts_as_well(capsys):
    with pytest.raises(SystemExit) as leaving, exit_codes():
        raise UserError("no such folder")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "error: no such folder\n"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose driver shows one GPU."""
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(entry, "_DRIVER", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_is_visible_unless_it_is_hidden(gpu, monkeypatch, hidden):
    assert entry.gpu_is_visible()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not entry.gpu_is_visible()


@pytest.mark.parametrize(("said", "visible"), [("GPU 0: NVIDIA H100", True), ("no devices", False)])
def test_without_a_proc_of_the_driver_its_program_is_asked(monkeypatch, tmp_path, said, visible):
    monkeypatch.setattr(entry, "_DRIVER", tmp_path / "none")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not entry.gpu_is_visible()
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert entry.gpu_is_visible() is visible


@pytest.mark.parametrize(
    ("platforms", "platform", "warnings"), [(None, "auto", 1), ("cpu", "auto", 0), (None, "cpu", 0)]
)
def test_a_gpu_that_jax_does_not_use_is_warned_of_once(
    gpu, monkeypatch, caplog, platforms, platform, warnings
):
    before = jax.config.jax_platforms
    backend = replace(resolve(composed(E2E)).backend, platform=platform, compilation_cache_dir="")
    try:
        jax.config.update("jax_platforms", platforms)
        with caplog.at_level(logging.WARNING):
            distributed.start(backend)
    finally:
        jax.config.update("jax_platforms", before)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warnings
    assert all("uv run --exact --extra cuda13" in line for line in said)


def test_config_dir_is_found_in_the_checkout_and_in_the_wheel(monkeypatch, tmp_path):
    assert (config_dir() / "experiment").is_dir()
    inside = tmp_path / "ttt" / "configs"
    monkeypatch.setattr(config_module, "__file__", str(tmp_path / "ttt" / "config.py"))
    with pytest.raises(UserError, match="install the package"):
        config_dir()
    inside.mkdir(parents=True)
    (inside / "config.yaml").touch()
    assert config_dir() == inside


def test_config_and_entry_do_not_import_jax():
    code = "import sys, ttt.config, ttt.entry; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_published_run_is_validated_ten_times_on_a_part_of_the_split():
    training = resolve(compose(["+experiment=760m/extension/ext-760m-e2e-32K"])).training
    assert training.eval_every_steps == training.total_steps // 10 > 0
    assert 0 < training.eval_batches * training.eval_batch_size <= 256
    assert (
        resolve(compose(["+experiment=tiny/pretrain/pretrain-tiny-e2e"])).training.eval_every_steps
        == 0
    )
