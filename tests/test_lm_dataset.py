"""Batches: the published order, the same on any number of hosts, restored exactly."""

import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt.core.batch import from_tokens
from ttt.dataloader import token_store
from ttt.dataloader.lm_dataset import (
    RandomTokens,
    TokenSource,
    eval_batches,
    open_source,
    train_batches,
)
from ttt.dataloader.token_store import StoreError
from ttt.errors import UserError

BOS = 7


def numbered(samples: int) -> TokenSource:
    """A source of T = 4 in which token j is j: the first input of sample i is 4 · i."""
    tokens = np.arange(4 * samples + 1)
    return TokenSource(tokens, 4, tokens.size, "numbered")


def samples_of(*batches) -> list[int]:
    """Which samples of `numbered` the batches hold, in order."""
    return [int(first) // 4 for batch in batches for first in batch.inputs[:, 0]]


def take(batches, count: int) -> list:
    return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_host_reads_the_published_order(golden):
    order = json.loads((golden / "loader_order.json").read_text())
    store, length = golden / "token_store", order["seq_len"]
    source = open_source(store, "train", seq_length=length, vocab_size=1 << 31, bos_token_id=BOS)
    assert len(source) == order["num_samples"]
    tokens = token_store.open_split(store, "train")[:]
    batches = train_batches(
        source, global_batch_size=order["global_batch_size"], seed=order["seed"], bos_token_id=BOS
    )
    for indices in order["order_one_host"]:
        rows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in indices])
        assert_same(next(batches), from_tokens(rows, BOS))


@pytest.mark.parametrize("host", [0, 1])
def test_two_hosts_read_the_published_order(golden, host):
    order = json.loads((golden / "loader_order.json").read_text())
    batches = train_batches(
        numbered(order["num_samples"]),
        global_batch_size=order["global_batch_size"],
        seed=order["seed"],
        bos_token_id=BOS,
        host=host,
        hosts=2,
    )
    theirs = order["order_two_hosts"][host]
    assert [samples_of(batch) for batch in take(batches, len(theirs))] == theirs


@settings(max_examples=8, deadline=None)
@given(
    samples=st.integers(6, 20),
    share=st.integers(1, 2),
    hosts=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_hosts_together_read_the_batch_of_one(samples, share, hosts, seed):
    options = {"global_batch_size": share * hosts, "seed": seed, "bos_token_id": BOS, "threads": 0}
    one = train_batches(numbered(samples), **options)
    many = [train_batches(numbered(samples), **options, host=h, hosts=hosts) for h in range(hosts)]
    for _ in range(2 * samples // (share * hosts)):
        assert samples_of(next(one)) == samples_of(*map(next, many))


def test_epochs_hold_each_sample_once_in_a_new_order():
    batches = train_batches(numbered(12), global_batch_size=4, seed=0, bos_token_id=BOS)
    first, second = (samples_of(*take(batches, 3)) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_host_reads_no_sample_of_another_host():
    read = []

    class Spy(TokenSource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    tokens = np.arange(49)
    batches = train_batches(
        Spy(tokens, 4, 49, "spy"),
        global_batch_size=4,
        seed=0,
        bos_token_id=BOS,
        host=1,
        hosts=2,
        threads=0,
    )
    assert samples_of(*take(batches, 3)) == read


def test_position_restores_the_stream_exactly_on_any_number_of_hosts():
    options = {"global_batch_size": 4, "seed": 5, "bos_token_id": BOS}
    batches = train_batches(numbered(13), **options)
    take(batches, 4)
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {"next_index": 4}
    expected = take(batches, 5)
    batches.set_state(state)
    later = train_batches(numbered(13), **options)
    later.set_state(state)
    half = train_batches(numbered(13), **options, host=1, hosts=2)
    half.set_state(state)
    for batch in expected:
        assert_same(next(batches), batch)
        assert_same(next(later), batch)
        assert_same(next(half), [leaf[2:] for leaf in batch])


@given(n=st.integers(3, 60), seq_length=st.integers(2, 9))
def test_samples_tile_the_split_and_overlap_by_one_token(n, seq_length):
    tokens = np.arange(n)
    if n <= seq_length:
        with pytest.raises(StoreError, match=f"holds {n} tokens"):
            TokenSource(tokens, seq_length, n, "short")
        return
    source = TokenSource(tokens, seq_length, n, "tokens")
    assert len(source) == (n - 1) // seq_length
    for i in range(len(source)):
        expected = tokens[i * seq_length : (i + 1) * seq_length + 1]
        np.testing.assert_array_equal(source[i], expected)
        assert source[i].dtype == np.int32
    for beyond in (-1, len(source)):
        with pytest.raises(IndexError):
            source[beyond]


def test_targets_that_start_a_document_do_not_count():
    source = TokenSource(np.array([BOS, 1, 2, BOS, 3]), 4, 10, "tokens")
    batch = next(eval_batches(source, batch_size=1, max_batches=0, bos_token_id=BOS))
    np.testing.assert_array_equal(batch.loss_mask, [[True, True, False, True]])


@pytest.mark.parametrize(("max_batches", "sizes"), [(0, [3, 3, 1]), (2, [3, 3]), (9, [3, 3, 1])])
def test_evaluation_reads_once_in_order(max_batches, sizes):
    batches = list(
        eval_batches(numbered(7), batch_size=3, max_batches=max_batches, bos_token_id=BOS)
    )
    assert [len(batch.inputs) for batch in batches] == sizes
    assert samples_of(*batches) == list(range(sum(sizes)))


@pytest.mark.parametrize("bad", [10, -1])
def test_id_outside_the_vocabulary_names_split_sample_and_value(bad):
    tokens = np.zeros(9, np.int64)
    tokens[6] = bad
    batches = eval_batches(
        TokenSource(tokens, 4, 10, "data/x/val"), batch_size=1, max_batches=0, bos_token_id=BOS
    )
    next(batches)
    with pytest.raises(StoreError, match=f"data/x/val, sample 1: token id {bad} at position 2"):
        next(batches)


def test_too_few_samples_for_a_batch_are_refused():
    with pytest.raises(UserError, match=r"3 samples of .*seq_length=4, .*global_batch_size=5"):
        train_batches(numbered(3), global_batch_size=5, seed=0, bos_token_id=BOS)


def test_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"global_batch_size=4 .* hosts, 3"):
        train_batches(numbered(9), global_batch_size=4, seed=0, bos_token_id=BOS, hosts=3)


@pytest.fixture
def store(tmp_path):
    attributes = {"vocab_size": 50, "bos_token_id": BOS}
    token_store.write(tmp_path / "s", {"train": np.arange(33)}, attributes=attributes)
    return tmp_path / "s"


def open_train(root, **changes):
    return open_source(
        root, "train", **{"seq_length": 8, "vocab_size": 64, "bos_token_id": BOS} | changes
    )


def test_source_survives_pickling(store):
    source = open_train(store)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[3], source[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 49}, "vocab_size=50, more than the model's 49"),
        ({"bos_token_id": 0}, r"documents with id 7, the model with 0"),
        ({"seq_length": 33}, "s/train holds 33 tokens, .* takes 34"),
    ],
)
def test_store_that_does_not_suit_the_model_is_refused(store, changes, message):
    with pytest.raises(StoreError, match=message):
        open_train(store, **changes)


def test_dummy_source_needs_no_store_and_is_a_function_of_split_and_index(tmp_path):
    source, again = (open_train(tmp_path / "no", dummy=True) for _ in range(2))
    other = open_source(tmp_path, "val", seq_length=8, vocab_size=64, bos_token_id=BOS, dummy=True)
    assert source[3].shape == (9,)
    assert source[3].max() < 64
    np.testing.assert_array_equal(source[3], again[3])
    assert (source[3] != source[4]).any()
    assert (source[3] != other[3]).any()
    batch = next(train_batches(source, global_batch_size=2, seed=0, bos_token_id=BOS))
    assert batch.inputs.shape == (2, 8)
    assert isinstance(source, RandomTokens)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_chunk_in_the_middle_names_split_sample_and_remedy(tmp_path, damage):
    chunk = token_store.CHUNK_TOKENS
    ids = np.random.default_rng(0).integers(0, 256, 3 * chunk, dtype=np.int32)
    token_store.write(tmp_path / "store", {"train": ids}, attributes={})
    source = open_source(
        tmp_path / "store", "train", seq_length=64, vocab_size=256, bos_token_id=BOS
    )
    (file,) = (tmp_path / "store" / "train").rglob("c/1")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    last_good, first_bad = chunk // 64 - 2, chunk // 64 + 1
    np.testing.assert_array_equal(source[last_good], ids[last_good * 64 :][:65])
    with pytest.raises(StoreError, match=rf"store/train, sample {first_bad}: .* good copy"):
        source[first_bad]
    with pytest.raises(StoreError, match=r"store/train, sample \d+: .* good copy"):
        take(train_batches(source, global_batch_size=512, seed=0, bos_token_id=BOS), 6)


def test_the_loader_benchmark_measures_cold_and_warm(monkeypatch, capsys):
    tool = str(Path(__file__).parents[1] / "tools" / "loader_speed.py")
    small = ["--tokens", "100000", "--lengths", "64", "--threads", "2", "--seconds", "0.05"]
    for needs, code in (("1", 0), ("1e15", 1)):
        monkeypatch.setattr(sys, "argv", [tool, *small, "--needs", needs])
        assert runpy.run_path(tool)["main"]() == code
        output = capsys.readouterr().out
        assert "cold" in output or not hasattr(os, "posix_fadvise")
        assert "warm" in output
