"""Trackers: the record gets everything, and losing W&B stops nothing. The progress line."""

import io
import logging
import os
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from ttt.infra.progress import Bar, Progress
from ttt.infra.record import RunRecord
from ttt.infra.tracking import Tracker

KEY = "0123456789abcdef"


class FakeWandb:
    """Stands in for the module and for its run; fails in the call it is told to."""

    def __init__(self, failing: str = ""):
        self.failing = failing
        self.calls = []

    def init(self, **arguments):
        self._call("init", arguments)
        return SimpleNamespace(
            log=lambda metrics, step: self._call("log", (step, metrics)),
            finish=lambda exit_code: self._call("finish", exit_code),
        )

    def _call(self, name, arguments):
        self.calls.append((name, arguments))
        if name == self.failing:
            raise RuntimeError(f"no network for key {KEY}")


def wandb_tracker(monkeypatch, folder, fake: FakeWandb | None) -> Tracker:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "another")
    record = RunRecord(folder)
    record.start({}, devices=[], data={})
    tracker = Tracker(record)
    tracker.mirror(entity="", project="p", name="n", config={"a": 1}, key=KEY)
    return tracker


def test_wandb_gets_what_the_record_gets(tmp_path, monkeypatch):
    fake = FakeWandb()
    tracker = wandb_tracker(monkeypatch, tmp_path, fake)
    record = RunRecord(tmp_path)
    tracker.log(1, {"loss": 2.0})
    tracker.finish("finished")
    assert record.metrics() == [{"step": 1, "loss": 2.0}]
    assert record.run()["status"] == "finished"
    (_, init), *rest = fake.calls
    assert init["entity"] is None
    assert (init["id"], init["resume"]) == (record.run()["id"], "allow")
    assert (init["config"], init["dir"]) == ({"a": 1}, str(tmp_path))
    assert rest == [("log", (1, {"loss": 2.0})), ("finish", 0)]


def test_the_key_goes_to_the_environment_and_nowhere_else(tmp_path, monkeypatch):
    # The real W&B uploads sys.argv.
    monkeypatch.setattr(sys, "argv", ["train", f"training.wandb_key={KEY}", "training.lr=1"])
    fake = FakeWandb()
    wandb_tracker(monkeypatch, tmp_path, fake)
    assert KEY not in str(fake.calls)
    assert sys.argv == ["train", "training.wandb_key=***", "training.lr=1"]
    assert os.environ["WANDB_API_KEY"] == KEY


def test_a_failed_run_is_told_to_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    wandb_tracker(monkeypatch, tmp_path, fake).finish("interrupted")
    assert fake.calls[-1] == ("finish", 1)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_losing_wandb_is_told_once_without_the_key_and_stops_nothing(
    tmp_path, monkeypatch, caplog, failing
):
    with caplog.at_level(logging.WARNING):
        tracker = wandb_tracker(monkeypatch, tmp_path, FakeWandb(failing))
        for step in range(3):
            tracker.log(step, {"loss": 1.0})
        tracker.finish("finished")
        tracker.finish("finished")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "W&B is lost" in message
    assert "no network" in message
    assert KEY not in message


def test_a_missing_wandb_is_a_lost_one(tmp_path, monkeypatch, caplog):
    wandb_tracker(monkeypatch, tmp_path, None).log(1, {})
    assert "W&B is lost" in caplog.text


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(console: Console, seconds: list[float], total: int, start: int = 0) -> str:
    """Steps that take so many seconds each, 10 tokens apiece; what was printed."""
    clock = Clock()
    with Progress(total, "training", start=start, console=console, clock=clock) as progress:
        for step, passed in enumerate(seconds, start=start + 1):
            clock.now += passed
            progress.update(step, loss=1.0 / step, tokens=10)
    return console.file.getvalue()


def log_file() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_a_log_file_gets_the_first_line_one_each_ten_seconds_and_the_last():
    lines = run(log_file(), [30.0] + [1.0] * 24, total=25).splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == "training 11/25  loss 0.0909  10 tokens/s  0:00:14 left"


def test_the_compiling_first_step_counts_neither_for_speed_nor_for_time_left():
    first, *_, last = run(log_file(), [600.0, 10.0, 10.0], total=10).splitlines()
    assert "left" not in first
    assert "tokens/s" not in first
    assert last.endswith("1 tokens/s  0:01:10 left")


def test_a_resumed_run_counts_from_its_start():
    *_, last = run(log_file(), [5.0, 10.0], total=104, start=100).splitlines()
    assert last == "training 102/104  loss 0.0098  1 tokens/s  0:00:20 left  resumed at 100"


def test_the_share_of_the_devices_peak_is_shown_where_it_is_known():
    console, clock = log_file(), Clock()
    with Progress(2, "training", console=console, clock=clock) as progress:
        for step in (1, 2):
            clock.now += 20
            progress.update(step, tokens=10, mfu=0.4217)
    last = console.file.getvalue().splitlines()[-1]
    assert last == "training 2/2  0 tokens/s  MFU 42.2%  0:00:00 left"


def test_markup_in_a_name_is_text():
    console = log_file()
    with Progress(1, "[red]val[/red]", console=console) as progress:
        progress.update(1)
    assert console.file.getvalue() == "[red]val[/red] 1/1\n"


def test_a_terminal_shows_one_line_that_ends_in_the_last_state():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    text = run(console, [1.0] * 5, total=5)
    assert "loss 1.0000" in text
    assert text.count("\n") == 1
    assert "training 5/5" in text.split("\n")[0]


def test_bar_tells_amount_speed_and_time_left_of_each_job():
    clock = iter([0.0, 1.0, 11.0, 21.0, 22.0, 40.0])
    out = io.StringIO()
    with Bar(console=Console(file=out, width=200), clock=lambda: next(clock)) as bar:
        bar("fetching", 0, 400_000_000, "bytes")
        bar("fetching", 50_000_000, 400_000_000, "bytes")
        bar("fetching", 100_000_000, 400_000_000, "bytes")
        bar("listing", 7, None, "objects")
        bar("listing", 1007, None, "objects")
    assert out.getvalue().splitlines() == [
        "fetching  50.0 of 400.0 MB  5.0 MB/s  0:01:10 left",
        "fetching  100.0 of 400.0 MB  5.0 MB/s  0:01:00 left",
        "listing  1,007 objects  56 objects/s",
    ]


def test_bar_leaves_standard_output_to_what_is_said(capsys):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with Bar(console=console) as bar:
        bar.say("done")
    assert capsys.readouterr().out == "done\n"
    assert "done" not in out.getvalue()
