"""scripts/01_config_inspect.py, as its user meets it."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "01_config_inspect.py"
E2E = "+experiment=125m/pretrain/pretrain-125m-e2e"


@pytest.fixture
def inspect(run_script):
    def run(*overrides, options=()):
        arguments = [part for text in overrides for part in ("--override", text)]
        return run_script(SCRIPT.name, *arguments, *options)

    return run


def test_all_numbers_are_shown_and_written(inspect, tmp_path):
    out = tmp_path / "costs.json"
    code, said = inspect(E2E, options=["--devices", 8, "--out", out])
    assert code == 0
    numbers = json.loads(out.read_text())
    assert numbers["tokens"]["per step"] == 64 * 8192
    assert numbers["parameters"]["total"] == pytest.approx(184e6, rel=0.01)
    assert numbers["FLOPs per token"]["of full attention"] > 1.2
    assert f"{numbers['parameters']['total']:,}" in said.out
    assert set(numbers) == {section for section in numbers if section in said.out}


def test_more_devices_need_less_memory_each(inspect, tmp_path):
    peaks = []
    for devices in (1, 8):
        out = tmp_path / f"{devices}.json"
        assert inspect(E2E, options=["--devices", devices, "--out", out])[0] == 0
        peaks.append(json.loads(out.read_text())["memory per device"]["peak"])
    assert peaks[1] < peaks[0]


def test_the_plan_tells_what_auto_means_there_and_what_would_fit(inspect, tmp_path):
    plans = []
    for gigabytes in (1000, 40):
        out = tmp_path / f"{gigabytes}.json"
        assert inspect(E2E, options=["--memory-gb", gigabytes, "--out", out])[0] == 0
        plans.append(json.loads(out.read_text())["plan"])
    roomy, tight = plans
    assert (roomy["fits"], tight["fits"]) == ("yes", "no")
    assert roomy["model.remat_prefix"] != tight["model.remat_prefix"]
    assert roomy["attention"] == "cudnn"
    change = next(name for name in tight if name.startswith("with training.accum_steps="))
    out = tmp_path / "changed.json"
    override = change.removeprefix("with ")
    assert inspect(E2E, override, options=["--memory-gb", 40, "--out", out])[0] == 0
    changed = json.loads(out.read_text())["plan"]
    assert (changed["fits"], changed["memory"]) == ("yes", tight[change])


def test_a_run_with_full_attention_is_not_compared_with_itself(inspect):
    code, said = inspect("+experiment=tiny/pretrain/pretrain-tiny-fa")
    assert code == 0
    assert "of full attention" not in said.out


def test_paths_that_lead_nowhere_are_numbers(inspect, tmp_path):
    code, said = inspect(
        "+experiment=tiny/pretrain/pretrain-tiny-e2e",
        "training.dataset_name=elsewhere",
        "deploy_paths.checkpoint=???",
        "deploy_paths.data.books3=${oc.env:NOBODY_SETS_THIS}",
        f"deploy_paths.experiments={tmp_path}",
    )
    assert code == 0
    assert said.out.count("unset") == 2
    assert "missing:" not in said.out
    code, said = inspect(E2E, f"deploy_paths.data.dclm_filter_8k={tmp_path / 'none'}")
    assert code == 0
    assert "missing:" in said.out


@pytest.mark.parametrize(
    ("overrides", "options", "said"),
    [
        ([], [], "no experiment named"),
        ([E2E, "training.seq_length=1000"], [], "seq_length=1000"),
        ([E2E], ["--devices", 3], "devices=3"),
        ([E2E], ["--memory-gb", -1], "memory_gb=-1"),
        ([E2E], ["--out", SCRIPT], "must be a new file"),
    ],
)
def test_a_users_mistake_exits_with_2(inspect, overrides, options, said):
    code, printed = inspect(*overrides, options=options)
    assert code == 2
    assert said in printed.err
    assert printed.out == ""
