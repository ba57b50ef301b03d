"""Plans of the ladder: registry, matching, gates, manifest; execution with a stub of `train`."""

import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from ttt.config import compose, config_dir
from ttt.errors import RunError, Stopped, UserError
from ttt.figures import short
from ttt.infra.lock import RunLock
from ttt.infra.record import StoredRun
from ttt.runs import execute, gates, matching, pilot, registry, settings
from ttt.runs.matching import Cost
from ttt.runs.plan import PlannedRun, PlanRequest, build, config_of
from ttt.runs.registry import Budget

BOOK = registry.load()
STUB = (sys.executable, str(Path(__file__).with_name("stub_train.py")))
SMALL = Budget(
    40, 4, 3, seq_length=64, extension_length=256, global_batch_size=4, window=64, chunk=8
)


# ---- registry ----------------------------------------------------------------------------


def test_a_paths_stages_follow_from_its_entry():
    tiny = BOOK.size("tiny")
    chains = {
        name: [(stage.experiment(tiny), stage.kind) for stage in BOOK.path(name).stages]
        for name in ("P3-20pct", "P2", "S1")
    }
    assert chains["P3-20pct"] == [
        ("tiny/pretrain/pretrain-tiny-swa", "pretrain-swa"),
        ("tiny/adapt/adapt-tiny-e2e-2K-from-swa-20pct", "adapt-e2e"),
        ("tiny/extension/ext-tiny-e2e-4K-from-swa-bridge-20pct", "extend-e2e-full"),
    ]
    assert chains["P2"][1:] == [
        ("tiny/extension/ext-tiny-e2e-4K-from-fa-direct", "extend-e2e-full")
    ]
    assert chains["S1"][1:] == [("tiny/extension/ext-tiny-swa-4K-from-fa", "extend-swa")]
    assert [stage.share for stage in BOOK.path("P3-20pct").stages] == [1, 2, 1]


@pytest.mark.parametrize("name", ["B1-5pct", "P2-5pct", "P1-0pct", "P9"])
def test_only_a_path_with_an_adaptation_has_shares(name):
    with pytest.raises(UserError, match=f"path '{name}': must be one of B1, B2"):
        BOOK.path(name)


@pytest.mark.parametrize(
    ("size", "paths"), [("tiny", (*BOOK.entries, "P1-5pct")), ("760m", ("B1", "P1"))]
)
def test_an_experiment_alone_says_all_that_its_stage_says(size, paths):
    own = BOOK.size(size)
    wanted = PlanRequest(BOOK, own, paths, (None,), Budget())
    plan = build(wanted, ["own"])
    stages = {stage: stage for path in paths for stage in BOOK.path(path).stages}
    for run, stage in zip(plan.runs, stages.values(), strict=True):
        config = config_of(run)
        assert run.overrides == ()
        assert (config.training.exp_name, config.training.resume_exp_name) == (
            run.name,
            run.parent or "",
        )
        method = "e2e" if config.model.prime else config.model.seq_modeling_block
        assert method == {"fa": "self_attention", "swa": "SWA", "e2e": "e2e"}[stage.method]


def edited(tmp_path, change) -> Path:
    content = OmegaConf.to_container(
        OmegaConf.load(config_dir() / "research" / "warmstart_registry.yaml")
    )
    change(content)
    path = tmp_path / "registry.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return path


FAULTS = {
    "unknown key": (
        lambda c: c["paths"]["P1"].update(parnet="fa"),
        "paths.P1.parnet: no such key; remove it; did you mean parent?",
    ),
    "unknown section": (lambda c: c.update(pathes={}), "the registry.pathes: no such key"),
    "missing key": (lambda c: c["paths"]["P1"].pop("method"), "paths.P1: lacks method"),
    "no path": (lambda c: c["paths"].update(P1="e2e"), "paths.P1=e2e: must be keys with values"),
    "unknown parent": (
        lambda c: c["paths"]["P1"].update(parent="gpt"),
        "paths.P1: needs the experiment tiny/pretrain/pretrain-tiny-gpt, which no file or rule",
    ),
    "adaptation to no learner": (
        lambda c: c["paths"]["S1"].update(adapt=True),
        "paths.S1: needs the experiment tiny/adapt/adapt-tiny-swa-2K-from-fa, which no",
    ),
    "context": (
        lambda c: c["sizes"]["tiny"].update(extension="3K"),
        "paths.B1: needs the experiment tiny/extension/ext-tiny-e2e-3K",
    ),
    "size": (lambda c: c["sizes"].update(huge={"extension": "8K"}), "sizes=huge: must be one of"),
    "reference": (lambda c: c.update(reference="B9"), "reference=B9: must be one of B1, B2"),
    "pilot": (
        lambda c: c["sizes"]["tiny"]["pilot"].update(steps=3),
        "sizes.tiny.pilot.steps: no such key",
    ),
    "pilot path": (
        lambda c: c["sizes"]["tiny"]["pilot"].update(paths=["P9"]),
        "sizes.tiny.pilot.paths=P9: must be one of",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_in_the_registry_is_told_with_its_remedy(tmp_path, what):
    change, told = FAULTS[what]
    with pytest.raises(UserError) as caught:
        registry.load(edited(tmp_path, change))
    assert told in str(caught.value)


def test_a_pilot_may_take_a_path_of_another_share(tmp_path):
    book = registry.load(
        edited(tmp_path, lambda c: c["sizes"]["tiny"]["pilot"].update(paths=["P1-20pct"]))
    )
    assert book.size("tiny").pilot({}).paths == ("P1-20pct",)


def test_all_faults_of_a_registry_are_told_at_once(tmp_path):
    def change(content):
        for what in ("unknown key", "pilot path", "reference"):
            FAULTS[what][0](content)

    with pytest.raises(UserError) as caught:
        registry.load(edited(tmp_path, change))
    assert {"  1.", "  2.", "  3."} <= {line[:4] for line in str(caught.value).splitlines()}


def test_what_follows_from_a_given_length_follows_it():
    given = BOOK.size("tiny").pilot({"seq_length": 256, "pretrain_steps": 90}).budget
    derived = (given.window, given.chunk, given.extension_length, given.adapt_steps)
    assert derived == (256, 32, 1024, 9)
    assert BOOK.size("tiny").pilot({"seq_length": 256, "extension_length": 512}).budget == replace(
        BOOK.size("tiny").pilot({"seq_length": 256}).budget, extension_length=512
    )


@pytest.mark.parametrize("value", [0, -3])
def test_a_budget_below_one_is_refused(value):
    with pytest.raises(UserError, match=f"pretrain_steps={value}: must be a whole number from 1"):
        BOOK.size("tiny").pilot({"pretrain_steps": value})


# ---- matching ----------------------------------------------------------------------------

B1 = [Cost("pretrain-e2e", 200, 8192), Cost("extend-e2e", 30, 16384)]
P1 = [
    Cost("pretrain-fa", 200, 8192),
    Cost("adapt-e2e", 20, 8192),
    Cost("extend-e2e", 30, 16384),
]


def test_token_matched_pretraining_gives_up_what_the_adaptation_takes():
    assert matching.pretrain_steps("P1", P1, B1) == 200 - 20
    assert matching.pretrain_steps("P2", [P1[0], P1[2]], B1) == 200


def test_wall_clock_matched_pretraining_gets_what_the_dear_stages_save():
    per_token = {"pretrain-e2e": 3.0, "extend-e2e": 3.0, "pretrain-fa": 1.0, "adapt-e2e": 3.0}
    assert matching.pretrain_steps("P1", P1, B1, per_token) == 3 * (200 - 20)
    cheap = {**per_token, "extend-e2e": 2.0}
    assert matching.pretrain_steps("P1", P1, B1, cheap) == 3 * (200 - 20)  # the same in both


@given(
    st.integers(1, 400),
    st.integers(0, 30),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.integers(1, 5000),
)
def test_matched_paths_cost_the_same_to_half_a_pretraining_step(n, a, slow, fast, tokens):
    per_token = {"pretrain-e2e": slow, "adapt-e2e": slow, "pretrain-fa": fast}
    reference = [Cost("pretrain-e2e", n, 8192)]
    path = [Cost("pretrain-fa", n, tokens), Cost("adapt-e2e", a, 8192)]
    target = sum(cost.total(per_token) for cost in reference)
    try:
        steps = matching.pretrain_steps("P", path, reference, per_token)
    except UserError:
        assert target - path[1].total(per_token) < 0.5 * path[0].of_a_step(per_token) * (1 + 1e-9)
        return
    cost = replaced(path[0], steps).total(per_token) + path[1].total(per_token)
    assert abs(cost - target) <= 0.5 * path[0].of_a_step(per_token) * (1 + 1e-9)


def replaced(cost: Cost, steps: int) -> Cost:
    return cost._replace(steps=steps)


def test_an_adaptation_as_long_as_the_pretraining_is_refused():
    with pytest.raises(UserError, match=r"path P1: .*something must be left to pretrain on"):
        matching.pretrain_steps("P1", [P1[0], replaced(P1[1], 200), P1[2]], B1)


def test_the_first_steps_and_evaluations_are_not_timed_and_runs_are_pooled():
    rows = [
        {"step": 0, "start_loss": 5.0},
        {"step": 1, "loss": 5.0, "step_seconds": 90.0},
        {"step": 2, "loss": 5.0, "step_seconds": 80.0},
        {"step": 2, "eval_loss": 5.0, "evaluation_seconds": 70.0},
        {"step": 3, "loss": 5.0, "step_seconds": 2.0},
        {"step": 4, "loss": 5.0, "step_seconds": 4.0},
    ]
    runs = [("pretrain-fa", "b", 2, rows), ("pretrain-fa", "a", 2, [*rows[:3], rows[5]])]
    assert matching.seconds_per_token(runs) == {
        "pretrain-fa": {"seconds": 2.0, "from": ["a", "b"], "steps": 3}
    }
    assert matching.seconds_per_token(runs[:1])["pretrain-fa"]["seconds"] == 1.5
    with pytest.raises(RunError, match="extend-fa: the records of c hold no timed step"):
        matching.seconds_per_token([("extend-fa", "c", 2, rows[:4])])


# ---- plans -------------------------------------------------------------------------------


def wanted(paths=("B1", "P1", "P2"), seeds=(0,), budget=SMALL) -> PlanRequest:
    return PlanRequest(BOOK, BOOK.size("tiny"), tuple(paths), tuple(seeds), budget)


def tokens_of(plan, path) -> int:
    tokens = {run.name: run.tokens for run in plan.runs}
    return sum(tokens[name] for name in path.runs)


def test_token_matched_paths_train_on_equally_many_tokens():
    plan = build(wanted(("P1", "P1-5pct", "P1-20pct", "S1")), ["tokens"])
    assert {tokens_of(plan, path) for path in plan.paths} == {40 * 256 + 3 * 512}
    steps = {run.name: run.steps for run in plan.runs}
    assert steps["adapt-tiny-e2e-64-from-fa-5pct-after38-seed0"] == 2
    assert steps["pretrain-tiny-fa-steps32-seed0"] == 32  # before the 20 % adaptation


def test_runs_come_after_their_parents_and_equal_ones_are_shared():
    plan = build(wanted(("B2", "P1", "P2", "S1"), (0, 1)), ["tokens"])
    names = [run.name for run in plan.runs]
    assert len(names) == len(set(names)) == 2 * 9
    assert names[0] == "pretrain-tiny-e2e-seed0"  # the reference, though it was not asked for
    for run in plan.runs:
        assert run.parent is None or names.index(run.parent) < names.index(run.name)
    pretraining = {path.path: path.runs[0] for path in plan.paths if path.seed == 1}
    assert pretraining == {
        "B1": "pretrain-tiny-e2e-seed1",
        **dict.fromkeys(("B2", "P2", "S1"), "pretrain-tiny-fa-seed1"),
        "P1": "pretrain-tiny-fa-steps36-seed1",
    }


def test_a_planned_run_composes_to_its_name_seed_parent_and_lengths():
    plan = build(wanted(("P1",), (3,)), ["tokens"])
    runs = {run.stage: run for run in plan.runs[2:]}
    configs = {stage: config_of(run) for stage, run in runs.items()}
    for stage, config in configs.items():
        assert config.training.exp_name == runs[stage].name
        assert config.training.resume_exp_name == (runs[stage].parent or "")
        assert config.training.model_seed == 3
        assert config.model.intermediate_size == 256
    assert configs["extend"].training.seq_length == 256
    assert configs["extend"].training.global_batch_size == 2
    assert (configs["adapt"].model.sliding_window_size, configs["adapt"].model.mini_batch_size) == (
        64,
        8,
    )
    # pretraining and adaptation read one corpus at one length: not in the same order
    assert configs["pretrain"].training.data_seed != configs["adapt"].training.data_seed
    assert shlex.split(runs["adapt"].command)[:3] == ["uv", "run", "train"]


def test_wall_clock_matched_runs_have_their_own_names_beside_the_token_matched():
    per_token = dict.fromkeys(("pretrain-e2e", "extend-e2e", "extend-e2e-full", "adapt-e2e"), 4.0)
    plan = build(
        wanted(("B1", "P1")),
        ["tokens", "wall_clock"],
        {**per_token, "pretrain-fa": 1.0},
    )
    chains = {(path.path, path.matching): path.runs for path in plan.paths}
    assert chains["B1", "tokens"] == chains["B1", "wall_clock"]
    assert chains["P1", "wall_clock"] == (
        "pretrain-tiny-fa-steps144-seed0",
        "adapt-tiny-e2e-64-from-fa-after144-seed0",
        "ext-tiny-e2e-256-from-fa-bridge-after144-seed0",
    )
    assert len(plan.runs) == 2 + 3 + 3


def test_two_settings_under_one_name_are_refused(monkeypatch):
    lengths = count(11)
    training = SimpleNamespace(seq_length=64, global_batch_size=4)

    def longer_each_time(experiment, overrides):
        training.total_steps = next(lengths)
        return training

    monkeypatch.setattr("ttt.runs.plan.training_of", longer_each_time)
    with pytest.raises(UserError, match=r"two runs of the plan would have this name"):
        build(wanted(("B2", "P2")), ["own"])


@pytest.mark.parametrize(
    "text",
    [
        "training.total_steps=3",
        "++training.exp_name=a",
        "size.pretrain_steps=7",
        "model=125m",
        "~training.data_seed",
        "training.wandb_key=SECRET",
        "nonsense",
    ],
)
def test_an_override_that_the_plan_decides_is_refused_and_no_secret_shown(text):
    with pytest.raises(UserError) as caught:
        settings.check_override(text)
    assert "SECRET" not in str(caught.value)
    for fine in ("training.eval_batches=2", "size.adapt_lr=1e-3", "+deploy_paths.data.x=y"):
        settings.check_override(fine)


@pytest.mark.parametrize(
    "text",
    [
        "/a/b-c.d",
        "a b",
        "it's",
        "a,b=c",
        "x\\",
        "a'\\",
        "${oc.env:HOME}",
        "12",
        "true",
        "",
        "~/é[1]",
    ],
)
def test_a_path_reaches_the_config_as_it_was_written(text):
    written = settings.override("deploy_paths.checkpoint", text)
    assert compose(shlex.split(shlex.join([written]))).deploy_paths.checkpoint == text


def test_contexts_are_written_as_in_names():
    assert [short(n) for n in (512, 1000, 2048, 131072)] == ["512", "1000", "2K", "128K"]


def test_tiny_reads_other_corpora_only_where_it_is_told_where_they_are():
    tiny = BOOK.size("tiny")
    assert settings.of_data({}, tiny) == ()
    assert settings.of_data({"data_root": "/d"}, tiny) == (
        "deploy_paths.data.builtin_bpe=/d/builtin_bpe",
    )
    assert settings.of_data({"dclm_root": "/x"}, tiny) == (
        "deploy_paths.data.dclm_filter_8k=/x",
        "size.pretrain_dataset=dclm_filter_8k",
    )
    assert settings.of_data({"data_root": "/d"}, BOOK.size("125m")) == (
        "deploy_paths.data.dclm_filter_8k=/d/dclm_filter_8k",
        "deploy_paths.data.books3=/d/books3",
    )
    with pytest.raises(UserError, match="give one or the other"):
        settings.of_data({"data_root": "/d", "books_root": "/x"}, tiny)


def test_wall_clock_matching_needs_runs_to_measure():
    with pytest.raises(UserError, match="write --matching tokens,wall_clock"):
        settings.matchings("wall_clock", "jax")
    with pytest.raises(UserError, match="no network whose steps could be timed"):
        settings.matchings("tokens,wall_clock", "simulate")
    assert settings.matchings("tokens,wall_clock", "jax") == ("tokens", "wall_clock")


# ---- gates -------------------------------------------------------------------------------

CHILD = PlannedRun(
    name="child",
    experiment="tiny/x/child",
    stage="adapt",
    method="e2e",
    kind="adapt-e2e",
    parent="mother",
    parent_method="fa",
    seed=0,
    steps=4,
    seq_length=64,
    global_batch_size=4,
    overrides=(),
)
ACCOUNT = {
    "from": "/c/f/mother/9",
    "part": "params",
    "restored": ["language_model.model.wte.weight"],
    "initialised": ["language_model.model.h.prime_storage.feed_forward_prime.w1.weight"],
    "narrowed": [],
    "unused": [],
}
START = {"warm_loss": 3.00005, "parent_loss": 3.0, "preserving": True, "why": ""}


def evidence(mode="jax", dtype="fp32", account=ACCOUNT, start=START, metrics=None, **changes):
    metrics = metrics or [{"step": 1, "loss": 3.0}, {"step": 2, "final_eval_loss": 2.9}]
    settings = {
        "training": {"runtime_mode": mode},
        "model": {"compute_dtype": dtype, "vocab_size": 258},
    }
    began = {
        "restored": account and {**account, **changes},
        "start": start,
    }
    own = {"restored": {"part": "all", "from": "/c/f/child/2", "restored": ["a"]}, "start": None}
    return StoredRun(Path("child"), {"attempts": [began, own]}, settings, metrics)


def test_gates_hold_for_a_sound_warm_start_that_was_interrupted_once():
    assert [gate.holds for gate in gates.check(CHILD, evidence())] == [True, True, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["loss", "final_eval_loss", "eval_loss"])
def test_a_loss_that_is_not_finite_is_seen(key, value):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, key: value}]
    gate = gates.finite_loss(evidence(metrics=rows))
    assert gate.holds is False
    assert f"{key} {value} at step 2" in gate.said
    assert gates.finite_loss(evidence(metrics=[{"step": 1, "x": 1.0}])).holds is False


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"unused": ["a.b"]}, "unused: a.b"),
        ({"initialised": ["language_model.model.h.blocks.feed_forward.w1.weight"]}, "random: "),
        ({"initialised": []}, "no prime MLP is new"),
        ({"from": "/c/f/stranger/9"}, "not from mother"),
        ({"part": "all"}, "part all"),
        ({"restored": []}, "0 restored parameters"),
    ],
)
def test_an_incomplete_restore_is_seen(changes, told):
    gate = gates.restore_account(CHILD, evidence(**changes))
    assert gate.holds is False
    assert told in gate.said


def test_a_static_mlp_may_be_new_only_where_its_weights_serve_as_the_prime_one():
    static = "language_model.model.h.blocks.feed_forward.w1.weight[-1:]"
    prime = "language_model.model.h.prime_storage.feed_forward_prime.w1.weight"
    told = evidence(initialised=[static], moved=[f"{static} -> {prime}"])
    assert gates.restore_account(CHILD, told).holds is True
    other = static.replace("w1", "w2")
    told = evidence(initialised=[static, other], moved=[f"{static} -> {prime}"])
    assert f"random: {other}" in gates.restore_account(CHILD, told).said


def test_a_child_of_a_learning_parent_may_have_nothing_new():
    grandchild = replace(CHILD, parent_method="e2e")
    assert gates.restore_account(grandchild, evidence()).holds is False
    assert gates.restore_account(grandchild, evidence(initialised=[])).holds is True


@pytest.mark.parametrize(
    ("dtype", "distance", "holds"),
    [("fp32", 9e-5, True), ("fp32", 2e-4, False), ("bf16", 4e-3, True), ("bf16", 6e-3, False)],
)
def test_a_preserving_start_must_be_at_the_parents_loss(dtype, distance, holds):
    start = {**START, "warm_loss": 3.0 - distance}
    assert gates.warm_start(CHILD, evidence(dtype=dtype, start=start)).holds is holds


@pytest.mark.parametrize(("loss", "holds"), [(4.0, True), (4.5, False), (5.55, False)])
def test_a_narrowed_start_must_be_nearer_to_the_parent_than_to_ignorance(loss, holds):
    start = {**START, "warm_loss": loss, "preserving": False}
    gate = gates.warm_start(CHILD, evidence(start=start, narrowed=["w1"]))
    assert gate.holds is holds
    assert "ln V 5.55" in gate.said


def test_what_does_not_apply_is_said_and_never_passed():
    orphan = replace(CHILD, parent=None, parent_method=None)
    for run, found in (
        (orphan, evidence()),
        (CHILD, evidence("token_stats", account=None)),
        (CHILD, evidence("simulate", account=None)),
    ):
        for gate in (gates.restore_account(run, found), gates.warm_start(run, found)):
            assert gate.holds is None
            assert "not applicable" in gate.said
    assert gates.finite_loss(evidence("simulate")).holds is None
    changing = {**START, "preserving": False, "why": "narrow"}
    assert gates.warm_start(CHILD, evidence(start=changing)).holds is None


def test_a_warm_start_without_evidence_does_not_pass():
    assert gates.warm_start(CHILD, evidence(start=None)).holds is False
    missing = {**START, "parent_loss": None}
    assert gates.warm_start(CHILD, evidence(start=missing)).holds is False
    assert gates.restore_account(CHILD, evidence(account=None)).holds is False


# ---- manifest and execution --------------------------------------------------------------


SHORT = {
    "size": "tiny",
    "runtime_mode": "jax",
    "paths": "B1",
    "seeds": "0",
    "matching": "tokens",
    "exp_folder": "f",
    "pretrain_steps": 6,
    "adapt_steps": 2,
    "extension_steps": 3,
    "seq_length": 64,
    "global_batch_size": 4,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture
def ladder(place, monkeypatch):
    """A pilot of few small runs in one empty place, with the stub for `train`.

    The place is the same for all tests, and so are the compositions that the package remembers.
    """
    for entry in place.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    monkeypatch.setenv("STUB_CALLS", str(place / "calls"))
    monkeypatch.setenv("STUB_READY", str(place / "ready"))
    (place / "calls").touch()

    def run(stub="", **flags):
        monkeypatch.setenv("STUB", stub)
        said = StringIO()
        given = {
            **SHORT,
            "exp_dir": str(place / "e"),
            "data_root": str(place / "d"),
            **flags,
        }
        try:
            prepared = pilot.prepare(given)
            if given.get("dry_run"):
                pilot.show(prepared, Console(file=said))
            else:
                execute.run(prepared, Console(file=said), train=STUB)
        finally:
            run.said = said.getvalue()
        return run.said

    run.folder = place / "e" / "f"
    run.manifest = lambda: json.loads((run.folder / "manifest.json").read_text())
    run.calls = lambda: (place / "calls").read_text().split()
    run.ready = place / "ready"
    return run


def test_a_ladder_runs_in_order_measures_matches_and_is_not_run_again(ladder):
    asked = {"paths": "B1,P1", "matching": "tokens,wall_clock", "adapt_steps": 3}
    ladder(**asked)
    manifest = ladder.manifest()
    names = [run["name"] for run in manifest["runs"]]
    assert ladder.calls() == names
    assert len(names) == 2 + 3 + 3
    assert {run["status"] for run in manifest["runs"]} == {"finished"}
    assert {gate["holds"] for run in manifest["runs"] for gate in run["gates"]} == {True, None}
    # the stub's e2e tokens cost 4 times the others: 4 x (6 - 3) steps, all else being equal
    assert manifest["seconds_per_token"]["adapt-e2e"]["seconds"] == pytest.approx(4e-3)
    wall_clock = next(
        p for p in manifest["paths"] if p["path"] == "P1" and p["matching"] == "wall_clock"
    )
    assert wall_clock["runs"][0] == "pretrain-tiny-fa-steps12-seed0"
    assert (ladder.folder / "logs" / f"{names[0]}.log").read_text().startswith("$ uv run train ")

    ladder(**asked)
    assert ladder.calls() == names
    assert ladder.manifest() == manifest
    with pytest.raises(UserError, match=r"(?s)extension_steps: 3 -> 4.*another --exp-folder"):
        ladder(**asked, extension_steps=4)


def test_a_stage_too_short_to_be_timed_is_refused_before_the_first_run(ladder):
    with pytest.raises(UserError, match="adapt-tiny-e2e-64-from-fa-after4-seed0 has 2 steps"):
        ladder(paths="B1,P1", matching="tokens,wall_clock", adapt_steps=2)
    assert ladder.calls() == []


def test_a_failed_run_stops_the_ladder_which_goes_on_from_there(ladder):
    with pytest.raises(RunError) as caught:
        ladder("fail pretrain-tiny-e2e-seed0")
    assert "error: the disk is full" in str(caught.value)
    assert str(ladder.folder / "logs" / "pretrain-tiny-e2e-seed0.log") in str(caught.value)
    assert [run["status"] for run in ladder.manifest()["runs"]] == ["failed", "pending"]
    ladder()
    assert [run["status"] for run in ladder.manifest()["runs"]] == ["finished"] * 2
    assert ladder.calls() == ["pretrain-tiny-e2e-seed0"] * 2 + ["ext-tiny-e2e-256-seed0"]
    (ladder.folder / "pretrain-tiny-e2e-seed0" / "run.json").unlink()
    with pytest.raises(UserError, match="the manifest says finished, but there is no record"):
        ladder()


@pytest.mark.parametrize(
    ("stub", "gate"),
    [("nan pretrain-tiny-e2e-seed0", "finite loss"), ("cold ext-tiny-e2e-256-seed0", "warm start")],
)
def test_a_gate_that_does_not_hold_stops_the_ladder_and_holds_it_up_again(ladder, stub, gate):
    for _ in range(2):
        with pytest.raises(RunError, match=f"the gate '{gate}' does not hold"):
            ladder(stub)
    verdicts = [g for run in ladder.manifest()["runs"] for g in run["gates"] if g["name"] == gate]
    assert verdicts[-1]["holds"] is False
    assert len(ladder.calls()) == len(set(ladder.calls()))  # the second call trained nothing


def test_exit_code_0_without_a_finished_record_is_a_failure(ladder):
    with pytest.raises(RunError, match="exit code 0, its record says running"):
        ladder("lie pretrain-tiny-e2e-seed0")


def test_runs_of_another_plan_are_refused_or_accepted_when_told_so(ladder):
    ladder()
    (ladder.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has a record \(finished\), but not of this plan"):
        ladder()
    assert not (ladder.folder / "manifest.json").exists()
    with pytest.raises(UserError, match=r"of other settings: .*training\.total_steps 6 -> 7"):
        ladder(skip_existing=True, pretrain_steps=7)
    ladder(skip_existing=True)
    assert len(ladder.calls()) == 2
    assert [run["status"] for run in ladder.manifest()["runs"]] == ["finished"] * 2


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_reaches_the_run_and_the_ladder_can_go_on(ladder, number, raised):
    def ask():
        while not ladder.ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(raised):
        ladder("sleep pretrain-tiny-e2e-seed0")
    thread.join()
    assert ladder.manifest()["runs"][0]["status"] == "interrupted"
    record = json.loads((ladder.folder / "pretrain-tiny-e2e-seed0" / "run.json").read_text())
    assert record["status"] == "interrupted"  # it was asked, not killed


def test_two_ladders_do_not_share_a_folder(ladder):
    ladder.folder.mkdir(parents=True)
    with RunLock(ladder.folder) as lock:
        lock.make()
        with pytest.raises(UserError, match=r"another run works in .* choose another --exp-folder"):
            ladder()
    assert ladder.calls() == []


def test_a_dry_run_shows_and_writes_nothing(ladder, place):
    said = ladder(paths="B1,P1", dry_run=True)
    assert said.count("uv run train +experiment=tiny/") == 5
    assert [path.name for path in place.iterdir()] == ["calls"]


def test_a_missing_store_is_told_before_the_first_run_and_can_be_made(ladder, place, monkeypatch):
    monkeypatch.chdir(place)  # the built-in text would be made in ./data, in a minute
    made = []
    monkeypatch.setattr(pilot.first_use, "ensure", lambda name, root: made.append(name))
    with pytest.raises(UserError, match="No token store at"):
        ladder(dclm_root=str(place / "x"), data_root=None)
    assert ladder.calls() == []
    with pytest.raises(RunError):
        ladder(
            "fail pretrain-tiny-e2e-seed0",
            dclm_root=str(place / "x"),
            data_root=None,
            bootstrap_token_data=True,
        )
    assert "RANDOM TOKENS" in ladder.said
    assert (place / "x").is_dir()
    assert made == ["builtin_bpe"]
    assert len(ladder.calls()) == 1
