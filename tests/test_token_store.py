"""Token stores: what is written is read back; what is broken is an error, never read."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt.dataloader import token_store
from ttt.dataloader.token_store import StoreError

ATTRIBUTES = {"vocab_size": 100, "bos_token_id": 7, "source": "test"}


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "store"
    splits = {"train": np.arange(90), "val": np.arange(10)}
    token_store.write(root, splits, attributes=ATTRIBUTES)
    return root


def test_store_reads_back_in_the_published_layout(store, golden):
    array = token_store.open_split(store, "train")
    np.testing.assert_array_equal(array[:], np.arange(90))
    published = token_store.open_split(golden / "token_store", "train")
    assert array.dtype == published.dtype
    assert array.compressors == published.compressors
    assert token_store.read_attributes(store) == ATTRIBUTES
    assert token_store.read_attributes(golden / "token_store") == {}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=8))
def test_any_cut_into_pieces_gives_the_same_array(tmp_path_factory, lengths):
    tokens = np.arange(sum(lengths)) % 5
    pieces = np.split(tokens, np.cumsum(lengths))
    root = tmp_path_factory.mktemp("cut") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "CHUNK_TOKENS", 8)
        token_store.write(root, {"train": iter(pieces)}, attributes={})
    np.testing.assert_array_equal(token_store.open_split(root, "train")[:], tokens)


def test_unfinished_write_leaves_nothing(tmp_path):
    def pieces():
        yield np.arange(5)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        token_store.write(tmp_path / "store", {"train": pieces()}, attributes={})
    assert list(tmp_path.iterdir()) == []


def test_existing_store_is_not_overwritten(store):
    before = token_store.fingerprint(store, "train")
    with pytest.raises(StoreError, match="never overwritten"):
        token_store.write(store, {"train": np.arange(5)}, attributes={})
    assert token_store.fingerprint(store, "train") == before


def test_slower_of_two_writers_leaves_the_faster_ones_store(tmp_path):
    root = tmp_path / "store"

    def pieces():
        yield np.arange(5)
        token_store.write(root, {"train": np.arange(3)}, attributes={})

    with pytest.raises(StoreError, match="never overwritten"):
        token_store.write(root, {"train": pieces()}, attributes={})
    np.testing.assert_array_equal(token_store.open_split(root, "train")[:], np.arange(3))
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("tokens", [[3, 100], [-1, 3]])
def test_id_outside_the_vocabulary_is_not_written(tmp_path, tokens):
    with pytest.raises(StoreError, match=r"outside \[0, 100\)"):
        token_store.write(tmp_path / "s", {"train": np.array(tokens)}, attributes=ATTRIBUTES)


@pytest.mark.parametrize("tokens", [np.zeros((2, 2), np.int32), np.zeros(2)])
def test_only_rows_of_integers_are_written(tmp_path, tokens):
    with pytest.raises(StoreError, match="1-D integers"):
        token_store.write(tmp_path / "s", {"train": tokens}, attributes={})


def test_absent_store_names_folder_and_remedy(tmp_path):
    with pytest.raises(StoreError, match=rf"{tmp_path / 'no'}\. Run make-it"):
        token_store.open_split(tmp_path / "no", "train", remedy="Run make-it.")


def test_plain_folder_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="no zarr v3 group"):
        token_store.open_split(tmp_path, "train")


def test_folder_around_a_store_names_the_store_inside(store):
    with pytest.raises(StoreError, match=f"seems to be {store}"):
        token_store.open_split(store.parent, "train")


def test_absent_split_lists_the_present_ones(store):
    with pytest.raises(StoreError, match="no split 'test'; it has train, val"):
        token_store.open_split(store, "test")


@pytest.mark.parametrize("data", [np.zeros((2, 2), np.int32), np.zeros(4, np.float32)])
def test_split_of_wrong_shape_or_type_is_refused(store, data):
    zarr.open_group(store).create_array("odd", data=data)
    with pytest.raises(StoreError, match="1-D and of integers"):
        token_store.open_split(store, "odd")


def test_group_in_place_of_a_split_is_refused(store):
    zarr.open_group(store).create_group("odd")
    with pytest.raises(StoreError, match="is a zarr group"):
        token_store.open_split(store, "odd")


def test_lost_chunk_is_an_error_and_not_zeros(store):
    (store / "train" / "c" / "0").unlink()
    with pytest.raises(StoreError, match="0 of its 1 chunks"):
        token_store.open_split(store, "train")


def test_split_of_zeros_is_complete(tmp_path):
    token_store.write(tmp_path / "s", {"train": np.zeros(5, np.int32)}, attributes={})
    assert token_store.open_split(tmp_path / "s", "train").shape == (5,)


def test_fingerprint_sees_content_length_and_type_but_not_chunks(tmp_path, store):
    def of(tokens, name, **layout):
        group = zarr.open_group(tmp_path / name, mode="w")
        group.create_array("train", data=tokens, **layout)
        return token_store.fingerprint(tmp_path / name, "train")

    tokens = np.arange(90, dtype=np.int32)
    same = token_store.fingerprint(store, "train")
    assert of(tokens, "chunks", chunks=(7,)) == same
    assert of(np.where(tokens == 89, 0, tokens), "content") != same
    assert of(tokens[:-1], "length") != same
    assert of(tokens.astype(np.int64), "type") != same


def test_fingerprint_reads_both_ends_of_a_long_split(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_FINGERPRINT_SPAN_TOKENS", 4)

    def of(tokens, name):
        token_store.write(tmp_path / name, {"train": tokens}, attributes={})
        return token_store.fingerprint(tmp_path / name, "train")

    tokens = np.arange(1000)
    same = of(tokens, "same")
    for place in (0, 999):
        assert of(np.where(tokens == place, 5, tokens), f"at{place}") != same


def test_random_store_has_its_lengths_and_follows_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "CHUNK_TOKENS", 16)
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        token_store.write_random(
            tmp_path / name,
            {"train": 40, "val": 20},
            vocab_size=50,
            seed=seed,
            on_progress=lambda *work: seen.append(work),
        )
    a, b, c = (token_store.open_split(tmp_path / name, "train")[:] for name in "abc")
    assert a.shape == (40,)
    assert seen[:5] == [(16, 60), (32, 60), (40, 60), (56, 60), (60, 60)]
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (a[:20] != token_store.open_split(tmp_path / "a", "val")[:]).any()
