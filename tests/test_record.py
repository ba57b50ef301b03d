"""The run record: complete, valid after crashes, and free of secrets."""

import json
import sys
from datetime import datetime

import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from ttt.infra.plan_manifest import Gate, ManifestError, PlanManifest
from ttt.infra.record import (
    RecordError,
    RunRecord,
    is_run,
    masked,
    masked_arguments,
    read_run,
)

CONFIG = {
    "model": {"bos_token_id": 256, "rope_theta": 1e4},
    "training": {"wandb_key": "hush-hush", "spec_inner": ("**.prime.**",), "exp_name": "run"},
}


def started(folder) -> RunRecord:
    record = RunRecord(folder / "experiments" / "run")
    record.start(CONFIG, devices=["cpu"], data={"train": "abc"})
    return record


def test_a_started_run_says_what_runs_on_what(tmp_path):
    record = started(tmp_path)
    run = record.run()
    assert run["status"] == "running"
    (attempt,) = run["attempts"]
    assert attempt["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert attempt["versions"]["numpy"] == np.__version__
    assert attempt["hardware"]["devices"] == ["cpu"]
    assert attempt["data"] == {"train": "abc"}
    assert datetime.fromisoformat(attempt["started"]).utcoffset().total_seconds() == 0
    assert attempt["git"] == "not a checkout" or len(attempt["git"]["commit"]) == 40
    config = OmegaConf.load(record.folder / "config.yaml")
    assert config.model == CONFIG["model"]
    assert config.training.spec_inner == ["**.prime.**"]


def test_finishing_and_the_restore_account_belong_to_the_attempt(tmp_path):
    record = started(tmp_path)
    record.note(restored={"restored": ["a"], "initialised": []})
    record.finish("failed")
    run = record.run()
    assert run["status"] == run["attempts"][0]["status"] == "failed"
    assert run["attempts"][0]["restored"]["restored"] == ["a"]
    assert run["attempts"][0]["finished"] >= run["attempts"][0]["started"]


def test_reopening_keeps_the_id_and_the_earlier_attempts(tmp_path):
    first = started(tmp_path).run()
    second = started(tmp_path).run()
    assert second["id"] == first["id"]
    # The first never finished: it was killed.
    assert [attempt["status"] for attempt in second["attempts"]] == ["interrupted", "running"]
    assert second["attempts"][0]["started"] == first["attempts"][0]["started"]


def test_no_secret_reaches_the_disk(tmp_path, monkeypatch):
    argv = [
        "train",
        "training.wandb_key=hush-hush",
        "+x.api_token=hush-hush",
        "model.bos_token_id=3",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    record = started(tmp_path)
    for path in record.folder.iterdir():
        assert "hush-hush" not in path.read_text()
    command = record.run()["attempts"][0]["command"]
    assert command == [
        "train",
        "training.wandb_key=***",
        "+x.api_token=***",
        "model.bos_token_id=3",
    ]


def test_secrets_inside_a_dict_on_the_command_line_are_masked():
    (shown,) = masked_arguments(["+training={lr:1,wandb_key:hush-hush,with,commas}"])
    assert shown == "+training={lr:1,wandb_key:***}"


def test_masking_goes_by_name_and_leaves_numbers_and_empty_values():
    settings = {"key": "a", "API_TOKEN": "b", "my_secret_id": "c", "wandb_key": "", "max_token": 5}
    assert masked({"deep": settings}) == {
        "deep": {
            "key": "***",
            "API_TOKEN": "***",
            "my_secret_id": "***",
            "wandb_key": "",
            "max_token": 5,
        }
    }
    assert settings["key"] == "a"


def test_metrics_come_back_as_they_were_logged(tmp_path):
    record = started(tmp_path)
    record.log(1, loss=np.float32(0.5), lr=jnp.bfloat16(0.25), per_chunk=np.array([1.0, 2.0]))
    record.log(2, loss=float("nan"), grad_norm=np.float32("inf"), per_chunk=[-np.inf], note="x")
    first, second = record.metrics()
    assert first == {"step": 1, "loss": 0.5, "lr": 0.25, "per_chunk": [1.0, 2.0]}
    assert np.isnan(second["loss"])
    assert second["grad_norm"] == float("inf")
    assert second["per_chunk"] == [-float("inf")]
    assert second["note"] == "x"


def test_every_line_is_strict_json(tmp_path):
    record = started(tmp_path)
    record.log(1, loss=float("nan"), other=-float("inf"))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (record.folder / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "loss": "NaN",
        "other": "-Infinity",
    }


def test_resuming_leaves_neither_gaps_nor_doubles_nor_the_torn_line(tmp_path):
    record = started(tmp_path)
    for step in range(1, 6):
        record.log(step, loss=1.0 / step)
    path = record.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    assert [row["step"] for row in record.metrics()] == [1, 2, 3, 4, 5]
    record.truncate_after(3)
    record.log(4, loss=9.0)
    assert [row["step"] for row in record.metrics()] == [1, 2, 3, 4]
    assert record.metrics()[-1]["loss"] == 9.0
    record.truncate_after(0)
    assert record.metrics() == []


def test_a_damaged_line_is_named(tmp_path):
    record = started(tmp_path)
    (record.folder / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl, line 2 is not valid JSON"):
        record.metrics()


def test_a_run_without_metrics_has_none(tmp_path):
    assert RunRecord(tmp_path / "absent").metrics() == []
    assert not (tmp_path / "absent").exists()


def test_evaluation_arrays_and_summary_lie_side_by_side(tmp_path):
    record = started(tmp_path)
    path = record.save_arrays("val", 7, {"nll": np.arange(3.0)}, {"loss": np.float32("nan")})
    assert path == record.folder / "eval" / "val-7.npz"
    np.testing.assert_array_equal(np.load(path)["nll"], [0.0, 1.0, 2.0])
    assert json.loads(path.with_suffix(".json").read_text()) == {"loss": "NaN"}


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    record = started(tmp_path)
    before = record.run()
    with pytest.raises(TypeError):
        record.note(restored={"not": object()})
    with pytest.raises(RuntimeError, match="full"):
        record.save_arrays("val", 7, {"nll": _Unwritable()}, {})
    assert record.run() == before
    assert not (record.folder / "eval" / "val-7.npz").exists()


class _Unwritable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("disk full")


# ---- reading -----------------------------------------------------------------------------


def test_a_whole_record_is_read_as_it_was_written(tmp_path):
    record = started(tmp_path)
    record.log(3, loss=2.0)
    record.save_arrays("loss_by_position", 2, {"learning_nll": np.zeros(2)}, {"token_loss": 9.0})
    record.save_arrays("loss_by_position", 10, {"learning_nll": np.ones(2)}, {"token_loss": 2.5})
    record.finish("finished")
    stored = read_run(record.folder)
    assert (stored.status, stored.mode, stored.faults) == ("finished", "jax", ())
    assert stored.run == record.run()
    assert stored.settings["model"] == CONFIG["model"]
    assert stored.metrics == [{"step": 3, "loss": 2.0}]
    assert stored.summary == {"token_loss": 2.5}
    assert stored.arrays["learning_nll"].tolist() == [1.0, 1.0]
    assert record.last_step() == (3, 2.0)
    assert is_run(record.folder)


def test_what_is_missing_or_broken_is_empty_and_named(tmp_path):
    record = started(tmp_path)
    record.finish("finished")
    (record.folder / "config.yaml").write_text("a: [")
    stored = read_run(record.folder)
    assert (stored.settings, stored.metrics, stored.summary) == ({}, (), {})
    assert [fault.split()[0].rpartition("/")[2] for fault in stored.faults] == [
        "config.yaml",
        "metrics.jsonl",
        "loss_by_position-STEP.json",
    ]
    with pytest.raises(RecordError, match=r"config\.yaml cannot be read .*: move the folder away"):
        record.settings()
    assert read_run(tmp_path / "absent").status == "broken"
    assert RunRecord(tmp_path / "absent").last_step() == (0, None)


def test_a_record_from_before_a_setting_is_read_as_what_it_was(tmp_path):
    model = {"hidden_size": 16, "num_attention_heads": 2}  # as in records before `head_dim`
    record = RunRecord(tmp_path)
    record.start({"model": model, "training": {}}, devices=["cpu"], data={})
    since = {"num_key_value_heads": 2, "head_dim": 8, "layer_types": [], "attention_bias": False}
    since["rope_scaling"] = []
    assert record.settings()["model"] == model | since


@pytest.mark.parametrize("content", ["{", "[]", '{"attempts": []}', '{"attempts": [{}]}'])
def test_a_run_json_without_an_attempt_is_refused(tmp_path, content):
    record = started(tmp_path)
    (record.folder / "run.json").write_text(content)
    with pytest.raises(RecordError, match=r"run\.json .*: repair or delete it"):
        record.run()


def test_a_manifest_keeps_what_became_of_a_plan(tmp_path):
    head = {"registry": "r", "size": "tiny", "runtime_mode": "jax"}
    runs = [{"name": "a", "steps": 3, "overrides": ("x=1",)}, {"name": "b", "steps": 4}]
    paths = [{"path": "B1", "matching": "tokens", "seed": 0, "runs": ("a", "b")}]
    manifest = PlanManifest.open(tmp_path, {"paths": ["B1"]}, head)
    manifest.adopt(runs, paths)
    assert not manifest.path.exists()
    gate = Gate("finite loss", True, "all 3 losses")
    manifest.note("a", "finished", [gate])
    stored = PlanManifest.read(tmp_path)
    assert [run["status"] for run in stored.runs.values()] == ["finished", "pending"]
    assert Gate(**stored.runs["a"]["gates"][0]) == gate
    assert stored.paths == [{**paths[0], "runs": ["a", "b"]}]
    assert stored.seconds_per_token is None
    stored.adopt(runs, paths)  # the same once more keeps what is known
    assert stored.status("a") == "finished"
    with pytest.raises(ManifestError, match=r"(?s)a in .* other settings.*steps: 3 -> 5"):
        stored.adopt([{**runs[0], "steps": 5}], paths)
    with pytest.raises(ManifestError, match=r"(?s)other flags.*paths: \['B1'\] -> \['P1'\]"):
        PlanManifest.open(tmp_path, {"paths": ["P1"]}, head)


def test_a_manifest_that_is_none_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ManifestError, match=r"is missing: a plan writes it"):
        PlanManifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"runs": [{}], "paths": []}')
    with pytest.raises(ManifestError, match=r"is not a plan's manifest .*: move it away"):
        PlanManifest.read(tmp_path)
