"""Scripts 09, 11, 12 and 15: what they plan, what they leave out, what they make of the results."""

import argparse
import json
import tarfile
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_runs import SHORT, STUB

from ttt.dataloader import builtin, prose_and_code, token_store
from ttt.dataloader.text import Corpus
from ttt.errors import RunError, Stopped, UserError
from ttt.experiment_rules import EXTERNAL
from ttt.report import external as external_report
from ttt.report import study as study_report
from ttt.runs import (
    children,
    execute,
    external,
    external_eval,
    external_flags,
    external_research,
    pilot,
    study,
)


def flags(**given):
    """Of script 09, as it parses its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--exp-folder", default="f")
    external_flags.add(
        parser, external_flags.MODEL, external_flags.PLAN, external_flags.PLACES, **given
    )
    return vars(parser.parse_args([]))


# ---- the plan of the matrix ------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """SmolLM2's whole matrix in a pilot's budget, without its import."""
    place = tmp_path_factory.mktemp("matrix")
    return external.prepare(
        flags(
            model="smollm2_135m",
            bootstrap_token_data=False,
            data_root=str(place / "data"),
            checkpoint_root=str(place / "checkpoints"),
            exp_dir=str(place / "experiments"),
        )
    )


def test_the_matrix_is_a_plan_with_each_run_behind_its_parent(prepared):
    names = [run.name for run in prepared.plan.runs]
    assert names == [run.format(model="smol135") for run in EXTERNAL]
    for run in prepared.plan.runs:
        assert run.parent in (None, "import-smol135-fa-base", *names[: names.index(run.name)])
    chains = {path.path: path.runs for path in prepared.plan.paths}
    assert chains["ext-smol135-e2e-32K-from-import-bridge"] == (
        "pretrain-smol135-fa-import-8K",
        "adapt-smol135-swa-8K-from-import",
        "adapt-smol135-e2e-8K-from-import",
        "ext-smol135-e2e-32K-from-import-bridge",
    )
    assert len(chains) == 5


def test_a_pilot_is_short_and_takes_imports_from_their_own_folder(prepared):
    runs = {run.name: run for run in prepared.plan.runs}
    first = runs["pretrain-smol135-fa-import-8K"]
    assert (first.steps, first.seq_length, first.global_batch_size) == (8, 256, 1)
    assert "training.resume_exp_folder=external_phase1" in first.overrides
    assert (
        "training.resume_exp_folder=external_phase1"
        not in runs["ext-smol135-fa-32K-from-import"].overrides
    )
    assert {runs[n].seq_length for n in runs if n.startswith("ext-")} == {512}


def test_without_the_weights_what_starts_from_them_is_left_out_and_named(prepared):
    assert set(prepared.absent) == {run.name for run in prepared.plan.runs if "import" in run.name}
    (reason,) = set(prepared.absent.values())
    assert "scripts/10_seed_external_import_checkpoints.py --model smollm2_135m" in reason
    with pytest.raises(RunError, match="6 runs were left out"):
        external.check_complete(prepared)
    external.check_complete(replace(prepared, absent={}))


def test_other_data_and_the_built_in_text_at_once_are_refused():
    with pytest.raises(UserError, match="--bootstrap-token-data"):
        external.prepare(flags(model="smollm2_135m", bootstrap_token_data=True, dclm_root="x"))


def test_absent_runs_are_not_run_and_the_others_are(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("STUB_READY", str(tmp_path / "ready"))
    monkeypatch.setenv("STUB", "")
    (tmp_path / "calls").touch()
    places = {"exp_dir": str(tmp_path / "e"), "data_root": str(tmp_path / "d")}
    plan = pilot.prepare({**SHORT, **places})
    first, second = (run.name for run in plan.plan.runs)
    said = StringIO()
    execute.run(replace(plan, absent={second: "why"}), Console(file=said), train=STUB)
    assert (tmp_path / "calls").read_text().split() == [first]
    execute.run(plan, Console(file=said), train=STUB)
    assert (tmp_path / "calls").read_text().split() == [first, second]


def test_script_12_hands_its_flags_on_and_a_pilot_needs_no_data():
    parser = argparse.ArgumentParser()
    parser.add_argument("--exp-folder", default="f")
    groups = (getattr(external_flags, name) for name in ("MODEL", "PROFILES", "PLAN", "PLACES"))
    external_flags.add(parser, *groups, external_flags.EVALUATION)
    for step in external_research.STEPS:
        parser.add_argument(f"--skip-{step}", action="store_true")

    def words(*given):
        args = parser.parse_args(list(given))
        return [" ".join(c) for c in external_research.commands(args, Path("s"))]

    prepare, seed, train, evaluate = words("--model", "smollm2_135m", "--override", "a.b=c d")
    assert prepare == "s/07_prepare_external_models.py --model smollm2_135m --out-root " + str(
        Path("artifacts/external_models")
    )
    assert "--exp-folder external_phase1" in seed
    assert "--bootstrap-token-data" in train
    assert "--override a.b=c d" in train
    assert "--exp-folder f" in train
    assert "--niah-answer-tokens 16" in evaluate
    *_, train, evaluate = words("--skip-prepare-profiles", "--budget", "full", "--data-root", "/d")
    assert "--bootstrap-token-data" not in train
    assert "--niah-answer-tokens" not in evaluate


def test_a_failed_step_does_not_hide_and_a_mistake_ends_it(tmp_path):
    def script(code):
        path = tmp_path / f"{code}.py"
        path.write_text(
            f"import sys; open({str(tmp_path / 'log')!r}, 'a').write('{code} ')\nsys.exit({code})\n"
        )
        return [str(path)]

    assert external_research.run([script(1), script(0)], lambda text: None) == 1
    assert external_research.run([script(2), script(0)], lambda text: None) == 2
    assert (tmp_path / "log").read_text().split() == ["1", "0", "2"]


def test_a_child_is_stopped_as_its_parent_is(tmp_path):
    script = (
        "import os, signal, time\n"
        f"os.kill({__import__('os').getpid()}, signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(Stopped):
        children.call([__import__("sys").executable, "-c", script])


# ---- evaluations -----------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Two runs of a folder, one simulated; `evaluate` leaves rows, or none for `broken`."""
    calls = []

    def checkpoint(name, mode):
        step = tmp_path / "c" / "f" / name / "3"
        (step / "manifest").mkdir(parents=True)
        stored = {"training": {"runtime_mode": mode, "seq_length": 64, "eval_batch_size": 2,
                               "dataset_name": "books"}, "model": {"name": "mine"}}  # fmt: skip
        (step / "manifest" / "manifest.json").write_text(json.dumps({"config": stored}))

    def measure(command, arguments, log, checkpoints):
        run = arguments[0].split("/")[-1]
        calls.append(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("error: no memory\n")
        name = next(a.split("=")[1] for a in arguments if a.startswith("evaluation.name="))
        place = tmp_path / "e" / "f" / run / "eval" / f"{name}-3"
        place.mkdir(parents=True)
        if run != "broken":
            row = {"suite": "loss_by_context", "run": run, "step": 3, "context": 64,
                   "measure": "loss", "learning": True, "value": 2.5, "failed": ""}  # fmt: skip
            (place / "loss_by_context.json").write_text(json.dumps({"rows": [row]}))
            (place / "run.json").write_text(
                json.dumps({"status": "finished", "attempts": [{"status": "finished"}]})
            )
        return 0

    monkeypatch.setattr(external_eval, "measure", measure)

    def run(names=("one",), **given):
        for name in names:
            checkpoint(name, "simulate" if name == "simulated" else "jax")
        parser = argparse.ArgumentParser()
        external_flags.add(parser, external_flags.EVALUATION, external_flags.PLACES, **given)
        own = {"exp_folder": "f", "runs": None, **vars(parser.parse_args([]))}
        places = {"exp_dir": str(tmp_path / "e"), "checkpoint_root": str(tmp_path / "c")}
        planned = external_eval.prepare({**own, **places})
        return planned, external_eval.run(planned, lambda text: None, strict=given.get("strict"))

    run.calls = calls
    return run


def test_runs_are_evaluated_at_their_context_and_twice_it_and_once(evaluated):
    planned, rows = evaluated()
    (call,) = evaluated.calls
    assert "evaluation.loss_by_context.contexts=[64,128]" in call
    assert "evaluation.dataset_name=books" in call
    assert [row["value"] for row in rows] == [2.5]
    external_eval.check(rows)
    assert external_eval.run(planned, lambda text: None) == rows
    assert len(evaluated.calls) == 1
    page = external_report.to_markdown(rows)
    assert "loss at 64" in page
    assert "2.5000" in page


def test_a_page_has_needles_and_written_text_by_the_names_of_their_suites():
    """As `ttt.evaluation.needles` and `long_decoding` write them."""
    of = {"run": "one", "dataset": "d", "learning": True, "context": 64}
    needle = {"suite": "needles", "measure": "accuracy", "task": "niah_single_1", "value": 0.75}
    text = {"suite": "long_decoding", "measure": "log_loss", "text": "written", "value": 3.25}
    page = external_report.to_markdown(
        [
            of | needle | {"depth": "all", "reach": "all"},
            of | needle | {"depth": "all", "reach": "inside", "value": 0.5},
            of | text | {"half": "decoded", "repetition_penalty": 1.1},
        ]
    )
    assert "niah_single_1 at 64" in page
    assert "log-loss decoded, penalty 1.1" in page
    assert "| 0.75 | 3.2500 |" in page


def test_an_evaluation_without_rows_is_a_failed_row(evaluated):
    _, rows = evaluated(names=("one", "broken"))
    assert [bool(row.get("failed")) for row in rows] == [True, False]
    with pytest.raises(RunError, match="broken: error: no memory"):
        external_eval.check(rows)


def test_a_run_without_weights_is_named_and_with_strict_a_failure(evaluated):
    _, rows = evaluated(names=("one", "simulated"), strict=True)
    assert [row["run"] for row in rows if row.get("failed")] == ["simulated"]


# ---- prose and code --------------------------------------------------------------------------


@pytest.fixture
def two_kinds(tmp_path, monkeypatch):
    """Twenty speeches in an archive, six modules; a token is a byte or so."""
    foreign = pytest.importorskip("foreign")
    monkeypatch.setattr(prose_and_code, "LENGTH", 32)
    monkeypatch.setattr(prose_and_code, "LONG", 128)
    archive = tmp_path / prose_and_code.ARCHIVE
    with tarfile.open(archive, "w:gz") as file:
        for number in range(20):
            data = (f"speech {number:02d} " * (1 + 4 * number)).encode()
            info = tarfile.TarInfo(f"package/data/{number}.txt")
            info.size = len(data)
            file.addfile(info, BytesIO(data))
        file.addfile(tarfile.TarInfo("package/index.js"), BytesIO(b""))
    modules = {}
    for split, count in {"train": 3, "dev": 1, "val": 2}.items():
        modules[split] = tuple(tmp_path / f"{split}{i}.py" for i in range(count))
        for path in modules[split]:
            path.write_text(f"def {path.stem}(): return 1\n" * 30)
    monkeypatch.setattr(builtin, "corpus", lambda: Corpus("modules", modules))
    foreign.small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return archive


def test_prose_and_code_in_whole_sequences_of_one_document(two_kinds, tmp_path, monkeypatch):
    digest = prose_and_code.hashlib.sha256(two_kinds.read_bytes()).hexdigest()
    monkeypatch.setattr(prose_and_code, "_SHA256", digest)
    root = tmp_path / "store"
    prose_and_code.ensure(root, tmp_path / "tokenizer.json")
    bos = token_store.read_attributes(root)["bos_token_id"]
    assert set(token_store.splits(root)) == {
        "train", "dev", "val_prose", "val_code", "long_prose", "long_code",
    }  # fmt: skip
    for split in token_store.splits(root):
        ids = np.asarray(token_store.open_split(root, split)[:])
        assert len(ids) % 32 == 1, split
        assert ids[-1] == bos
        starts = np.flatnonzero(ids == bos)
        assert not np.any(starts % 32), split  # every document begins with a sequence
        if split.startswith("val"):
            assert np.all(np.diff(starts) == 32)
        if split.startswith("long"):
            assert np.all(np.diff(starts) == 128)
    prose_and_code.ensure(root, None)  # it is there


def test_another_archive_and_a_missing_tokenizer_are_refused(two_kinds, tmp_path):
    with pytest.raises(UserError, match="is pinned to"):
        prose_and_code.ensure(tmp_path / "store", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no checkpoint with a tokenizer"):
        prose_and_code.ensure(tmp_path / "store", None)
    assert not (tmp_path / "store").exists()


# ---- the study -------------------------------------------------------------------------------


def test_the_best_trial_of_an_arm_gives_its_rates(tmp_path):
    own = study.Study.load(
        {"study": "adaptation_study", "exp_folder": "s", "exp_dir": str(tmp_path)}
    )
    trials = own.content["trials"]["e2e"]
    with pytest.raises(UserError, match="run the trials first"):
        own.best_rates("e2e")
    for loss, rates in zip((3.0, 2.5, 2.75), trials, strict=True):
        folder = tmp_path / "s_trials" / study.trial_name("e2e", rates)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 5, "final_eval_loss": loss}) + "\n"
        )
    assert own.best_rates("e2e") == tuple(trials[1])
    counts = {len(own.content["trials"][arm]) for arm in own.content["arms"]}
    assert len(counts) == 1  # as many trials for every arm


def test_every_arm_has_its_line_whatever_its_rows_say_of_learning():
    runs = ["fa", "prime", "e2e", "e2e"]
    table = pd.DataFrame({"run": runs, "learning": [False, False, True, False]})
    found = {reader: own.learning.tolist() for reader, own in study_report._readers(table)}
    assert found == {"fa": [False], "prime": [False], "e2e": [True], study_report.STILL: [False]}


def test_the_share_recovered_is_that_of_known_sums(tmp_path):
    """d′ − c is 0.4 nats beyond the window and d′ − e 0.1, in every document."""
    at = {"fa": 2.0, "prime": 2.4, "e2e": 2.3, "e2e off": 2.45}
    rng = np.random.default_rng(0)
    rows = []
    for document in range(12):
        hard = rng.normal()
        for name, loss in at.items():
            for first, last in ((0, 512), (512, 1024), (1024, 2048)):
                run, off = name.split()[0], name.endswith("off")
                own = loss + hard if first else 3.0
                n = last - first
                rows.append([run, not off, 2048, document, first, last, own * n, n])
    columns = [
        "run",
        "learning",
        "context",
        "document",
        "position_from",
        "position_to",
        "nll",
        "count",
    ]
    (tmp_path / "eval").mkdir()
    path = tmp_path / "eval" / "loss_by_context-documents.csv"
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    losses = study_report.Losses(tmp_path)
    assert losses.documents == 12
    assert losses.readers == ["fa", "prime", "e2e", study_report.STILL]
    share = losses.recovered(512, 2048)
    assert share is not None
    assert float(share.value) == pytest.approx(0.25)
    assert float(share.low) == pytest.approx(0.25)
    gain = losses.difference(study_report.STILL, "e2e", 512, 2048)
    assert float(gain.value) == pytest.approx(0.15)
    assert losses.recovered(0, 512) is None  # there is no advantage to recover
    assert "25.0%" in study_report._headline(losses, 512)
