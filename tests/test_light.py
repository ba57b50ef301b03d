"""Counting in the network's place and beside it: its numbers, its runs, what it refuses."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_train import (  # noqa: F401 - fixtures
    configure,
    losses_of,
    record_of,
    store,
    train_until_killed,
    weights_of,
)

from ttt import generate, train
from ttt.config import ConfigError, differences, to_dict
from ttt.core.batch import Batch, from_tokens
from ttt.dataloader import lm_dataset, token_store
from ttt.errors import UserError
from ttt.infra import step_folders
from ttt.infra.checkpoint import Checkpoints
from ttt.model import trained
from ttt.report import frame
from ttt.training import light, step
from ttt.training import run as training_run
from ttt.training.count_model import CountModel

COUNTS = "training.runtime_mode=token_stats"
SIMULATE = "training.runtime_mode=simulate"


@pytest.fixture(autouse=True)
def never_compiled(request, monkeypatch):
    """No test of this file may reach the network's step but those that train one."""
    if "trains" not in request.node.name:
        monkeypatch.setattr(step, "compile_step", lambda *arguments: pytest.fail("compiled"))


def checkpoints_of(config) -> Checkpoints:
    training = config.training
    root = config.deploy_paths.checkpoint
    return Checkpoints(step_folders.run_folder(root, training.exp_folder, training.exp_name))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def training_batches(config, count: int) -> list[Batch]:
    """The first batches of training, by the samples' own numbers."""
    training, data = config.training, training_run.open_data(config).train
    shape = {"global_batch_size": training.global_batch_size, "seed": training.data_seed}
    numbers = (lm_dataset.samples_of_batch(data, n, **shape) for n in range(count))
    bos = config.model.bos_token_id
    return [from_tokens(np.stack([data[i] for i in of_batch]), bos) for of_batch in numbers]


# ---- the model -------------------------------------------------------------------------------


def random_batch(seed: int, vocab_size: int, shape=(3, 40)) -> Batch:
    """Few of the tokens, unevenly, and BOS (0) now and then."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 1, 2, 4, vocab_size - 1], p=[0.1, 0.4, 0.2, 0.1, 0.2], size=shape)
    return from_tokens(ids, bos_token_id=0)


def dense(batches: list[Batch], vocab_size: int, context: tuple[int, ...]) -> np.ndarray:
    """p(· | context) over the vocabulary as the formula reads, n-gram by n-gram in plain loops."""
    if context:
        lower = dense(batches, vocab_size, context[1:])
    else:
        lower = np.full(vocab_size, 1 / vocab_size)
    seen = Counter()
    for batch in batches:
        for inputs, targets, mask in zip(*batch, strict=True):
            for t in range(len(targets)):
                before = inputs[: t + 1]
                long_enough = len(before) >= len(context)
                if (
                    mask[t]
                    and long_enough
                    and tuple(before[len(before) - len(context) :]) == context
                ):
                    seen[int(targets[t])] += 1
    counts = np.zeros(vocab_size)
    counts[list(seen)] = list(seen.values())
    total, kinds = counts.sum(), len(seen)
    return (counts + kinds * lower) / (total + kinds) if total else lower


def rows_of(model: CountModel, contexts: list[tuple[int, ...]]) -> np.ndarray:
    """p(· | context) of the model, by asking it for every token."""
    vocab = model.vocab_size
    rows = []
    for context in contexts:
        inputs = np.broadcast_to(np.array(context), (vocab, len(context)))
        targets = np.zeros_like(inputs)
        targets[:, -1] = np.arange(vocab)
        rows.append(np.exp(-model.nll(inputs, targets)[:, -1]))
    return np.stack(rows)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_a_dense_table_and_every_row_sums_to_one(order):
    batches = [random_batch(seed, 7) for seed in (0, 1)]
    model = CountModel.empty(7, order)
    for batch in batches:
        model = model.plus(*batch)
    assert model.tokens == sum(batch.loss_mask.sum() for batch in batches)
    contexts = [(1,), (6,), (3,), (1, 2), (3, 1), (2, 5), (4, 0)]  # 3 and 5 never occur
    expected = [
        dense(batches, 7, context[max(0, len(context) - order + 1) :]) for context in contexts
    ]
    found = rows_of(model, contexts)
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert found.min() > 0


def test_a_vocabulary_of_128256_is_counted_like_a_small_one():
    vocab = 128256
    batches = [random_batch(seed, vocab) for seed in (0, 1)]
    model = CountModel.empty(vocab).plus(*batches[0]).plus(*batches[1])
    found = rows_of(model, [(vocab - 1,), (1,), (77,)])
    expected = [dense(batches, vocab, (token,)) for token in (vocab - 1, 1, 77)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-9)
    assert found.min() > 0


def test_nothing_counted_is_uniform():
    assert CountModel.empty(8).nll(np.array([[1]]), np.array([[2]])) == pytest.approx(np.log(8))


def test_counting_in_parts_is_counting_at_once_whatever_is_masked():
    parts = [random_batch(seed, 9) for seed in range(4)]
    whole = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    by_part = CountModel.empty(9, 3)
    for part in parts:
        by_part = by_part.plus(*part)
    nothing = np.zeros_like(whole[2])
    at_once = CountModel.empty(9, 3).plus(*whole).plus(*whole[:2], nothing)
    for ours, theirs in zip(by_part.tables, at_once.tables, strict=True):
        np.testing.assert_array_equal(ours.keys, theirs.keys)
        np.testing.assert_array_equal(ours.counts, theirs.counts)


# ---- runs that count ----------------------------------------------------------------------------


def test_token_stats_leaves_the_record_and_the_numbers_of_a_run(configure):  # noqa: F811
    config = configure(COUNTS, "training.eval_every_steps=3")
    train.run(config)
    batches = training_batches(config, 6)
    model, score, expected = CountModel.empty(258), light.scorer(config), []
    for batch in batches:
        mask = batch.loss_mask.reshape(4, 4, 16)  # four sequences of four chunks
        nll = model.nll(*batch[:2]).reshape(mask.shape)
        expected.append(np.mean((nll * mask).sum(axis=2) / np.maximum(mask.sum(axis=2), 1)))
        model = model.plus(*batch)
    assert losses_of(config) == pytest.approx(expected)
    assert expected[0] == pytest.approx(np.log(258))
    record = record_of(config)
    rows = record.metrics()
    assert all(row["tokens_per_second"] > 0 for row in rows if "loss" in row)
    assert [(row["step"], row["split"]) for row in rows if "eval_loss" in row] == [(3, "val")]
    assert record.run()["status"] == "finished"
    assert not any("gradient" in name or "inner" in name for row in rows for name in row)
    summary = json.loads((record.folder / "eval/loss_by_position-6.json").read_text())
    nll, count = np.zeros(64), np.zeros(64)
    for batch in training_run.open_data(config).evaluation.batches(2, most=2):
        scores = score(model, batch)
        nll += (scores.token_nll * scores.loss_mask).sum(axis=0)
        count += scores.loss_mask.sum(axis=0)
    assert summary["loss"] == pytest.approx(nll.sum() / count.sum())
    assert [row["final_eval_loss"] for row in rows if "final_eval_loss" in row] == [summary["loss"]]
    assert summary["split"] == "val"
    assert summary["chunk_loss"] != summary["loss"]
    assert "loss_without_learning" not in summary  # though the method is e2e
    with np.load(record.folder / "eval/loss_by_position-6.npz") as arrays:
        np.testing.assert_allclose(arrays["learning_nll"], nll)
    assert "token_stats" in (record.folder / "eval/loss_by_position-6.csv").read_text()
    assert (record.folder / "loss_by_position-6.png").stat().st_size > 10_000


def test_a_development_split_serves_every_loss_and_is_named_beside_it(
    configure,  # noqa: F811
    tmp_path,
    store,  # noqa: F811
):
    tokens = token_store.open_split(store, "train")[:]
    splits = {"train": tokens, "dev": tokens[:1500], "test": tokens[2000:2100]}
    token_store.write(tmp_path / "own", splits, attributes={"bytes_per_token": {"dev": 2.0}})
    config = configure(
        COUNTS,
        "training.eval_split=dev",
        "training.eval_every_steps=3",
        f"deploy_paths.data.text={tmp_path}/own",
    )
    assert config.evaluation.split == "dev"
    train.run(config)
    rows = record_of(config).metrics()
    losses = ("start_loss", "eval_loss", "final_eval_loss")
    named = [row["split"] for row in rows if any(name in row for name in losses)]
    assert named == ["dev"] * 3
    folder = record_of(config).folder / "eval"
    summary = json.loads((folder / "loss_by_position-6.json").read_text())
    assert (summary["split"], summary["evaluation_seed"], summary["sequences"]) == ("dev", 0, 4)
    assert summary["bits_per_byte"] == pytest.approx(summary["loss"] / np.log(2) / 2)
    assert ",dev," in (folder / "loss_by_position-6.csv").read_text()
    (run,) = frame.rows_of(frame.read(record_of(config).folder.parent, None))
    assert (run.split, run.bits_per_byte) == ("dev", summary["bits_per_byte"])
    assert run.validation_loss == summary["loss"]
    fingerprint = token_store.fingerprint(tmp_path / "own", "dev")
    assert run.evaluated_on == f"{fingerprint}, 4 stretches of dev drawn with seed 0"


def test_a_killed_count_goes_on_bit_for_bit(configure, monkeypatch):  # noqa: F811
    straight = configure(COUNTS, "training.exp_name=straight")
    train.run(straight)
    killed = configure(COUNTS, "training.exp_name=killed")
    train_until_killed(killed, monkeypatch, step=5)
    assert record_of(killed).run()["status"] == "interrupted"
    train.run(killed)
    assert losses_of(killed) == losses_of(straight)
    saved, again = weights_of(straight), weights_of(killed)
    assert saved.keys() == again.keys()
    for name, array in saved.items():
        assert array.dtype == np.int64  # JAX's own integers would end at 2 ** 31
        np.testing.assert_array_equal(array, again[name])


def test_a_child_takes_the_counts_of_its_parent_and_counts_on(configure):  # noqa: F811
    parent = configure(COUNTS, "training.exp_name=parent")
    train.run(parent)
    from_parent = ["training.resume_exp_name=parent", COUNTS]
    child = configure(
        "training.exp_name=child", "training.load_part=params", "training.data_seed=5", *from_parent
    )
    train.run(child)
    model = CountModel.empty(258)
    for batch in training_batches(parent, 6):
        model = model.plus(*batch)
    first = training_batches(child, 1)[0]
    assert losses_of(child)[0] == pytest.approx(light.scorer(child)(model, first).loss.mean())
    assert len(losses_of(child)) == 6
    attempt = record_of(child).run()["attempts"][0]
    account, start = attempt["restored"], attempt["start"]
    assert start["preserving"]
    assert start["warm_loss"] == start["parent_loss"] == pytest.approx(start["loss"])
    assert start["split"] == "val"
    assert sorted(account["restored"]) == sorted(weights_of(parent))
    assert account["from"].endswith("parent/6")
    whole = ["training.load_part=all", "training.total_steps=8", "training.eval_start_batches=2"]
    later = configure("training.exp_name=later", *whole, *from_parent)
    train.run(later)
    assert [row["step"] for row in record_of(later).metrics() if "loss" in row] == [7, 8]
    # Before its first step it is measured on as much as the parent was in the end.
    summary = json.loads((record_of(parent).folder / "eval/loss_by_position-6.json").read_text())
    start = record_of(later).run()["attempts"][0]["start"]
    assert start["parent_loss"] == pytest.approx(summary["loss"])


def test_counts_of_another_vocabulary_are_refused(configure):  # noqa: F811
    train.run(configure(COUNTS))
    child = configure(
        COUNTS,
        "training.exp_name=child",
        "model.vocab_size=300",
        "training.load_part=params",
        "training.resume_exp_name=pretrain-tiny-e2e",
    )
    with pytest.raises(UserError, match=r"vocabulary of 258.*model.vocab_size=300"):
        train.run(child)
    assert not record_of(child).folder.exists()


# ---- runs that do nothing --------------------------------------------------------------------


def test_a_simulated_run_leaves_steps_and_tokens_and_no_number_it_did_not_measure(
    configure,  # noqa: F811
    caplog,
):
    config = configure(SIMULATE)
    train.run(config)
    record = record_of(config)
    assert record.run()["status"] == "finished"
    assert record.metrics() == [{"step": 6, "tokens": 6 * 4 * 64}]
    assert record.run()["attempts"][0]["start"] is None
    assert not (record.folder / "eval").exists()
    assert not list(record.folder.glob("*.png"))
    checkpoints = checkpoints_of(config)
    manifest = checkpoints.manifest(6)
    assert manifest["config"]["training"]["runtime_mode"] == "simulate"
    assert checkpoints.loader_state(6) == {"next_index": 6}
    before = contents(record.folder)
    with caplog.at_level("INFO"):
        train.run(config)
    assert "is finished at step 6" in caplog.text
    assert before == {
        path: path.read_bytes() for path in record.folder.rglob("*") if path.is_file()
    }


def test_a_simulated_child_needs_its_parent_and_names_it_in_its_account(configure):  # noqa: F811
    child = configure(
        SIMULATE,
        "training.exp_name=child",
        "training.load_part=params",
        "training.resume_exp_name=pretrain-tiny-e2e",
    )
    with pytest.raises(UserError, match=r"no checkpoint in .*/pretrain-tiny-e2e"):
        train.run(child)
    assert not record_of(child).folder.exists()
    train.run(configure(SIMULATE))
    train.run(child)
    account = record_of(child).run()["attempts"][0]["restored"]
    assert account["from"].endswith("pretrain-tiny-e2e/6")


def test_a_simulated_run_checks_its_data(configure):  # noqa: F811
    with pytest.raises(UserError, match=r"fewer than training.global_batch_size=4000"):
        train.run(configure(SIMULATE, "training.global_batch_size=4000"))


# ---- no mode goes on from another's ------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "asked"),
    [("token_stats", "jax"), ("simulate", "jax"), ("simulate", "token_stats")],
)
def test_a_parent_of_another_mode_is_refused_with_the_way_out(configure, made, asked):  # noqa: F811
    train.run(configure(f"training.runtime_mode={made}"))
    child = configure(
        f"training.runtime_mode={asked}",
        "training.exp_name=child",
        "training.load_part=params",
        "training.resume_exp_name=pretrain-tiny-e2e",
    )
    with pytest.raises(UserError) as refusal:
        train.run(child)
    for part in (f"runtime_mode={made}", f"runtime_mode={asked}", "pretrain-tiny-e2e/6"):
        assert part in str(refusal.value)
    assert not record_of(child).folder.exists()


def test_a_run_does_not_go_on_in_another_mode_even_if_allowed_to_differ(configure):  # noqa: F811
    train.run(configure(COUNTS))
    again = configure("training.allow_config_change=true")
    with pytest.raises(UserError, match=r"made under training.runtime_mode=token_stats"):
        train.run(again)


def test_evaluate_and_generate_refuse_what_holds_no_network(configure):  # noqa: F811
    train.run(configure(COUNTS))
    config = configure("generate.prompt=fox", "generate.tokenizer=bytes")
    with pytest.raises(UserError, match=r"holds counts of tokens; this run needs a network"):
        trained.load(config)
    with pytest.raises(UserError, match=r"holds counts of tokens; this run needs a network"):
        generate.run(config)


def test_light_modes_in_several_processes_are_refused(configure):  # noqa: F811
    with pytest.raises(ConfigError, match=r"runtime_mode=token_stats.*distributed=false"):
        configure(COUNTS, "backend.distributed=true")


# ---- beside every trained model ----------------------------------------------------------------


def test_a_network_that_trains_is_shown_against_the_counts_of_the_same_data(
    configure,  # noqa: F811
    caplog,
):
    config = configure(  # as many tokens as one step takes
        "training.total_steps=1",
        "training.count_model_tokens=256",
        "model.suffix_len=0",
        experiment="pretrain/pretrain-tiny-fa",
    )
    with caplog.at_level("INFO"):
        train.run(config)
    folder = record_of(config).folder / "eval"
    summary = json.loads((folder / "loss_by_position-1.json").read_text())
    loss = summary["count_model_loss"]
    counted = configure(
        COUNTS,
        "training.exp_name=counted",
        "training.total_steps=1",
        "model.suffix_len=0",
        experiment="pretrain/pretrain-tiny-fa",
    )
    train.run(counted)
    beside = record_of(counted).folder / "eval/loss_by_position-1.json"
    # A run that counts instead, on the same batch, ends at the same loss on the same tokens.
    assert summary["count_model_loss"] == pytest.approx(json.loads(beside.read_text())["loss"])
    (batch,) = training_batches(config, 1)
    assert summary["count_model_tokens"] == batch.loss_mask.sum()
    assert summary["loss"] > loss
    assert (
        "this model does not beat a count of token pairs" in caplog.text
    )  # after one step it cannot


def assert_counted(model: CountModel, batches: list[Batch], sequences: int | None = None) -> None:
    """The model is that of the sequences, counted one after another."""
    expected, left = CountModel.empty(258), sequences
    for batch in batches:
        expected = expected.plus(*(array[:left] for array in batch))
        left = None if left is None else max(0, left - len(batch.inputs))
    for ours, theirs in zip(model.tables, expected.tables, strict=True):
        np.testing.assert_array_equal(ours.keys, theirs.keys)
        np.testing.assert_array_equal(ours.counts, theirs.counts)


@pytest.mark.parametrize(("asked", "sequences"), [(1, 1), (130, 2), (400, 6), (10**7, None)])
def test_every_training_token_is_counted_up_to_the_setting(
    configure,  # noqa: F811
    monkeypatch,
    asked,
    sequences,
):
    config = configure(f"training.count_model_tokens={asked}")
    source, batches = training_run.open_data(config).train, training_batches(config, 6)
    for at_once in ((1, 1), (1, 700), (1 << 20, 1 << 20)):
        monkeypatch.setattr(light, "_COUNTED_AT_ONCE", at_once)
        assert_counted(light.count(config, source), batches, sequences)


def test_what_training_reads_twice_is_counted_twice(configure):  # noqa: F811
    # An epoch has 70 batches.
    config = configure("training.total_steps=100", "training.count_model_tokens=1000000")
    model = light.count(config, training_run.open_data(config).train)
    assert_counted(model, training_batches(config, 100))


def test_beside_a_run_with_a_parent_more_is_counted_than_it_reads_itself(
    configure,  # noqa: F811
    monkeypatch,
):
    child = ["training.load_part=params", "training.resume_exp_name=parent"]
    config = configure(*child, "training.total_steps=1", "training.count_model_tokens=10000")
    source = training_run.open_data(config).train
    monkeypatch.setattr(light, "_BESIDE_A_PARENT", 1600)
    assert_counted(light.count(config, source), training_batches(config, 7), 25)
    monkeypatch.undo()
    assert_counted(light.count(config, source), training_batches(config, 70), 10000 // 64)


def test_a_model_below_the_count_model_is_told_by_how_much(caplog):
    with caplog.at_level("INFO"):
        light.log_comparison(2.2, 3.1, 4_000_000)
    assert "count model of 4,000,000 tokens: 3.100 nats per token; this model is 0.900 below" in (
        caplog.text
    )
    assert "does not beat" not in caplog.text


def test_how_much_is_counted_beside_a_run_is_no_change_of_the_run(configure):  # noqa: F811
    without, with_it = (configure(f"training.count_model_tokens={n}") for n in (0, 100))
    assert differences(to_dict(without), to_dict(with_it)) == {}
