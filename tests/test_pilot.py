"""The ladder for real: script 06 trains with the command `train`, script 05 reads what it left."""

import json
import sysconfig
from pathlib import Path

import pytest

from ttt.dataloader import builtin


@pytest.mark.slow
def test_a_pilot_trains_is_reported_and_is_not_trained_again(run_script, tmp_path, monkeypatch):
    monkeypatch.delenv("TTT_EXPERIMENTS", raising=False)
    library = Path(sysconfig.get_path("stdlib")) / "asyncio"
    few = {f"python/{path.name}": path for path in library.glob("*.py")}
    monkeypatch.setattr(builtin, "_modules", lambda: few)
    root, pilot = tmp_path / "experiments", "06_phase1_pilot.py"
    flags = {
        "exp-dir": root,
        "exp-folder": "counts",
        "data-root": tmp_path / "data",
        "checkpoint-root": tmp_path / "checkpoints",
        "runtime-mode": "token_stats",
        "paths": "B1",
        "seeds": 0,
        "matching": "tokens",
        "pretrain-steps": 4,
        "adapt-steps": 1,
        "ext-steps": 2,
        "seq-length": 64,
        "global-batch-size": 4,
    }
    asked = [f"--{name}={value}" for name, value in flags.items()] + ["--bootstrap-token-data"]
    code, said = run_script(pilot, *asked)
    assert code == 0, said.out + said.err
    assert f"report: {root / 'counts' / 'report' / 'report.md'}" in said.out
    assert (root / "counts" / "report" / "report.json").is_file()
    assert (tmp_path / "data" / "builtin_bpe").is_dir()

    monkeypatch.setenv("TTT_EXPERIMENTS", str(root))
    code, said = run_script("05_phase1_report.py", "--format", "json")
    assert (code, said.err.count("broken")) == (0, 0)
    (report,) = json.loads(said.out)
    first, second = report["runs"]
    assert first["exp_folder"] == second["exp_folder"] == "counts"
    assert [run["status"] for run in (first, second)] == ["finished"] * 2
    assert [run["stage"] for run in (first, second)] == ["pretrain", "extend"]
    assert [run["method"] for run in (first, second)] == ["e2e", "e2e"]
    assert (first["tokens"], second["tokens"]) == (4 * 4 * 64, 2 * 2 * 256)
    assert (first["restore"], second["restore"]) == ("not attempted", "restored")
    assert second["parent"] == f"{first['name']}/4"
    assert second["checkpoint"] == str(tmp_path / "checkpoints/counts" / second["name"] / "2")
    # A count is what it was when it is read by its child, and knows more than nothing in the end.
    assert second["warm_loss"] == second["parent_loss"]
    assert second["validation_loss"] < second["start_loss"] < first["start_loss"]
    assert all(0 < run["device_hours"] <= run["wall_hours"] for run in (first, second))
    (compared,) = report["comparisons"]
    assert compared["tokens"] == first["tokens"] + second["tokens"]
    assert compared["loss"]["mean"] == second["validation_loss"]
    assert "trained no network" in compared["problems"][0]
    records = {path: path.read_bytes() for path in root.rglob("run.json")}

    code, said = run_script(pilot, *asked)
    assert (code, "2 of 2 runs are finished already" in said.out) == (0, True)
    assert {path: path.read_bytes() for path in root.rglob("run.json")} == records
