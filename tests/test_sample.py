"""The sample at the end of a run: what is read first, what is written, which lines are known."""

import jax
import numpy as np
import pytest
from test_train import configure, store  # noqa: F401 - fixtures

from ttt.dataloader import token_store
from ttt.dataloader.text import ByteTokenizer
from ttt.errors import UserError
from ttt.evaluation.sample import document, known_lines, write_sample
from ttt.model.transformer import MetaModel

BOS = ByteTokenizer.bos_token_id


def ids(text: str) -> np.ndarray:
    return ByteTokenizer().encode(text)


@pytest.fixture
def split(tmp_path):
    """A split of these tokens."""

    def make(tokens):
        token_store.write(tmp_path / "s", {"train": tokens}, attributes={})
        return token_store.open_split(tmp_path / "s", "train")

    return make


def test_the_document_that_is_read_is_the_first_that_is_long_enough(split):
    texts = ["short", "a longer one", "another longer one"]
    tokens = np.concatenate([np.concatenate([[BOS], ids(text)]) for text in texts])
    array = split(tokens.astype(np.int32))
    np.testing.assert_array_equal(document(array, BOS, 10), [BOS, *ids("a longer ")])
    np.testing.assert_array_equal(document(array, BOS, 50)[:6], [BOS, *ids("short")])


def test_lines_are_known_whole_whatever_blanks_surround_them(split):
    array = split(ids("def first_one():\n    return second_one\nthird = first_one\n"))
    lines = ["return second_one", "  third = first_one  ", "first_one", "never_seen = 1", "x"]
    assert known_lines(lines, array, ByteTokenizer()) == (2, 4)  # `x` is too short to count


def test_a_sample_follows_a_held_out_document_and_stays_in_its_length(configure, tmp_path):  # noqa: F811
    text = b"the quick brown fox\njumps over the lazy dog\n" * 50
    tokens = np.concatenate([[BOS], np.frombuffer(text, np.uint8)]).astype(np.int32)
    attributes = {"vocab_size": 258, "bos_token_id": BOS, "tokenizer": "bytes"}
    token_store.write(tmp_path / "own", {"train": tokens, "val": tokens}, attributes=attributes)
    own = [f"deploy_paths.data.text={tmp_path}/own", "training.sample_tokens=24"]
    config = configure(*own)
    sample = write_sample(config, MetaModel(config.model, key=jax.random.key(0)))
    assert sample.read == config.training.seq_length - 24
    assert len(sample.text.encode()) <= 3 * 24  # a byte that is no UTF-8 becomes three
    assert sample.known <= sample.lines


def test_a_store_without_a_tokenizer_gives_no_sample(configure):  # noqa: F811
    config = configure("training.sample_tokens=24")
    with pytest.raises(UserError, match="does not name its tokenizer"):
        write_sample(config, MetaModel(config.model, key=jax.random.key(0)))
