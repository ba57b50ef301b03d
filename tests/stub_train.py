"""What a plan sees of `train`, without the training: a record, in the time of an import.

STUB says what goes wrong: `fail NAME`, `nan NAME`, `cold NAME` (a start from ln V), `sleep NAME`
(until a signal comes), `lie NAME` (exit code 0, and no finished record).
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from ttt.config import compose, resolve, to_dict
from ttt.infra.record import RunRecord

SECONDS_PER_TOKEN = {"e2e": 4e-3, "swa": 1e-3, "fa": 1e-3}


def main() -> int:
    config = resolve(compose(sys.argv[1:]))
    training, model = config.training, config.model
    wrong, _, whom = os.environ.get("STUB", "").partition(" ")
    wrong = wrong if whom == training.exp_name else ""
    record = RunRecord(
        Path(config.deploy_paths.experiments) / training.exp_folder / training.exp_name
    )
    with Path(os.environ["STUB_CALLS"]).open("a") as file:
        file.write(training.exp_name + "\n")
    record.start(to_dict(config), devices=["cpu"], data={"train": "t", "val": "v"})
    if training.load_part == "params":
        new = ["language_model.model.h.prime_storage.feed_forward_prime.w1.weight"]
        parent = training.resume_exp_name
        record.note(
            restored={
                "from": f"/checkpoints/{training.exp_folder}/{parent}/4",
                "part": "params",
                "restored": ["language_model.model.wte.weight"],
                "initialised": new
                if model.prime and "fa" in parent and "adapt" not in parent
                else [],
                "narrowed": [],
                "unused": [],
            }
        )
        run = record.run()
        run["attempts"][-1]["start"] = {
            "warm_loss": math.log(model.vocab_size) if wrong == "cold" else 3.0,
            "parent_loss": 3.0,
            "preserving": True,
            "why": "",
        }
        (record.folder / "run.json").write_text(json.dumps(run))
    if wrong == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: leave(record))
        signal.signal(signal.SIGINT, lambda *_: leave(record))
        Path(os.environ["STUB_READY"]).touch()
        time.sleep(60)
    if wrong == "fail":
        record.finish("failed")
        sys.stderr.write("error: the disk is full\n")
        return 1
    tokens = training.seq_length * training.global_batch_size
    method = "e2e" if model.prime else "swa"
    for step in range(1, training.total_steps + 1):
        loss = math.nan if wrong == "nan" and step == training.total_steps else 5.0 - step / 100
        record.log(step, loss=loss, step_seconds=tokens * SECONDS_PER_TOKEN[method])
    if wrong != "lie":
        record.finish("finished")
    return 0


def leave(record: RunRecord) -> None:
    record.finish("interrupted")
    sys.exit(75)


if __name__ == "__main__":
    sys.exit(main())
