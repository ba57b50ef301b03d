"""The report: what run records and a manifest tell, in numbers that are known beforehand."""

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import ladder
import numpy as np
import pandas as pd
import pytest
from ladder import FLOOR, WIGGLE, Made, amend, write_run

from ttt.errors import UserError
from ttt.figures import duration
from ttt.intervals import nested, student
from ttt.report import compare, curves, frame, phase1, pictures, tables, verdict
from ttt.report.compare import Estimate

SCRIPT = Path(__file__).parents[1] / "scripts" / "05_phase1_report.py"
T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with 2 degrees of freedom


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished ladder: three seeds, six paths, both matchings."""
    root = tmp_path_factory.mktemp("whole")
    ladder.write(root, *ladder.ladder())
    return root


@pytest.fixture(scope="module")
def report(whole):
    return phase1.read(whole, "ladder")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two seeds, B1 and P1 only, to be copied and damaged."""
    root = tmp_path_factory.mktemp("small")
    runs, paths = small_ladder()
    ladder.write(root, runs, paths)
    return root


def small_ladder():
    runs, paths = ladder.ladder(seeds=2, matchings=("tokens",))
    paths = [path for path in paths if path["path"] in ("B1", "P1")]
    return {name: runs[name] for path in paths for name in path["runs"]}, paths


@pytest.fixture
def copied(small, tmp_path):
    shutil.copytree(small / "ladder", tmp_path / "ladder")
    return tmp_path


def one(report, path, matching="tokens"):
    rows = frame.rows_of(report.comparisons)
    (found,) = [c for c in rows if (c.path, c.matching) == (path, matching)]
    return found


def named(report, start):
    return next(run for run in frame.rows_of(report.runs) if run.name.startswith(start))


def stages_of(report, path):
    rows = frame.rows_of(report.stages)
    return [s for s in rows if (s.path, s.matching) == (path, "tokens")]


def judged(report, path):
    return next(v for v in report.verdicts if v.path == path)


# ---- numbers ---------------------------------------------------------------------------


def test_student_interval_is_the_textbooks():
    found = student(np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]))
    half = T_2 * math.sqrt(7.0) / math.sqrt(3)  # variance of 1, 2, 6 is 7
    assert found.value == pytest.approx([3.0, 5.0])
    assert found.high - found.value == pytest.approx([half, 0.0])
    assert np.isnan(student(np.array([1.0])).low)


def test_delta_is_paired_by_seed_with_a_t_interval(report):
    for path in ("P1", "P2", "B2"):
        delta = one(report, path).delta
        each = np.array([FLOOR[path] - FLOOR["B1"] + WIGGLE[seed] for seed in range(3)])
        half = T_2 * each.std(ddof=1) / math.sqrt(3)
        assert (delta.mean, delta.n) == (pytest.approx(each.mean()), 3)
        assert (delta.low, delta.high) == (
            pytest.approx(each.mean() - half),
            pytest.approx(each.mean() + half),
        )
    # The seeds' own spread, which pairing takes out, is far wider.
    assert one(report, "P1").loss.high - one(report, "P1").loss.low > 0.09
    assert delta.high - delta.low < 0.006


def test_savings_are_those_of_the_steps(report):
    seconds = {"B1": 40 * 3 + 10 * 6, "P1": 36 * 1 + 4 * 3 + 10 * 6, "S1": 40 * 1 + 10 * 2.4}
    for path in ("P1", "S1"):
        found = one(report, path)
        assert found.saving.mean == pytest.approx(1 - seconds[path] / seconds["B1"])
        assert found.step_hours == pytest.approx(seconds[path] / 3600)
    waits_and_saves = 0.01 * 50 + 3 * 0.5
    in_all = (seconds["P1"] + waits_and_saves) / 3600
    assert one(report, "P1").device_hours == pytest.approx(in_all)
    assert one(report, "P1", "wall_clock").saving.mean == pytest.approx(0, abs=0.01)
    tokens = 2 * 64 * 40 + 2 * 128 * 10
    assert one(report, "P1").tokens == one(report, "B1").tokens == tokens
    assert one(report, "P1", "wall_clock").tokens > 2 * tokens


def with_documents(number: int):
    """Two paths and two seeds, the final losses of some of whose runs are known by document."""

    def change(runs):
        for made in list(runs.values())[:number]:
            made.documents = 40

    return change


def test_losses_known_by_document_have_intervals_over_seeds_and_documents(tmp_path, report):
    found = one(spoiled(tmp_path, with_documents(99)), "P1")
    runs = {made.name: made for made in small_ladder()[0].values()}
    ends = [[run for name, run in runs.items() if name.startswith(f"ext-{path}-")] for path in
            ("P1", "B1")]  # fmt: skip
    arrays = [[ladder.by_document(replace(run, documents=40), np.zeros(128)) for run in path]
              for path in ends]  # fmt: skip
    nll = np.array([[one["learning_document_nll"].sum(axis=1) for one in path] for path in arrays])
    expected = nested(nll[0] - nll[1], arrays[0][0]["learning_document_count"].sum(axis=1))
    assert found.delta[:3] == pytest.approx(tuple(map(float, expected)))
    assert (found.delta.n, found.delta.documents) == (2, 40)
    assert found.loss.documents == 40
    over_seeds = student(np.array([FLOOR["P1"] - FLOOR["B1"] + WIGGLE[seed] for seed in (0, 1)]))
    assert found.delta.mean == pytest.approx(float(over_seeds.value))
    assert found.delta.high > over_seeds.high + 1e-6
    assert one(report, "P1").delta.documents == 0  # older records


def test_the_page_says_what_its_intervals_are_over(tmp_path):
    report = spoiled(tmp_path, with_documents(99))
    assert any("(2 seeds and 40 documents)" in line for line in judged(report, "P1").evidence)
    assert "| 2 of 2 | 40 |" in tables.to_markdown(report)
    assert {curve.over for curve in report.positions} == {"seeds and documents"}


def test_where_one_record_lacks_documents_the_interval_is_over_seeds_alone(tmp_path, report):
    half = spoiled(tmp_path, with_documents(5))
    assert one(half, "P1").delta.documents == 0
    assert {curve.over for curve in report.positions} == {"seeds"}


def test_stages_tell_where_they_start_and_what_the_next_starts_from(report):
    first, adapt, last = stages_of(report, "P1")
    assert (first.stage, adapt.stage, last.stage) == ("pretrain", "adapt", "extend")
    assert first.validation_loss == pytest.approx(adapt.start_loss)
    assert adapt.next_start_loss == pytest.approx(last.start_loss)
    assert adapt.warm_loss == adapt.parent_loss
    assert last.validation_loss == pytest.approx(one(report, "P1").loss.mean)
    assert np.isnan([first.parent_loss, last.next_start_loss]).all()


def test_time_to_b1s_loss_lies_between_the_budgets_around_it(report):
    def at(matching, hours, loss, path="P1"):
        changes = {"step_hours": hours, "loss": Estimate(loss, None, None, 1)}
        return one(report, path, matching)._asdict() | changes

    def reached(*rows):
        table = compare.reaches(pd.DataFrame(rows))
        return *frame.rows_of(table), table

    b1 = at("tokens", 10.0, 2.0, "B1")
    found, table = reached(b1, at("tokens", 4.0, 2.1), at("wall_clock", 9.0, 1.9))
    assert found.hours == pytest.approx(6.0)  # the middle, in the logarithm, of 4 and 9
    assert found.of_reference == pytest.approx(0.6)
    assert "| 6 h | 0.60 |" in tables.to_markdown(replace(report, reaches=table))
    never, _ = reached(b1, at("tokens", 4.0, 2.3), at("wall_clock", 9.0, 2.1))
    assert np.isnan(never.hours)
    assert "0.1000 nats above it at 0.90 of its time" in never.said
    always, _ = reached(b1, at("tokens", 4.0, 1.9))
    assert "reached within the least budget, 0.40 of its time" in always.said


def test_durations_are_told_in_the_unit_that_suits_them():
    told = {0.01: "36 s", 0.5: "30 min", 2.5: "2.5 h", 1234.5: "1,234 h", None: "–", 0.0: "0 s"}
    assert {hours: duration(hours) for hours in told} == told


def test_a_row_has_every_fact_of_its_run(report):
    run = named(report, "ext-P1-from-adapt-P1-from-pretrain-fa-36-s1")
    assert (run.stage, run.method, run.seed) == ("extend", "e2e", 1)
    assert (run.runtime_mode, run.train_mode) == ("jax", "meta")
    assert (run.context, run.batch, run.steps, run.steps_asked) == (128, 2, 10, 10)
    assert run.tokens == 2 * 128 * 10
    assert run.validation_loss == pytest.approx(FLOOR["P1"] + 0.02 + WIGGLE[1])
    assert run.validation_loss_without_learning == pytest.approx(run.validation_loss + 0.1)
    assert run.tokens_per_second == pytest.approx(2 * 128 / 6.0)
    assert run.compile_hours == pytest.approx(7 / 3600)
    assert run.device_hours == pytest.approx((60 + 0.1 + 0.5) / 3600)
    assert run.parameters == 9792
    adapt = named(report, "adapt-P1")
    assert (adapt.restore, adapt.restored, adapt.initialised) == ("initialised", 3, 1)
    assert tables.restore(adapt) == "3 restored, 1 initialised, 1 moved"
    assert adapt.parent == "pretrain-fa-36-s0/36"
    assert named(report, "pretrain").restore == "not attempted"


def test_no_cell_is_empty_without_a_reason(report):
    for run in frame.rows_of(report.runs):
        told = {text.split(":")[0] for text in run.missing}
        assert told == {name for name in frame.COLUMNS if getattr(run, name) is None}


def test_loss_by_position_has_the_records_means_and_differences(report):
    (p1,) = [c for c in report.positions if (c.path, c.matching) == ("P1", "tokens")]
    assert p1.difference.value == pytest.approx(one(report, "P1").delta.mean)
    weights = np.diff(p1.edges)
    assert np.average(p1.loss.value, weights=weights) == pytest.approx(FLOOR["P1"] + 0.02)
    (b1,) = [c for c in report.positions if (c.path, c.matching) == ("B1", "tokens")]
    assert b1.difference is None


def test_cost_curves_run_on_along_the_path(report):
    (p1,) = [c for c in report.costs if (c.path, c.matching) == ("P1", "tokens")]
    assert p1.loss.shape == (3, curves.POINTS)
    for x in (p1.tokens.ravel(), p1.hours.ravel()):
        assert np.all(np.diff(x) > 0)
    tokens, hours, last = p1.ends[-1]
    assert (tokens, hours) == (one(report, "P1").tokens, one(report, "P1").device_hours)
    assert last == one(report, "P1").loss


def test_smoothing_keeps_a_straight_line_and_tames_noise():
    line = np.linspace(3.0, 1.0, 201)
    assert curves.smoothed(line) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=2000)
    assert curves.smoothed(noise)[100:-100].std() < 0.2


# ---- the gate --------------------------------------------------------------------------


def test_gate_holds_where_loss_and_time_are_sure(report):
    assert report.verdict.answer == verdict.HOLDS
    assert judged(report, "P1").answer == judged(report, "P3").answer == verdict.HOLDS
    assert judged(report, "P2").answer == verdict.FAILS
    assert any("+0.0300 [+0.0275, +0.0325] (3 seeds)" in e for e in judged(report, "P2").evidence)
    assert any("wall-clock-matched" in line for line in judged(report, "P1").evidence)


def test_paths_without_test_time_training_do_not_pass_the_gate_for_it(report):
    assert [v.path for v in report.verdicts if not v.candidate] == ["B2", "S1"]
    only = [v for v in report.verdicts if not v.candidate]
    assert verdict.overall(only).answer == verdict.UNKNOWN


def compared(delta, saving, problems=(), devices=("a",), without_merit=()):
    row = {"path": "P1", "matching": "tokens", "method": "e2e", "delta": delta, "saving": saving}
    spoils = {"problems": problems, "without_merit": without_merit}
    return pd.DataFrame([row | spoils | {"devices": devices, "mixed": len(devices) > 1}])


SURE = Estimate(0.4, 0.35, 0.45, 3)
BELOW = Estimate(0.002, 0.0, 0.004, 3)


@pytest.mark.parametrize(
    ("delta", "saving", "more", "answer"),
    [
        (BELOW, SURE, {}, verdict.HOLDS),
        (Estimate(0.01, 0.005, 0.015, 3), SURE, {}, verdict.UNKNOWN),
        (Estimate(0.03, 0.02, 0.04, 3), SURE, {}, verdict.FAILS),
        (BELOW, Estimate(0.2, 0.15, 0.25, 3), {}, verdict.FAILS),
        (BELOW, Estimate(0.3, 0.25, 0.35, 3), {}, verdict.UNKNOWN),
        (Estimate(0.0, None, None, 1), SURE, {}, verdict.UNKNOWN),
        (None, SURE, {}, verdict.UNKNOWN),
        (BELOW, SURE, {"problems": ("a gate failed",)}, verdict.UNKNOWN),
        (BELOW, SURE, {"devices": ("a", "b")}, verdict.UNKNOWN),
        # A model that counts as well as it predicts passes nothing, and can fail all the same.
        (BELOW, SURE, {"without_merit": ("x does not beat",)}, verdict.UNKNOWN),
        (SURE, SURE, {"without_merit": ("x does not beat",)}, verdict.FAILS),
        # Whatever the times were on: the loss alone decides against it.
        (Estimate(0.03, 0.02, 0.04, 3), SURE, {"devices": ("a", "b")}, verdict.FAILS),
    ],
)
def test_gate_has_three_answers(delta, saving, more, answer):
    (found,) = verdict.judge(compared(delta, saving, **more))
    assert found.answer == answer
    assert verdict.overall([found]).answer == answer


def spoiled(tmp_path, change) -> phase1.Report:
    """The small ladder, with one thing wrong."""
    runs, paths = small_ladder()
    change(runs)
    ladder.write(tmp_path, runs, paths)
    return phase1.read(tmp_path, "ladder")


def last_of_p1(runs) -> Made:
    return runs["ext-P1-from-adapt-P1-from-pretrain-fa-36-s1"]


def test_mixed_machines_are_loud(tmp_path):
    def change(runs):
        last_of_p1(runs).devices = ("NVIDIA H100",)

    report = spoiled(tmp_path, change)
    found = one(report, "P1")
    assert found.mixed
    assert not found.problems
    assert any("MIXED DEVICES" in line for line in judged(report, "P1").evidence)
    assert "MIXED DEVICES" in tables.to_markdown(report)
    assert report.verdict.answer == verdict.UNKNOWN


def test_failed_gate_of_the_plan_and_unbeaten_count_model_spoil_a_path(tmp_path):
    def change(runs):
        last_of_p1(runs).gates = [{"name": "warm start", "holds": False, "said": "off by 0.3"}]
        last_of_p1(runs).count_model = 1.0

    report = spoiled(tmp_path, change)
    evidence = "\n".join(judged(report, "P1").evidence)
    assert "warm start (off by 0.3)" in evidence
    assert "does not beat the count model: 2.5250 against 1.0000" in evidence
    assert report.verdict.answer == verdict.UNKNOWN
    assert len(report.without_merit) == 1


def test_pending_runs_are_rows_and_keep_the_verdict_open(tmp_path):
    report = spoiled(tmp_path, lambda runs: setattr(last_of_p1(runs), "status", "pending"))
    run = named(report, last_of_p1(small_ladder()[0]).name)
    assert (run.status, run.stage, run.validation_loss) == ("pending", "extend", None)
    told = {text.split(":")[0] for text in run.missing}
    assert told == {name for name in frame.COLUMNS if getattr(run, name) is None}
    assert any(f"{run.name} is pending" in text for text in report.missing)
    delta = one(report, "P1").delta
    assert (delta.n, delta.low) == (1, None)
    assert one(report, "P1").loss.n == 1
    assert [s.seeds for s in stages_of(report, "P1")] == [2, 2, 1]
    assert report.verdict.answer == verdict.UNKNOWN
    assert not report.faults


def test_what_one_path_lacks_changes_no_other_paths_numbers(tmp_path):
    report = spoiled(tmp_path, lambda runs: setattr(runs[BROKEN], "status", "pending"))
    assert (one(report, "P1").context, one(report, "B1").context) == (None, 128)
    assert "## Token-matched, context 128\n" in tables.to_markdown(report)
    assert "| 9.79K |" in tables.to_markdown(report)


def test_a_warm_start_that_restored_nothing_is_no_warm_start(copied):
    folder = copied / "ladder" / "adapt-P1-from-pretrain-fa-36-s0"
    amend(record_of(folder), restored=None)
    assert any("restored nothing" in problem for problem in one(read(copied), "P1").problems)


def test_other_tokens_and_other_text_are_not_compared(copied):
    name = "ext-B1-from-pretrain-e2e-40-s0"
    amend(record_of(copied / "ladder" / name), data={"val": "sha256:other"})
    found = one(read(copied), "P1")
    assert any("held-out tokens" in problem for problem in found.problems)
    assert found.delta.n == 1


# ---- broken and incomplete records -----------------------------------------------------


def record_of(folder):
    return ladder.RunRecord(folder)


def read(root):
    return phase1.read(root, "ladder")


BROKEN = "ext-P1-from-adapt-P1-from-pretrain-fa-36-s0"


@pytest.mark.parametrize(
    ("file", "content", "lost"),
    [
        ("run.json", None, "device_hours"),
        ("run.json", "{", "device_hours"),
        ("run.json", "[]", "device_hours"),
        ("config.yaml", None, "context"),
        ("config.yaml", "a: [", "context"),
        ("config.yaml", "just words", "context"),
        ("metrics.jsonl", None, "final_loss"),
        ("metrics.jsonl", "{]\n", "final_loss"),
        ("metrics.jsonl", "[1]\n", "final_loss"),
        ("eval/loss_by_position-10.json", None, "validation_loss"),
        ("eval/loss_by_position-10.json", "nothing", "count_model_loss"),
        ("eval/loss_by_position-10.npz", None, ""),
        ("eval/loss_by_position-10.npz", "no archive", ""),
    ],
)
def test_broken_files_are_named_and_the_rest_is_reported(copied, file, content, lost):
    path = copied / "ladder" / BROKEN / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    report = read(copied)
    run = named(report, BROKEN)
    (fault,) = run.faults
    assert Path(file).stem.rstrip("0123456789") in fault
    if lost:
        assert getattr(run, lost) is None
        assert any(text.startswith(f"{lost}: ") for text in run.missing)
    assert len(report.runs) == 10
    other = named(report, BROKEN.replace("s0", "s1"))
    assert other.validation_loss == pytest.approx(FLOOR["P1"] + 0.02 + WIGGLE[1])


def test_losses_that_are_no_numbers_are_not_shown_as_numbers(tmp_path):
    record = write_run(tmp_path, Made("pretrain-x", "pretrain", "fa", 0, 5, math.nan))
    run = named(read(tmp_path), "pretrain-x")
    assert (run.final_loss, run.validation_loss) == (None, None)
    assert "final_loss: not a finite number: nan" in run.missing
    assert record.run()["status"] == "finished"
    json.loads(tables.to_json(read(tmp_path)))


def test_without_a_manifest_the_report_says_what_it_lacks(copied, tmp_path):
    (copied / "ladder" / "manifest.json").unlink()
    report = read(copied)
    assert len(report.runs) == 10
    assert report.verdict.answer == verdict.UNKNOWN
    assert str(copied / "ladder" / "manifest.json") in report.verdict.evidence[0]
    out = tmp_path / "out"
    tables.save(report, out)
    assert not list(out.glob("*.png"))
    page = (out / "report.md").read_text()
    assert "*Not drawn: gate. Missing: " in page
    assert "manifest.json is missing" in page


def test_a_manifest_of_another_shape_is_said_and_survived(copied):
    (copied / "ladder" / "manifest.json").write_text('{"runs": 3}')
    report = read(copied)
    assert len(report.runs) == 10
    assert "is not a plan's manifest" in report.missing[0]


def test_simulated_runs_show_no_losses(tmp_path):
    write_run(tmp_path, Made("pretrain-x", "pretrain", "fa", 0, 5, 3.0, mode="simulate"))
    run = named(read(tmp_path), "pretrain-x")
    assert (run.steps, run.tokens, run.faults) == (5, 5 * 2 * 64, ())
    assert (run.first_loss, run.validation_loss, run.start_loss, run.parameters) == (None,) * 4
    assert "validation_loss: simulated: nothing was computed" in run.missing


def test_a_killed_attempts_time_is_taken_from_its_steps(tmp_path):
    made = Made("pretrain-x", "pretrain", "fa", 0, 8, 3.0)
    record = write_run(tmp_path, made)
    amend(record, seconds=None, status="interrupted")
    run = named(read(tmp_path), "pretrain-x")
    assert run.device_hours == pytest.approx(8 * 1.01 / 3600)
    assert run.step_hours == pytest.approx(8 * 1.0 / 3600)
    assert any("lower bound" in note for note in run.notes)


def test_seconds_of_a_step_are_a_median_without_the_first_step_after_each_start(tmp_path):
    record = write_run(tmp_path, Made("pretrain-x", "pretrain", "fa", 0, 8, 3.0))
    own = {"from": "elsewhere/ladder/pretrain-x/4", "part": "all", "restored": ["a"]}
    amend(record, restored=own)
    rows = record.metrics()
    times = {1: 90.0, 2: 1.0, 3: 1.1, 4: 1.2, 5: 70.0, 6: 1.3, 7: 1.4, 8: 9.0}
    (record.folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"step_seconds": times[row["step"]]}) + "\n" for row in rows)
    )
    run = named(read(tmp_path), "pretrain-x")
    assert run.step_seconds == pytest.approx((1.2 + 1.3) / 2)  # of six
    assert (run.step_seconds_low, run.step_seconds_high) == (1.0, 9.0)
    assert run.step_hours == pytest.approx(8 * 1.25 / 3600)
    assert "| 1.25 [1, 9] |" in tables.to_markdown(read(tmp_path))


def test_losses_of_older_records_are_read_as_what_they_were(tmp_path):
    """Then `loss` was the mean over chunks; now it is that over tokens."""
    summaries = {
        "new": {"loss": 2.0, "chunk_loss": 2.5, "loss_without_learning": 3.0},
        "old": {"loss": 2.5, "token_loss": 2.0, "token_loss_without_learning": 3.0},
        "older": {"loss": 2.5},
    }
    for name, summary in summaries.items():
        record = write_run(tmp_path, Made(f"pretrain-{name}", "pretrain", "fa", 0, 5, 2.0))
        (record.folder / "eval/loss_by_position-5.json").write_text(json.dumps(summary))
    report = read(tmp_path)
    for name in summaries:
        assert named(report, f"pretrain-{name}").validation_loss == pytest.approx(2.0)
    for name in ("pretrain-new", "pretrain-old"):
        assert named(report, name).validation_loss_without_learning == 3.0


def test_losses_of_another_split_are_not_compared_in_silence(tmp_path):
    for name, split in (("a", "val"), ("b", "dev"), ("c", "val")):
        record = write_run(tmp_path, Made(f"pretrain-{name}", "pretrain", "fa", 0, 5, 3.0))
        path = record.folder / "eval/loss_by_position-5.json"
        more = {"split": split, "sequences": 8, "evaluation_seed": 0, "bits_per_byte": 1.5}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        amend(record, data={split: "sha256:x"})
    report = read(tmp_path)
    assert list(report.runs["split"]) == ["val", "dev", "val"]
    said = "losses of different splits do not compare: dev: pretrain-b; val: pretrain-a, pretrain-c"
    assert said in tables.to_markdown(report)
    assert said in tables.to_terminal(report, None)
    a, b, c = frame.rows_of(report.runs)
    assert (compare.alike(a, b), compare.alike(a, c)) == (False, True)
    assert a.bits_per_byte == 1.5
    assert a.evaluated_on == "sha256:x, 8 stretches of val drawn with seed 0"


def test_hours_add_up_over_attempts_and_devices(tmp_path):
    made = Made("pretrain-x", "pretrain", "fa", 0, 8, 3.0, devices=("GPU",) * 4)
    write_run(tmp_path, made)
    record = write_run(tmp_path, made)
    assert len(record.run()["attempts"]) == 2
    run = named(read(tmp_path), "pretrain-x")
    assert run.device_hours == pytest.approx(4 * 2 * (8 + 0.08 + 0.5) / 3600)
    assert (run.attempts, run.devices) == (2, "4 × GPU")


def test_steps_of_the_parent_are_not_counted_twice(tmp_path):
    parent = Made("pretrain-x", "pretrain", "fa", 0, 6, 3.0)
    record = write_run(tmp_path, Made("pretrain-y", "pretrain", "fa", 0, 10, 3.0, parent))
    account = record.run()["attempts"][-1]["restored"]
    amend(record, restored=account | {"part": "all"})
    run = named(read(tmp_path), "pretrain-y")
    assert (run.steps, run.tokens) == (4, 4 * 2 * 64)


def test_going_on_from_the_own_checkpoint_is_no_parent(tmp_path):
    made = Made("pretrain-x", "pretrain", "fa", 0, 8, 3.0)
    record = write_run(tmp_path, made)
    own = {"from": "elsewhere/ladder/pretrain-x/4", "part": "all", "restored": ["a"]}
    amend(record, restored=own)
    run = named(read(tmp_path), "pretrain-x")
    assert (run.restore, run.parent, run.steps) == ("not attempted", None, 8)


def test_records_of_benchmarks_and_evaluations_are_no_rows(copied):
    folder = copied / "ladder"
    shutil.copytree(folder / BROKEN, folder / "benchmark-x")
    for name in ("metrics.jsonl", "eval"):
        shutil.rmtree(folder / "benchmark-x" / name, ignore_errors=True)
    (folder / "benchmark-x" / "metrics.jsonl").unlink()
    (folder / "evaluation-x" / "eval").mkdir(parents=True)
    assert len(read(copied).runs) == 10


def test_the_checkpoint_is_where_it_is_looked_for(copied, tmp_path):
    assert named(read(copied), BROKEN).checkpoint is None
    moved = tmp_path / "moved"
    for step in (5, 10):
        (moved / "ladder" / BROKEN / str(step)).mkdir(parents=True)
    run = named(phase1.read(copied, "ladder", moved), BROKEN)
    assert run.checkpoint == str(moved / "ladder" / BROKEN / "10")


# ---- outputs ---------------------------------------------------------------------------


def test_csv_gives_the_rows_back(report):
    rows = list(csv.DictReader(io.StringIO(tables.to_csv([report]))))
    assert len(rows) == len(report.runs)
    for row, run in zip(rows, frame.rows_of(report.runs), strict=True):
        assert row["name"] == run.name
        assert float(row["validation_loss"]) == run.validation_loss
        assert row["missing"].split("\n") == list(run.missing)


def test_json_gives_every_number_back(report):
    told = json.loads(tables.to_json(report))
    assert [run["name"] for run in told["runs"]] == list(report.runs["name"])
    p1 = next(c for c in told["comparisons"] if (c["path"], c["matching"]) == ("P1", "tokens"))
    assert p1["delta"] == one(report, "P1").delta._asdict()
    assert told["verdict"]["answer"] == "holds"
    assert len(told["positions"][0]["loss"]["value"]) == len(told["positions"][0]["edges"]) - 1


def test_report_is_written_whole_with_pictures_in_both_forms(small, tmp_path):
    out = tmp_path / "report"
    paths = tables.write(small, "ladder", out)
    names = ["gate", "loss_against_cost_tokens", "loss_by_position_tokens"]
    drawn = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in paths} == {"runs.csv", "report.json", "report.md"} | drawn
    assert set(out.iterdir()) == set(paths)
    page = (out / "report.md").read_text()
    assert all(f"({name}.png)" in page for name in names)
    assert "**P1: cannot be told**" in page  # of two seeds the interval is too wide
    assert (out / "gate.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_its_numbers_is_replaced_by_the_reason(report, tmp_path):
    (tmp_path / "loss_by_position_tokens.png").touch()
    drawn = pictures.draw_all(replace(report, costs=(), positions=()), tmp_path)
    assert [bool(picture.paths) for picture in drawn] == [True, False, False, False, False]
    assert {path.name for path in tmp_path.iterdir()} == {"gate.png", "gate.svg"}
    assert drawn[1].markdown().startswith("*Not drawn: loss_against_cost_tokens. Missing: ")


def test_the_terminal_shows_every_run_and_path(report):
    said = tables.to_terminal(report, 110)
    assert all(name in said for name in report.runs["name"])
    assert "+0.0040 [+0.0015, +0.0065]" in said
    assert "holds" in said
    assert max(map(len, said.splitlines())) <= 110


def test_foreign_files_are_not_written_over(small, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(UserError, match="no earlier report"):
        tables.write(small, "ladder", tmp_path)
    assert (tmp_path / "report.md").read_text() == "mine"


def test_a_picture_that_can_no_longer_be_drawn_goes(copied, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("report.json", "gate.png", "gate.svg"):
        (out / name).touch()
    (copied / "ladder" / "manifest.json").unlink()
    tables.write(copied, "ladder", out)
    assert not (out / "gate.png").exists()
    assert not (out / "gate.svg").exists()


# ---- the script ------------------------------------------------------------------------


@pytest.fixture
def script(run_script):
    return partial(run_script, "05_phase1_report.py")


def asked(root, *more):
    return ["--exp-dir", root, "--exp-folder", "ladder", *more]


def test_script_prints_what_was_asked_for_and_nothing_else(script, small, tmp_path):
    code, said = script(*asked(small, "--format", "json"))
    assert code == 0
    assert len(json.loads(said.out)["runs"]) == 10
    code, said = script(*asked(small, "--format", "csv", "--csv-out", tmp_path / "a.csv"))
    assert said.out == (tmp_path / "a.csv").read_text()
    assert len(list(csv.DictReader(io.StringIO(said.out)))) == 10
    code, said = script(*asked(small, "--format", "markdown"))
    assert said.out.startswith("# Report on `ladder`")
    code, said = script(*asked(small))
    assert code == 0
    assert BROKEN in said.out


def test_script_reports_the_rest_of_a_broken_folder_and_says_so(script, copied):
    (copied / "ladder" / BROKEN / "run.json").write_text("{")
    code, said = script(*asked(copied, "--format", "json"))
    assert code == 1
    assert len(json.loads(said.out)["runs"]) == 10
    assert f"{BROKEN}/run.json" in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--exp-dir", "nowhere", "--exp-folder", "x"], "nowhere"),
        (["--exp-dir", "{root}", "--exp-folder", "other"], "there are ladder"),
        (["--exp-dir", "{root}/ladder", "--exp-folder", "{run}"], "holds no run"),
        (["--exp-dir", "{root}", "--exp-folder", "ladder", "--csv-out", "{script}"], "new file"),
        (["--exp-dir", "{root}", "--exp-folder", "ladder", "--out", "{script}"], "folder"),
    ],
)
def test_script_refuses_wrong_input_with_a_remedy(script, small, arguments, says):
    places = {"root": small, "run": BROKEN, "script": SCRIPT}
    code, said = script(*(text.format(**places) for text in arguments))
    assert code == 2
    assert says in said.err
    assert said.out == ""


def test_dry_run_writes_nothing(script, small, tmp_path):
    more = ["--dry-run", "--out", tmp_path / "out", "--csv-out", tmp_path / "a.csv"]
    code, said = script(*asked(small, *more))
    assert code == 0
    assert f"would report on 10 runs of {small / 'ladder'}" in said.out
    assert f"would write {tmp_path / 'out'}\n" in said.out
    assert f"would write {tmp_path / 'a.csv'}\n" in said.out
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_every_run_below_is_reported(script, small, copied, tmp_path, monkeypatch):
    shutil.copytree(small / "ladder", copied / "deep" / "er" / "ladder")
    write_run(copied / "alone", Made("pretrain-x", "pretrain", "fa", 0, 5, 3.0))
    checkpoint = copied / "checkpoints/ladder/pretrain-x/5/manifest"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"config": {}, "data": {}}')
    monkeypatch.setenv("TTT_EXPERIMENTS", str(copied))
    code, said = script("--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(said.out)))
    folders = ["alone/ladder", *["deep/er/ladder"] * 10, *["ladder"] * 10]
    assert [row["exp_folder"] for row in rows] == folders
    code, said = script("--exp-dir", copied, "--format", "json", "--out", tmp_path / "out")
    assert [len(report["runs"]) for report in json.loads(said.out)] == [1, 10, 10]
    pages = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("report.md"))
    assert pages == ["out/alone/ladder", "out/deep/er/ladder", "out/ladder"]
    code, said = script("--exp-dir", copied / "alone" / "ladder" / "pretrain-x")
    assert (code, "holds no run" in said.err) == (2, True)


def test_wall_clock_is_from_start_to_end_of_every_attempt_and_shown(tmp_path):
    record = write_run(tmp_path, Made("pretrain-x", "pretrain", "fa", 0, 8, 3.0))
    amend(record, started="2026-01-01T10:00:00+00:00", finished="2026-01-01T12:30:00+00:00")
    report = read(tmp_path)
    assert named(report, "pretrain-x").wall_hours == 2.5
    assert "| wall-clock |" in tables.to_markdown(report)
    assert "| 2.5 h |" in tables.to_markdown(report)
    # Of a killed attempt the steps tell what was spent at least.
    amend(record, finished=None, seconds=None)
    assert named(read(tmp_path), "pretrain-x").wall_hours == pytest.approx(8 * 1.01 / 3600)
