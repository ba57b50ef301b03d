"""`evaluate` from start to end: rows, records, pictures, failures, refusals, the harness."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
import tokenizers

from ttt import evaluate
from ttt.config import compose, resolve, to_dict
from ttt.dataloader import token_store
from ttt.dataloader.text import ByteTokenizer
from ttt.errors import UserError
from ttt.evaluation import resources, suite
from ttt.evaluation.judge import ForeignJudge, OwnJudge
from ttt.evaluation.loss_by_context import LossByContext
from ttt.evaluation.resources import LoadedModels
from ttt.inference.engine import Engine, Written
from ttt.infra import step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.record import RunRecord
from ttt.model import loop, trained
from ttt.training import light
from ttt.training.count_model import CountModel
from ttt.training.start import as_items

SMALL = [
    "data=bytes",
    "training.sample_tokens=0",
    "size.intermediate_size=32",
    "size.window=24",
    "size.chunk=16",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.initializer_range=0.3",
    "training.seq_length=64",
    "training.global_batch_size=4",
    "training.eval_batch_size=4",
    "backend.compilation_cache_dir=''",  # the tests' own is set already
    "evaluation.resamples=50",
    "evaluation.loss_by_context.contexts=[64,128]",
    "evaluation.loss_by_context.tokens=512",
    "evaluation.needles.tasks=[niah_single_1]",
    "evaluation.needles.lengths=[600]",
    "evaluation.needles.depths=2",
    "evaluation.needles.tokens_to_generate=16",
    # As long as the needles' prompts, as many, and greedy: the same compiled programs.
    "evaluation.long_decoding.prefill=560",
    "evaluation.long_decoding.decode=40",
    "evaluation.long_decoding.sequences=2",
    "evaluation.long_decoding.temperature=0",
    "evaluation.long_decoding.repetition_penalty=1",
]
LEARNING = {"e2e": ["model.suffix_len=1"], "swa": [], "fa": []}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A token store, and an untrained checkpoint and a record of each method."""
    root = tmp_path_factory.mktemp("evaluate")
    text = b"the quick brown fox jumps over the lazy dog; " * 100
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    tokens[::450] = 256
    attributes = {"vocab_size": 258, "bos_token_id": 256, "tokenizer": "bytes"}
    token_store.write(root / "text", {"train": tokens, "val": tokens}, attributes=attributes)
    for method in LEARNING:
        keep_checkpoint(configure(root, method), step=3)
    return root


def command_line(root: Path, method: str, *overrides: str) -> list[str]:
    return [
        f"+experiment=tiny/pretrain/pretrain-tiny-{method}",
        *SMALL,
        *LEARNING[method],
        f"deploy_paths.checkpoint={root}/checkpoints",
        f"deploy_paths.experiments={root}/experiments",
        f"+deploy_paths.data.text={root}/text",
        "training.dataset_name=text",
        *overrides,
    ]


def configure(root: Path, method: str, *overrides: str):
    return resolve(compose(command_line(root, method, *overrides)))


def keep_checkpoint(config, *, step: int, change=lambda weights: weights) -> None:
    training = config.training
    items = jax.jit(lambda: as_items(loop.init_state(config)))()
    folder = step_folders.run_folder(
        config.deploy_paths.checkpoint, training.exp_folder, training.exp_name
    )
    checkpoints = Checkpoints(folder, keep=9)
    checkpoints.save(
        step,
        model_weights=jax.tree.map(change, items["model_weights"]),
        opt_state=items["opt_state"],
        loader_state={},
        manifest={"config": to_dict(config), "data": {}},
    )
    checkpoints.wait()
    record = RunRecord(Path(config.deploy_paths.experiments) / "default" / training.exp_name)
    record.start(to_dict(config), devices=["cpu"], data={})
    record.finish("finished")


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def values(rows, **wanted) -> list[float]:
    return [float(r["value"]) for r in rows if all(r[k] == v for k, v in wanted.items())]


# ---- the whole command -----------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(root):
    """Two runs and all suites: (exit code, folder of the results)."""
    names = "evaluation.runs=[pretrain-tiny-e2e,pretrain-tiny-fa]"
    config = configure(root, "e2e", names, "evaluation.name=both")
    records = [p for p in (root / "experiments/default").glob("pretrain-*/*") if p.is_file()]
    before = {path: path.read_bytes() for path in records}
    assert len(before) == 6  # config.yaml and run.json of each run
    code = evaluate.run(config)
    assert before == {path: path.read_bytes() for path in records}
    return code, root / "experiments/default/evaluation-both/eval"


def test_command_leaves_tables_notes_pictures_and_a_record_of_its_own(evaluated):
    code, folder = evaluated
    assert code is None
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["attempts"][0]["data"]["val"].startswith("sha256:")
    for name in ("loss_by_context", "needles", "long_decoding"):
        rows, found = rows_of(folder, name), json.loads((folder / f"{name}.json").read_text())
        assert len(found["rows"]) == len(rows)
        assert [r["run"] for r in found["notes"]["runs"]] == [
            "pretrain-tiny-e2e",
            "pretrain-tiny-fa",
        ]
        assert {(r["run"], r["method"], r["step"]) for r in rows} == {
            ("pretrain-tiny-e2e", "e2e", "3"),
            ("pretrain-tiny-fa", "fa", "3"),
        }
        assert all(r["value"] and r["unit"] and int(r["n"]) and not r["failed"] for r in rows)
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"loss_by_position.png", "loss_by_context.png", "needles.png"} < pictures
    assert "long_decoding.png" in pictures
    assert not list(folder.glob("*.tmp"))


def test_loss_of_every_method_at_other_lengths_is_that_of_reading_token_by_token(evaluated, root):
    """Two programs: the evaluation's over whole sequences, and the engine's over pieces."""
    rows = rows_of(evaluated[1], "loss_by_context")
    machine = LoadedModels(evaluate.device_mesh())
    store = token_store.open_split(root / "text", "val")
    stretches = np.random.default_rng(0).permutation((4500 - 1) // 128)[: 512 // 128] * 128
    for method in ("e2e", "fa"):
        (run,) = trained.load(configure(root, method))
        engine = machine.engine(run, 129)
        for context in (64, 128):  # trained at 64
            counted = []
            for part in range(0, 128, context):
                texts = [np.asarray(store[i : i + context + 1]) for i in stretches + part]
                _, nll = engine.read(engine.start(4), texts)
                counted += [n[t[1:] != 256] for n, t in zip(nll, texts, strict=True)]
            wanted = {"run": run.name, "context": str(context), "measure": "loss"}
            (found,) = values(rows, **wanted, learning=str(run.learns))
            assert found == pytest.approx(np.concatenate(counted).mean(), rel=1e-5)
            (bits,) = values(
                rows, **{**wanted, "measure": "bits_per_byte"}, learning=str(run.learns)
            )
            assert bits == pytest.approx(found / np.log(2))  # the store is of bytes


@pytest.mark.slow
def test_batches_that_do_not_divide_into_the_devices_are_filled_up(evaluated, root):
    """Eight sequences on three devices, in a process that believes in three."""
    own = ["evaluation.suites=[loss_by_context]", "evaluation.name=three"]
    ran = subprocess.run(
        [sys.executable, "-m", "ttt.evaluate", *command_line(root, "fa", *own)],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    folder = root / "experiments/default/pretrain-tiny-fa/eval/three-3"
    losses = {"run": "pretrain-tiny-fa", "measure": "loss"}
    expected = values(rows_of(evaluated[1], "loss_by_context"), **losses)
    assert values(rows_of(folder, "loss_by_context"), **losses) == pytest.approx(expected, rel=1e-5)


def test_learning_changes_nothing_before_the_first_step(evaluated):
    rows = rows_of(evaluated[1], "loss_by_context")
    e2e = {"run": "pretrain-tiny-e2e", "context": "128", "measure": "loss_at"}
    on, off = (values(rows, **e2e, learning=learning) for learning in ("True", "False"))
    assert on[0] == off[0]  # the first bin is the first chunk of 16
    assert all(a != b for a, b in zip(on[1:], off[1:], strict=True))
    against = {"context": "128", "measure": "difference"}
    for learning in ("True", "False"):
        (less,) = values(rows, run="pretrain-tiny-e2e", learning=learning, **against)
        (mine,) = values(rows, **{**e2e, "measure": "loss"}, learning=learning)
        (theirs,) = values(rows, run="pretrain-tiny-fa", context="128", measure="loss")
        assert less == pytest.approx(mine - theirs)


def test_differences_of_two_runs_stand_in_the_table_with_their_intervals(evaluated, root):
    known = json.loads((evaluated[1] / "loss_by_context.json").read_text())
    config = configure(
        root, "e2e", "evaluation.runs=[pretrain-tiny-e2e,pretrain-tiny-fa]", "evaluation.name=both"
    )
    shown = LossByContext(config, trained.load(config), LoadedModels(evaluate.device_mesh()))
    table = shown.table(pd.DataFrame(known["rows"]))
    assert table.title == (
        "held-out loss (val), nats per token (difference from pretrain-tiny-fa [95 %])"
    )
    assert table.caption == "1 nat per token is 1.4427 bits per byte"
    (row,) = [
        row
        for row in known["rows"]
        if (row["measure"], row["context"], row["run"], row["learning"])
        == ("difference", 128, "pretrain-tiny-e2e", True)
    ]
    assert row["low"] < row["value"] < row["high"]
    # Stretches of 128 tokens, documents of 450: some lie in two, some share one.
    assert row["n"] == documents_of_stretches(128)
    said = f"({row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}])"
    assert next(iter(table.columns[2].cells)).endswith(said)
    assert {row["split"] for row in known["rows"]} == {"val"}


@pytest.mark.parametrize(
    ("runs", "learning_too", "reference"),
    [
        ("e2e,swa,fa", True, "pretrain-tiny-fa"),
        ("e2e,swa", True, "pretrain-tiny-swa"),
        ("e2e", True, "pretrain-tiny-e2e, not learning"),
        ("e2e", False, "pretrain-tiny-e2e"),
    ],
)
def test_runs_are_held_against_full_attention_else_one_that_never_learns(
    root, runs, learning_too, reference
):
    names = ",".join(f"pretrain-tiny-{method}" for method in runs.split(","))
    more = [f"evaluation.without_learning={learning_too}", "evaluation.loss_by_context.tokens=0"]
    config = configure(root, "e2e", f"evaluation.runs=[{names}]", *more)
    which = LossByContext(config, trained.load(config), LoadedModels(evaluate.device_mesh()))
    columns = ["run", "learning", "context", "measure", "value", "low", "high"]
    title = which.table(pd.DataFrame(columns=columns)).title
    assert f"(difference from {reference} [95 %])" in title
    # 256 stretches of 64 tokens are more than there are: all of the split is read, once.
    assert which.notes()["tokens"] == {"64": 4480, "128": 4480}


def documents_of_stretches(context: int) -> int:
    """How many documents the stretches of the test's evaluation have targets in."""
    starts = np.random.default_rng(0).permutation((4500 - 1) // 128)[:4] * 128
    places = (starts[:, None] + np.arange(1, context + 1)).ravel()
    return len({int(place) // 450 for place in places if place % 450})


def test_both_halves_are_judged_and_the_read_half_does_not_depend_on_the_writer(evaluated):
    rows = rows_of(evaluated[1], "long_decoding")
    loss = [row for row in rows if row["measure"] == "log_loss"]
    assert {row["evaluator"] for row in loss} == {"token pairs of text/train"}
    read = values(loss, half="prefill")
    assert len(read) == 4  # e2e learning and not, full attention, and the held-out text
    assert read == pytest.approx([read[0]] * 4, rel=1e-6)
    assert len({round(value, 6) for value in values(loss, half="decoded")}) == 4
    texts = rows_of(evaluated[1], "long_decoding-texts")
    assert len(texts) == 6
    assert {row["measure"] for row in rows} >= {"distinct_4", "longest_repeat"}


def test_the_penalty_and_none_are_told_apart_and_counts_judge_both(root, monkeypatch):
    def write(engine, prompts, tokens, sampling, **_):
        once = np.arange(97, 97 + tokens) if sampling.repetition_penalty == 1.1 else [97] * tokens
        return [np.array(once, np.int32)] * len(prompts)

    monkeypatch.setattr(resources, "write_on", write)
    ids = np.asarray(token_store.open_split(root / "text", "train"))[None]
    counts = CountModel.empty(258).plus(ids[:, :-1], ids[:, 1:], ids[:, 1:] != 256)
    monkeypatch.setattr(light, "count", lambda config, source: counts)
    own = ["evaluation.suites=[long_decoding]", "evaluation.name=arms"]
    penalty = "evaluation.long_decoding.repetition_penalty=1.1"
    assert evaluate.run(configure(root, "swa", *own, penalty)) is None
    folder = root / "experiments/default/pretrain-tiny-swa/eval/arms-3"
    rows = rows_of(folder, "long_decoding")
    assert values(rows, measure="distinct_1", repetition_penalty="1.1") == [1]
    assert values(rows, measure="distinct_1", repetition_penalty="1.0") == [1 / 40]
    texts = rows_of(folder, "long_decoding-texts")
    assert [row["repetition_penalty"] for row in texts] == ["1.1"] * 2 + ["1.0"] * 2
    # What was read and the held-out text are none of the arms'.
    held_out = np.asarray(token_store.open_split(root / "text", "val"))[:1200].reshape(2, 600)
    nll = counts.nll(held_out[:, :-1], held_out[:, 1:])
    for half, own in (("prefill", nll[:, :559]), ("decoded", nll[:, 559:])):
        true = {"half": half, "text": "held out", "repetition_penalty": ""}
        assert values(rows, measure="log_loss", **true) == [pytest.approx(own.mean())]


def test_a_judge_that_could_learn_does_not(root, monkeypatch):
    (judge,) = trained.load(configure(root, "e2e"))
    engine = LoadedModels(evaluate.device_mesh()).engine(judge, 600, learn=False)
    texts = [np.asarray(token_store.open_split(root / "text", "val"))[i : i + 64] for i in (0, 64)]
    _, nll = engine.read(engine.start(2), texts)
    judged = OwnJudge(judge, LoadedModels(evaluate.device_mesh()), 2).read(texts, 32, print)
    for one, expected in zip(judged, nll, strict=True):
        np.testing.assert_array_equal(one.nll, expected)


def test_one_run_is_kept_beside_its_training_record(root, monkeypatch, scripted):
    config = configure(root, "swa", "evaluation.suites=[needles]", "evaluation.name=mine")
    scripted(lambda prompt: "nothing")
    assert evaluate.run(config) is None
    folder = root / "experiments/default/pretrain-tiny-swa/eval/mine-3"
    assert rows_of(folder, "needles")
    assert (folder / "run.json").exists()


def test_every_named_set_composes():
    for name in ("default", "loss_by_context", "niah", "long_decoding", "paper"):
        experiment = "760m/pretrain/pretrain-760m-e2e"
        asked = resolve(compose([f"+experiment={experiment}", f"+evaluation={name}"])).evaluation
        assert asked.name == name
    assert asked.needles.lengths == (8192, 16384, 32768, 65536, 131072)
    assert (asked.needles.tokens_to_generate, asked.needles.depths) == (128, 40)
    decoding = asked.long_decoding
    assert (decoding.temperature, decoding.top_p, decoding.repetition_penalty) == (1.0, 0.95, 1.1)
    assert (decoding.prefill, decoding.decode) == (8192, 8192)


# ---- needles, with a model whose answers are known -------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Replace the engine by one that answers a prompt's text as a function says."""

    def use(answer):
        class Scripted(Engine):
            def __init__(self):
                pass

            def start(self, sequences):
                return sequences

            def read(self, state, prompts):
                return [bytes(p[1:].astype(np.uint8)).decode() for p in prompts], []

            def write(self, state, tokens, sampling, *, seed, stop):
                assert sampling.temperature == 0
                said = [np.frombuffer(answer(text).encode(), np.uint8) for text in state]
                return state, Written(said, [])

        monkeypatch.setattr(LoadedModels, "engine", lambda *_, **__: Scripted())

    return use


def recall_within(tokens: int):
    """What a model says that sees so many last letters and finds any needle there."""

    def answer(prompt: str) -> str:
        at = prompt.index("One of the special magic")
        value = prompt[at:].split(" is: ")[1].split(".")[0]
        return f"it is {value}, I think" if len(prompt) - at <= tokens else "no idea"

    return answer


NEEDLES = [
    "evaluation.suites=[needles]",
    "evaluation.needles.tasks=[niah_single_1,niah_single_2,niah_single_3]",
    "evaluation.needles.lengths=[800,1600]",
    "evaluation.needles.depths=5",
    "evaluation.needles.samples=2",
]


def test_recall_inside_and_beyond_the_window_is_told_apart(root, scripted):
    config = configure(root, "swa", *NEEDLES, "model.sliding_window_size=500")
    scripted(recall_within(500))
    keep_checkpoint(
        configure(root, "swa", "model.sliding_window_size=500", "training.exp_name=seer"), step=1
    )
    config = configure(root, "swa", *NEEDLES, "training.exp_name=seer")
    assert evaluate.run(config) is None
    folder = root / "experiments/default/seer/eval/default-1"
    rows = rows_of(folder, "needles")
    assert set(values(rows, depth="all", reach="inside")) == {1.0}
    assert set(values(rows, depth="all", reach="beyond")) == {0.0}
    assert values(rows, task="niah_single_2", context="1600", depth="100.0") == [1.0]
    assert values(rows, task="niah_single_2", context="1600", depth="0.0") == [0.0]
    far = [r for r in rows if r["measure"] == "accuracy_at_distance"]
    assert values(far, distance_from="1024", task="niah_single_1") == [0.0]
    assert values(far, distance_from="256", task="niah_single_1") == [1.0]
    answers = rows_of(folder, "needles-answers")
    assert len(answers) == 3 * 2 * 5 * 2
    for row in answers:
        assert (row["reach"] == "inside") == (int(row["distance"]) < 500)
        assert row["right"] == str(int(row["answer"] in row["said"]))
    assert (folder / "needles_by_distance.png").exists()


def test_a_failed_row_fails_the_command_and_the_others_are_kept(root, scripted, caplog):
    def answer(prompt: str) -> str:
        if len(prompt) > 1000:
            raise MemoryError("no room for so long a prompt")
        return "1"

    scripted(answer)
    name = "evaluation.name=failing"
    assert evaluate.run(configure(root, "fa", *NEEDLES, name)) == 1
    folder = root / "experiments/default/pretrain-tiny-fa/eval/failing-3"
    rows = rows_of(folder, "needles")
    failed = [row for row in rows if row["failed"]]
    assert {(row["context"], row["value"]) for row in failed} == {("1600", "")}
    assert len(failed) == 3  # the tasks
    assert failed[0]["failed"] == "MemoryError: no room for so long a prompt"
    assert len(values([r for r in rows if not r["failed"]], context="800", reach="all")) == 3
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert (folder / "needles.png").exists()
    assert "failed: needles of pretrain-tiny-fa at 1600" in caplog.text


# ---- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["training.exp_name=nobody"],
         ["no checkpoint of nobody", "there are pretrain-tiny-e2e, pretrain-tiny-fa"]),
        (["evaluation.runs=[pretrain-tiny-fa,other]"], ["no checkpoint of other"]),
        (["evaluation.step=7"], ["has no step 7", "choose one of 3"]),
        (["evaluation.loss_by_context.contexts=[64,100]"],
         ["contexts=100", "chunks of 16 tokens", "multiple"]),
        (["evaluation.loss_by_context.contexts=[8192]",
          "evaluation.loss_by_context.tokens=8192"],
         ["at 8192 tokens", "holds 4500 tokens", "lower"]),
        (["evaluation.loss_by_context.tokens=100000"], ["tokens=100000", "at most 4480"]),
        (["evaluation.loss_by_context.tokens=64"], ["tokens=64", "128 tokens"]),
        (["evaluation.long_decoding.sequences=99"], ["sequences=99", "lower it"]),
        (["evaluation.needles.haystack=/no/essays.txt",
          "evaluation.needles.tasks=[niah_single_2]"],
         ["haystack=/no/essays.txt", "no such"]),
        (["evaluation.needles.lengths=[200]"], ["lengths=200", "at least"]),
        (["evaluation.tokenizer=/no/tokenizer.json"], ["/no/tokenizer.json", "tokenizer=FILE"]),
        (["evaluation.long_decoding.evaluator=nobody"], ["no checkpoint of nobody"]),
        (
            ["evaluation.long_decoding.evaluator=pretrain-tiny-e2e"],
            ["would judge its own text", "out of evaluation.runs, or name another run"],
        ),
        (["evaluation.long_decoding.evaluator=hf:/no/model"], ["hf:/no/model", "config.json"]),
        (["evaluation.dataset_name=books"], ["dataset_name=books", "+deploy_paths.data.books"]),
        (["backend.distributed=true"], ["one process"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_found_before_anything_is_compiled_or_written(
    root, monkeypatch, overrides, fragments
):
    def never(*_, **__):
        raise AssertionError("measuring began")

    monkeypatch.setattr(suite, "measure", never)
    before = sorted((root / "experiments").rglob("*"))
    with pytest.raises(UserError) as refusal:
        evaluate.run(configure(root, "e2e", *overrides))
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert sorted((root / "experiments").rglob("*")) == before


def test_a_diverged_checkpoint_is_refused(root):
    config = configure(root, "swa", "training.exp_name=diverged", "training.exp_folder=others")
    keep_checkpoint(config, step=1, change=lambda x: np.asarray(x) * np.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate.run(config)


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused(root):
    small = ["training.exp_name=narrow", "training.exp_folder=others", "model.vocab_size=100"]
    ids = ["model.bos_token_id=1", "model.eos_token_id=2", "evaluation.suites=[needles]"]
    config = configure(root, "swa", *small, *ids)
    keep_checkpoint(config, step=1)
    with pytest.raises(
        UserError, match=r"258 ids, BOS 256, .* but narrow has model.vocab_size=100"
    ):
        evaluate.run(config)


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("evaluation.suites=[niah]", "loss_by_context, needles, long_decoding"),
        ("evaluation.needles.tasks=[niah_single_9]", "niah_single_1, niah_single_2"),
        ("evaluation.runs=[a,a]", "each once"),
        ("evaluation.long_decoding.top_p=0", "(0, 1]"),
        ("evaluation.compute_dtype=fp16", "model, fp32, bf16"),
    ],
)
def test_an_unknown_suite_task_or_dtype_is_a_fault_of_the_configuration(root, override, fragment):
    with pytest.raises(UserError, match="1 fault") as refusal:
        configure(root, "e2e", override)
    assert fragment in str(refusal.value)


# ---- the checkpoint's own settings -----------------------------------------------------


def test_a_run_has_the_settings_of_its_own_manifest(root):
    config = configure(root, "e2e", "evaluation.runs=[pretrain-tiny-fa,pretrain-tiny-swa]")
    full, sliding = trained.load(config)
    assert (full.method, full.window, full.config.suffix_len) == ("fa", None, 0)
    assert (sliding.method, sliding.window, sliding.learns) == ("swa", 24, False)
    assert full.at(128).config.mini_batch_size == 128
    assert full.at(128).config.rope_theta == full.config.rope_theta
    jax.tree.map(np.testing.assert_array_equal, full.model, full.model)
    wide = trained.load(configure(root, "fa", "evaluation.compute_dtype=bf16"))[0]
    assert (full.config.compute_dtype, wide.config.compute_dtype) == ("fp32", "bf16")


def test_only_a_run_with_full_attention_in_every_layer_is_cut_to_one_chunk_of_any_length(root):
    (full,) = trained.load(configure(root, "fa"))
    cycle = {"seq_modeling_block": "", "layer_types": ("sliding_attention", "full_attention")}
    config = replace(full.config, mini_batch_size=16, **cycle)
    network = copy.copy(full.model)
    object.__setattr__(network, "config", config)
    mixed = replace(full, model=network)
    assert (mixed.method, mixed.window) == ("hybrid", None)
    assert mixed.at(128) is mixed.model
    assert (mixed.whole_chunks(100), full.whole_chunks(100)) == (112, 100)
    full.check_context(100, "context")
    with pytest.raises(UserError, match=r"context=100: .* chunks of 16 tokens"):
        mixed.check_context(100, "context")


def test_a_published_checkpoint_without_manifest_can_be_used_where_settings_are_auto(
    root, tmp_path
):
    names = step_folders.run_folder(f"{root}/checkpoints", "default", "pretrain-tiny-e2e")
    bare = step_folders.run_folder(f"{tmp_path}/checkpoints", "default", "bare")
    shutil.copytree(names, bare)
    shutil.rmtree(bare / "3" / "manifest")
    (bare / "3" / "hashes.json").unlink()
    auto = ["model.remat_prefix=auto", "model.remat_suffix=auto", "training.inner_remat_freq=0"]
    config = configure(root, "e2e", *auto, "evaluation.runs=[bare]")
    paths = replace(config.deploy_paths, checkpoint=f"{tmp_path}/checkpoints")
    (found,) = trained.load(replace(config, deploy_paths=paths))
    assert (found.config.remat_prefix, found.config.remat_suffix) == ("none", "none")
    assert found.training.inner_remat_freq == 1


# ---- a foreign evaluator ---------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A Hugging Face folder: a small random model that reads words."""
    reason = "torch and transformers are not installed"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    folder = tmp_path_factory.mktemp("foreign")
    words = {"<unk>": 0, "the": 1, "quick": 2, "brown": 3, "fox": 4, "jumps": 5, "lazy": 6}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_foreign_evaluator_scores_its_own_tokens_at_our_positions(foreign):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = "the quick brown fox jumps the lazy"
    ids = ByteTokenizer().encode(text)
    judge = ForeignJudge(str(foreign), ByteTokenizer())
    (judged,) = judge.read([ids], len("the quick "), lambda done: None)
    starts = [4, 10, 16, 20, 26, 30]  # of every word but the first, in letters, which are bytes
    assert judged.position.tolist() == pytest.approx(starts)
    model = transformers.AutoModelForCausalLM.from_pretrained(foreign)
    words = torch.tensor([[1, 2, 3, 4, 5, 1, 6]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(words).logits[0, :-1].double(), dim=-1)
    expected = -log_p.gather(1, words[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(judged.nll, expected, rtol=1e-5)


def test_a_foreign_evaluator_without_its_libraries_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"install --no-config transformers torch.*name one of our runs"
    ):
        ForeignJudge(str(tmp_path), ByteTokenizer())


# ---- the harness -----------------------------------------------------------------------


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def harness(root):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from ttt.evaluation.harness import HarnessModel

    config = configure(root, "e2e")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttt.evaluation.harness.resolve", lambda cfg: config)
        return HarnessModel("tiny/pretrain/pretrain-tiny-e2e", batch_size=2)


def test_harness_scores_a_text_the_same_in_one_piece_and_in_two(harness):
    (whole,) = harness.loglikelihood_rolling(requests(("the quick brown fox jumps over",)))
    ((first, _), (second, _), (third, _)) = harness.loglikelihood(
        requests(
            ("", "the quick"), ("the quick", " brown fox"), ("the quick brown fox", " jumps over")
        )
    )
    assert whole == pytest.approx(first + second + third, rel=1e-5)
    assert whole < 0


def test_harness_calls_a_continuation_greedy_where_it_would_write_it(harness):
    (said,) = harness.generate_until(requests(("the quick", {"max_gen_toks": 5, "until": []})))
    ids = harness._tokenizer.encode("the quick")
    written = harness._engine.read(harness._engine.start(1), [harness._with_bos(ids)])[0]
    ids = harness._engine.write(written, 5)[1].tokens[0]
    asked = [(harness._with_bos(harness._tokenizer.encode("the quick")), ids)]
    wrong = [(asked[0][0], (ids + 1) % 256)]
    assert harness._score(asked + wrong, greedy=True)[0][1] is True
    assert harness._score(asked + wrong, greedy=True)[1][1] is False
    assert said == harness._tokenizer.decode(ids)
