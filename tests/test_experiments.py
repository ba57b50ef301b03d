"""Every experiment resolves, the published ones to their published values."""

import json
import re
from functools import cache
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from ttt import experiment_rules, mixers
from ttt.config import compose, config_dir, experiments, resolve, to_dict
from ttt.errors import UserError
from ttt.knobs import Config

EXPECTED = json.loads((Path(__file__).parent / "data" / "published_experiments.json").read_text())


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


def test_all_22_published_experiments_are_there():
    assert len(EXPECTED) == 22
    assert EXPECTED.keys() <= set(experiments())


@pytest.mark.parametrize("name", EXPECTED)
def test_published_experiment_resolves_to_its_published_values(name):
    assert contradictions(EXPECTED[name], to_dict(experiment(name))) == {}


def test_a_differing_and_an_absent_value_would_be_found():
    actual = {"training": {"seq_length": 8192, "optimizer_outer": {}}}
    expected = {"training": {"seq_length": 4096, "optimizer_outer": {"lr": 1e-3, "b1": "???"}}}
    assert contradictions(expected, actual) == {
        "training.seq_length": (4096, 8192),
        "training.optimizer_outer.lr": (1e-3, "absent"),
    }


@pytest.mark.parametrize("method", ["e2e", "fa", "swa", "hybrid"])
def test_tiny_experiment_is_small_and_learns_byte_pairs(method):
    config = experiment(f"tiny/pretrain/pretrain-tiny-{method}")
    model = config.model
    assert (model.vocab_size, model.bos_token_id, model.eos_token_id) == (2048, 0, 1)
    layers = 6 if method == "hybrid" else 4
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (
        128,
        256,
        layers,
    )
    assert model.suffix_len == (1 if method == "e2e" else 0)
    assert model.rope_theta == 10000
    assert model.compute_dtype == model.param_dtype == model.state_dtype == "fp32"
    assert config.training.dataset_name == "builtin_bpe"
    assert config.training.train_mode == ("meta" if method == "e2e" else "pretrain")


@pytest.mark.parametrize("first", [True, False])
def test_bytes_replace_the_byte_pairs_wherever_they_stand_on_the_command_line(first):
    words = ["+experiment=tiny/extension/ext-tiny-swa-4K", "data=bytes"]
    config = resolve(compose(words[::-1] if first else words))
    model = config.model
    assert (model.vocab_size, model.bos_token_id, model.eos_token_id) == (258, 256, 257)
    assert config.training.dataset_name == "builtin"


# The parent that a name promises: the first pattern that fits, in the experiment's own folder.
PARENTS = (
    (r"ext-(\w+)-e2e-\w+-from-(fa|swa)-bridge(-\w+)?", r"adapt/adapt-\1-e2e-CONTEXT-from-\2\3"),
    (r"ext-(\w+)-\w+-\w+-from-(fa|swa)(-direct)?", r"pretrain/pretrain-\1-\2"),
    (r"adapt-(\w+)-e2e-\w+-from-(fa|swa)(-\w+)?", r"pretrain/pretrain-\1-\2"),
    (r"ext-(\w+)-(\w+)-\w+", r"pretrain/pretrain-\1-\2"),
)
LADDER = (
    "adapt/adapt-{s}-e2e-{a}-from-{b}{p}",
    "extension/ext-{s}-e2e-{e}-from-{b}-bridge{p}",
    "extension/ext-{s}-e2e-{e}-from-fa-direct",
    "extension/ext-{s}-swa-{e}-from-fa",
    "pretrain/pretrain-{s}-swa",
    "pretrain/pretrain-{s}-fa",
    "pretrain/pretrain-{s}-e2e",
    "extension/ext-{s}-e2e-{e}",
    "extension/ext-{s}-fa-{e}",
)


def file_of(name: str) -> Path:
    return config_dir() / "experiment" / f"{name}.yaml"


# All files; of what rules make, three sizes in one context: the others differ in numbers alone.
NAMES = [
    name
    for name in experiments()
    if file_of(name).exists()
    or (
        name.startswith(("tiny/", "125m/", "760m/"))
        and ("/extension/" not in name or ("-4K" if "tiny" in name else "-32K") in name)
    )
]
STARTED = [name for name in NAMES if "/pretrain/" not in name]


def parent_by_name(name: str) -> str:
    size, _, own = name.split("/")
    context = "2K" if size == "tiny" else "8K"
    for pattern, parent in PARENTS:
        if found := re.fullmatch(pattern, own):
            return f"{size}/{found.expand(parent).replace('CONTEXT', context)}"
    raise AssertionError(f"{name} promises no parent")


@pytest.mark.parametrize(
    ("size", "a", "e"), [("125m", "8K", "32K"), ("760m", "8K", "32K"), ("tiny", "2K", "4K")]
)
def test_every_stage_of_the_ladder_is_there(size, a, e):
    expected = {
        f"{size}/{stage.format(s=size, a=a, e=e, b=base, p=percent)}"
        for stage in LADDER
        for base in ("fa", "swa")
        for percent in ("", "-5pct", "-20pct")
    }
    assert expected <= set(experiments())


@pytest.mark.parametrize("size", ["350m", "760m"])
@pytest.mark.parametrize(
    ("context", "tokens", "batch"), [("8K", 8192, 128), ("16K", 16384, 64), ("128K", 131072, 8)]
)
def test_extensions_to_other_contexts_keep_a_batch_of_a_million_tokens(
    size, context, tokens, batch
):
    for method in ("e2e", "fa"):
        training = experiment(f"{size}/extension/ext-{size}-{method}-{context}").training
        assert (training.seq_length, training.global_batch_size) == (tokens, batch)


@pytest.mark.parametrize(
    "name", [name for name in experiments() if file_of(name).exists() and "tiny-hybrid" not in name]
)
def test_a_file_holds_what_the_rule_would_make_of_its_name(name):
    written = OmegaConf.to_container(OmegaConf.load(file_of(name)))
    assert experiment_rules.make(config_dir(), name) == written


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("760m/pretrain/pretrain-760m-e2", "760m/pretrain/pretrain-760m-e2e"),
        ("760m/pretrain/pretrain-125m-swa", "125m/pretrain/pretrain-125m-swa"),
        ("760m/adapt/adapt-760m-e2e-8K-from-gpt", "760m/adapt/adapt-760m-e2e-8K-from-fa"),
        ("760m/adapt/adapt-760m-e2e-8K-from-fa-10pct", "adapt-760m-e2e-8K-from-fa-20pct"),
        ("760m/extension/ext-760m-fa-4K", "760m/extension/ext-760m-fa-64K"),
        ("760m/adapt/ext-760m-fa-32K", "760m/extension/ext-760m-fa-32K"),
        ("tiny/pretrain/pretrain-tiny-hybrd", "tiny/pretrain/pretrain-tiny-hybrid"),
        ("tiny/extension/ext-tiny-hybrid-8K", "tiny/extension/ext-tiny-hybrid-4K"),
    ],
)
def test_a_name_that_no_rule_makes_is_refused_with_near_ones(name, near):
    with pytest.raises(UserError, match="no such choice") as caught:
        compose([f"+experiment={name}"])
    assert near in str(caught.value)


def test_any_share_makes_an_adaptation_and_its_bridge():
    adapted = experiment("125m/adapt/adapt-125m-e2e-8K-from-swa-50pct").training
    assert (adapted.total_steps, adapted.resume_exp_name) == (2400, "pretrain-125m-swa")
    bridge = experiment("125m/extension/ext-125m-e2e-64K-from-swa-bridge-50pct").training
    assert (bridge.seq_length, bridge.resume_exp_name) == (65536, adapted.exp_name)


def test_hydra_lists_what_rules_make_beside_the_files():
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert loader.get_group_options("experiment", ObjectType.GROUP)[0] == "125m"
        stages = loader.get_group_options("experiment/125m", ObjectType.GROUP)
        runs = loader.get_group_options("experiment/125m/pretrain", ObjectType.CONFIG)
    assert stages == ["adapt", "extension", "pretrain"]
    assert runs == [f"pretrain-125m-{method}" for method in ("e2e", "fa", "hybrid", "swa")]


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1b", "3b"])
def test_the_hybrid_has_one_layer_of_full_attention_in_six(size):
    own = experiment(f"{size}/pretrain/pretrain-{size}-hybrid")
    layers = mixers.layer_types(own.model)
    full = [i for i, name in enumerate(layers) if name == "full_attention"]
    assert full == list(range(5, len(layers), 6))
    assert (own.model.seq_modeling_block, own.model.mini_batch_size) == ("", 1024)
    assert own.training.train_mode == "pretrain"
    longer = experiment(f"{size}/extension/ext-{size}-hybrid-128K")
    assert longer.training.seq_length == 131072
    assert longer.model.rope_theta == own.model.rope_theta == 500_000


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_called_what_its_file_is(name):
    training = experiment(name).training
    assert training.exp_name == name.rsplit("/", 1)[1]
    assert (training.load_part == "none") == ("/pretrain/" in name)


@pytest.mark.parametrize("name", STARTED)
def test_an_experiment_starts_from_the_parent_that_its_name_promises(name):
    training, parent = experiment(name).training, parent_by_name(name)
    assert (training.load_part, training.resume_exp_name) == ("params", parent.split("/")[2])
    assert parent in experiments()


@pytest.mark.parametrize("name", STARTED)
def test_the_parameters_of_the_parent_fit(name):
    own, parent = experiment(name).model, experiment(parent_by_name(name)).model
    shapes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "qk_norm",
        "pre_norm",
        "post_norm",
        "tie_word_embeddings",
    )
    assert {key: getattr(own, key) for key in shapes} == {
        key: getattr(parent, key) for key in shapes
    }
    if parent.prime:
        assert (own.prime, own.suffix_len) == (True, parent.suffix_len)
        assert own.width_policy == parent.width_policy


def test_a_warm_path_keeps_its_parents_width_and_a_path_from_scratch_is_narrow():
    warm = [name for name in STARTED if "-e2e-" in name and "-from-" in name]
    assert len(warm) == 3 * 14
    assert {experiment(name).model.width_policy for name in warm} == {"full"}
    scratch = experiment("760m/extension/ext-760m-e2e-32K").model
    bridge = experiment("760m/extension/ext-760m-e2e-32K-from-fa-bridge").model
    assert (scratch.intermediate_size, bridge.intermediate_size) == (3328, 4096)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_follows_its_steps(name):
    training = experiment(name).training
    outer = training.optimizer_outer
    assert outer.lr_decay_steps == training.total_steps
    assert outer.lr_warmup_steps == training.total_steps // 10
    # Prime MLPs that have not learned to learn yet begin with a tenth of the inner rate.
    green = "/extension/" not in name or name.endswith("-direct")
    rate = 0.1 if green and training.train_mode == "meta" else 1.0
    steps = training.total_steps // 10 if green else 0
    assert (training.ilr_init, training.ilr_warmup_steps) == (rate, steps)


@pytest.mark.parametrize(("suffix", "steps"), [("-5pct", 1450), ("", 2900), ("-20pct", 5800)])
def test_adaptation_takes_its_share_of_the_pretraining_steps(suffix, steps):
    name = f"760m/adapt/adapt-760m-e2e-8K-from-fa{suffix}"
    own = experiment(name).training
    parent = experiment("760m/pretrain/pretrain-760m-fa").training
    assert own.total_steps == steps
    for key in ("dataset_name", "seq_length", "global_batch_size"):
        assert getattr(own, key) == getattr(parent, key)
    assert own.optimizer_outer.lr == parent.optimizer_outer.lr / 2
    assert experiment(name, "size.pretrain_steps=100").training.total_steps == steps // 290
    assert experiment(name, "size.adapt_steps=7").training.total_steps == 7


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
        "builtin_bpe": "/d/builtin_bpe",
        "builtin_imported": f"/d/builtin_{config.model.name}",
        **{
            f"{corpus}_{tokens}": f"/d/{corpus}_{tokens}"
            for corpus in ("dclm", "books")
            for tokens in ("smollm2", "qwen2_5")
        },
        "prose_and_code": f"/d/prose_and_code_{config.model.name}",
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
