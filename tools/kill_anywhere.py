r"""Kill one tiny run again and again, start the same command each time, and compare what comes out.

The run is killed (SIGKILL) at moments that are watched for in its files, plus a random delay: while
it starts, in a step, in a save, in an evaluation, at its end. Then its parameters, optimizer state,
loader position and every logged number must equal, bit for bit, those of a run left in peace.

  uv run python tools/kill_anywhere.py --kills 25 --seed 0

Exit codes: 0 all equal, 1 a difference or a kill that did not happen
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np

from ttt.dataloader import token_store
from ttt.infra.checkpoint import Checkpoints, read_flat
from ttt.infra.record import RunRecord
from ttt.model.loop import StepMetrics

SAVE_EVERY, EVAL_EVERY = 5, 8
MOMENTS = ("start", "step", "save", "evaluation", "end")
"""Of a kill; `stop` is another choice: SIGTERM in a step, after which the run must save."""
MEASURED = {*StepMetrics._fields, "step", "eval_loss", "final_eval_loss", "bad_samples"}
"""What must agree; the other metrics are times."""
LIMIT_SECONDS = 600.0
TINY = f"""
+experiment=tiny/pretrain/pretrain-tiny-e2e
size.intermediate_size=32 size.window=24 size.chunk=16
model.hidden_size=16 model.intermediate_size=32 model.num_hidden_layers=2
model.suffix_len=1 model.num_attention_heads=2
data=bytes training.sample_tokens=0
training.dataset_name=text training.seq_length=64 training.global_batch_size=4
training.eval_batch_size=2 training.eval_batches=20 training.eval_every_steps={EVAL_EVERY}
training.save_every_steps={SAVE_EVERY}
training.optimizer_outer.lr_decay_steps=100 training.optimizer_outer.lr_warmup_steps=1
""".split()


class Tiny:
    """A run in a folder of its own: its command, record and checkpoints."""

    def __init__(self, folder: Path, name: str, steps: int, extra: list[str]):
        """Bind to `folder`, which holds the data as `text`; nothing is started."""
        self.record = RunRecord(folder / "experiments" / "default" / name)
        self.checkpoints = Checkpoints(folder / "checkpoints" / "default" / name)
        self.log = folder / f"{name}.log"
        self.steps = steps
        self.command = [
            sys.executable,
            "-m",
            "ttt.train",
            *TINY,
            f"training.exp_name={name}",
            f"training.total_steps={steps}",
            f"deploy_paths.experiments={folder}/experiments",
            f"deploy_paths.checkpoint={folder}/checkpoints",
            f"+deploy_paths.data.text={folder}/text",
            *extra,
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command; its output goes to the log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log)

    def last(self) -> dict[str, float]:
        """The last line of the record."""
        rows = self.record.metrics()
        return rows[-1] if rows else {"step": 0}

    def finish(self) -> None:
        """Run to the end; exits with the log's end if that fails."""
        if (process := self.start()).wait(LIMIT_SECONDS) != 0:
            self.fail(f"{' '.join(self.command)}\nended with {process.returncode}")

    def fail(self, why: str) -> NoReturn:
        """Leave with the end of the log."""
        sys.exit(f"{why}:\n{self.log.read_text(errors='replace')[-3000:]}")

    def numbers(self) -> list[dict[str, float]]:
        """The logged lines without times."""
        rows = self.record.metrics()
        return [{name: row[name] for name in row if name in MEASURED} for row in rows]


def moment(run: Tiny, kind: str, rng: random.Random) -> Callable[[], bool]:
    """A function that returns whether the moment has come; polled from the start on."""
    began, first = time.monotonic(), run.checkpoints.latest() or 0
    # Beyond the next checkpoint, mostly, so that the run gets on from kill to kill.
    beyond = first + rng.choice((0, SAVE_EVERY, 4 * SAVE_EVERY))
    if kind == "start":
        delay = rng.uniform(0.0, 8.0)
        return lambda: time.monotonic() - began > delay
    if kind in ("step", "stop"):
        target = min(beyond + rng.randint(1, SAVE_EVERY), run.steps - 1)
        return logged(run, first, target)
    if kind == "save":
        # Any state of a save: Orbax's folder, ours, or with its hashes.
        mark = rng.choice(("*.orbax-checkpoint-tmp*", "*.saving", "*.saving/hashes.json"))
        before = set(run.checkpoints.folder.glob(mark))  # left by an earlier kill
        reached = logged(run, first, first + rng.choice((1, SAVE_EVERY + 1)))
        return lambda: reached() and bool(set(run.checkpoints.folder.glob(mark)) - before)
    if kind == "evaluation":
        target = (beyond // EVAL_EVERY + 1) * EVAL_EVERY
        if target >= run.steps:
            return moment(run, "step", rng)
        return logged(run, first, target)
    return logged(run, first, run.steps)


def logged(run: Tiny, first: int, target: int) -> Callable[[], bool]:
    """Whether `target` was logged by this attempt, which starts after step `first`."""
    seen = False

    def reached() -> bool:
        nonlocal seen
        step = run.last()["step"]
        seen = seen or step <= first  # the lines of the attempt before are gone
        return seen and step >= target

    return reached


def kill(run: Tiny, kind: str, rng: random.Random) -> bool:
    """Start the run and kill it at such a moment; false if it ended before."""
    has_come, delay = moment(run, kind, rng), rng.choice((0.0, rng.uniform(0.0, 0.1)))
    if kind == "end":
        delay = rng.uniform(0.0, 2.0)  # into the evaluation, the picture, the last writes
    process, began = run.start(), time.monotonic()
    while process.poll() is None and not has_come():
        if time.monotonic() - began > LIMIT_SECONDS:
            process.kill()
            run.fail(f"no moment for a kill ({kind}) in {LIMIT_SECONDS:.0f} s")
        time.sleep(0.001)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    if kind != "stop":
        process.kill()
        process.wait()
        return True
    before = run.last()["step"]
    process.terminate()
    code, last = process.wait(LIMIT_SECONDS), run.last()["step"]
    # Steps take milliseconds here, and some may pass between the look at the record and the signal.
    if code != 75 or run.checkpoints.latest() != last or last > before + 20:
        run.fail(f"SIGTERM after step {before}, stopped after {last} with exit code {code}")
    return True


def differences(run: Tiny, peaceful: Tiny) -> list[str]:
    """Every difference between the results of the two runs."""
    faults = []
    ours, theirs = run.checkpoints, peaceful.checkpoints
    if ours.latest() != run.steps or ours.find_good() != run.steps:
        faults.append(f"checkpoints {ours.steps()}, the last good one of step {ours.find_good()}")
    for item in ("model_weights", "opt_state"):
        got, expected = (read_flat(c.find(), item) for c in (ours, theirs))
        if got.keys() != expected.keys():
            faults.append(f"{item}: other names")
        faults += [
            f"{item}: {name}"
            for name in got.keys() & expected.keys()
            if not np.array_equal(got[name], expected[name], equal_nan=got[name].dtype.kind == "f")
        ]
    if ours.loader_state(run.steps) != theirs.loader_state(run.steps):
        faults.append("the loader's position")
    got, expected = run.numbers(), peaceful.numbers()
    if [row["step"] for row in got] != [row["step"] for row in expected]:
        faults.append(f"steps in the record: {[row['step'] for row in got]}")
    elif got != expected:
        steps = [g["step"] for g, e in zip(got, expected, strict=True) if g != e]
        faults.append(f"numbers in the record at steps {steps}")
    if run.record.run()["status"] != "finished":
        faults.append(f"status {run.record.run()['status']}")
    left = [path.name for path in ours.folder.iterdir() if not path.name.isdecimal()]
    if left != [".lock"]:
        faults.append(f"left over: {left}")
    return faults


def schedule(kills: int, kinds: list[str]) -> list[str]:
    """A kind for each kill, in turn; those at the end come last, at most two: then it is over."""
    last = min(2, kills // len(kinds)) * ["end"] if "end" in kinds else []
    others = [kind for kind in kinds if kind != "end"]
    return [others[i % len(others)] for i in range(kills - len(last))] + last


def main() -> int:
    """Run and return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=200, help="of the run, 6 a kill or more")
    parser.add_argument("--moments", default=",".join(MOMENTS), help="in turn; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="settings of the run, as for train")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ids = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.int32)
        attributes = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
        token_store.write(folder / "text", {"train": ids, "val": ids[:4000]}, attributes=attributes)
        peaceful = Tiny(folder, "peaceful", options.steps, options.overrides)
        killed = Tiny(folder, "killed", options.steps, options.overrides)
        began = time.monotonic()
        peaceful.finish()
        print(f"the run in peace: {options.steps} steps in {time.monotonic() - began:.0f} s")
        hits: Counter[str] = Counter()
        for number, kind in enumerate(schedule(options.kills, options.moments.split(",")), 1):
            hit = kill(killed, kind, rng)
            hits[kind] += hit
            print(
                f"kill {number:2} ({kind}{'' if hit else ', too late'}): {killed.last()['step']:3} "
                f"steps logged, checkpoint {killed.checkpoints.latest()}",
                flush=True,
            )
        killed.finish()
        wrong = differences(killed, peaceful)
    for difference in wrong:
        print(f"DIFFERENT: {difference}")
    print(json.dumps({"kills": hits.total(), "by_moment": hits, "different": wrong}))
    return 0 if not wrong and hits.total() == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
