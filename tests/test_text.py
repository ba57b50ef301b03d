"""Text: documents become tokens and come back; train and val share no document."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ttt.dataloader import text, token_store
from ttt.dataloader.make_store import make_store
from ttt.errors import UserError

NOTES = [f"note {i}: chunks of <s> text, ünder way\n" * (i + 1) for i in range(10)]


@pytest.fixture
def notes(tmp_path):
    """A folder of ten notes, each another length."""
    folder = tmp_path / "notes"
    for i, note in enumerate(NOTES):
        path = folder / str(i % 2) / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(note)
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE of a few merges that cuts at 4 tokens and pads, as published ones may."""
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pieces
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pieces.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(NOTES, trainer)
    trained.enable_truncation(4)
    trained.enable_padding(pad_id=0, pad_token="<pad>")
    path = tmp_path_factory.mktemp("tokenizer") / "mine.json"
    trained.save(str(path))
    return path


def documents(root, split, bos):
    """The documents of a split, without BOS."""
    tokens = token_store.open_split(root, split)[:]
    assert tokens[0] == bos
    return np.split(tokens, np.flatnonzero(tokens == bos))[1:]


def make_text(root, notes, **options):
    return make_store(root, "text", text=[f"{notes}/**/*.txt"], **options)


@given(st.binary(max_size=20))
def test_bytes_are_their_own_ids(data):
    ids = text.ByteTokenizer().encode(data)
    assert ids.tolist() == list(data)
    assert ids.dtype == np.int32


@given(st.text(max_size=20))
def test_bytes_decode_to_the_text_without_special_tokens(words):
    tokenizer = text.load_tokenizer("bytes")
    ids = [tokenizer.bos_token_id, *tokenizer.encode(words).tolist(), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == words
    assert max(ids) < tokenizer.vocab_size


def test_file_tokenizer_encodes_whole_text_and_decodes_it(tokenizer_file):
    tokenizer = text.load_tokenizer(tokenizer_file)
    ids = tokenizer.encode(NOTES[9])
    assert 4 < ids.size < len(NOTES[9])
    assert tokenizer.decode([tokenizer.bos_token_id, *ids.tolist()]) == NOTES[9]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (280, 1, 2)


def test_text_cannot_spell_a_special_token(tokenizer_file):
    tokenizer = text.load_tokenizer(tokenizer_file)
    assert tokenizer.bos_token_id not in tokenizer.encode("a <s> b")


def test_many_texts_are_encoded_as_each(tokenizer_file):
    tokenizer = text.load_tokenizer(tokenizer_file)
    many = tokenizer.encode_many([note.encode() for note in NOTES])
    for ids, note in zip(many, NOTES, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(note))


@pytest.mark.parametrize(
    ("content", "bos_token", "message"),
    [
        (None, None, "No tokenizer file at"),
        ("{}", None, "is not a `tokenizers` JSON file"),
        ("mine", "<begin>", r"has no BOS token: tried <begin>;"),
        ("none", None, r"tried <\|begin_of_text\|>, <s>, <bos>, \[BOS\], <\|endoftext\|>;"),
    ],
)
def test_unusable_tokenizer_is_refused(tmp_path, tokenizer_file, content, bos_token, message):
    path = tmp_path / "t.json"
    if content in ("mine", "none"):
        content = tokenizer_file.read_text()
        content = content if bos_token else content.replace('"<s>"', '"<other>"')
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        text.load_tokenizer(path, bos_token)


def test_bytes_take_no_other_bos():
    with pytest.raises(UserError, match="its own BOS"):
        text.load_tokenizer("bytes", "<s>")


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_store_holds_every_document_once_and_its_tokenizer(tmp_path, notes, tokenizer_file, kind):
    root = tmp_path / "store"
    make_text(root, notes, tokenizer="bytes" if kind == "bytes" else str(tokenizer_file))
    tokenizer_file = None  # decoding needs the store alone
    tokenizer = text.store_tokenizer(root)
    train, val = (documents(root, split, tokenizer.bos_token_id) for split in ("train", "val"))
    assert len(val) == 1
    assert sorted(map(tokenizer.decode, train + val)) == sorted(NOTES)
    assert token_store.read_attributes(root)["vocab_size"] == tokenizer.vocab_size


def test_chosen_bos_is_found_again_in_the_store(tmp_path, notes, tokenizer_file):
    make_text(tmp_path / "s", notes, tokenizer=str(tokenizer_file), bos_token="</s>")
    assert text.store_tokenizer(tmp_path / "s").bos_token_id == 2
    assert len(documents(tmp_path / "s", "train", 2)) == 9


def test_store_without_a_tokenizer_says_so(tmp_path):
    make_store(tmp_path / "s", "random", train_tokens=5, val_tokens=5)
    with pytest.raises(UserError, match="does not name its tokenizer"):
        text.store_tokenizer(tmp_path / "s")


def test_groups_do_not_show_in_the_store(tmp_path, notes, monkeypatch):
    make_text(tmp_path / "whole", notes)
    monkeypatch.setattr(text, "_GROUP_BYTES", 100)
    make_text(tmp_path / "groups", notes)
    assert len({token_store.fingerprint(tmp_path / s, "train") for s in ("whole", "groups")}) == 1


def test_order_is_shuffled_by_seed_and_independent_of_place(notes, tmp_path):
    moved = notes.rename(tmp_path / "elsewhere")
    corpora = [
        text.text_corpus([pattern], seed=seed, val_share=0.3)
        for pattern, seed in ((f"{moved}/**/*.txt", 0), (f"{moved}/?/*", 0), (f"{moved}/?/*", 1))
    ]
    first, again, other = ([path.name for path in c.paths] for c in corpora)
    assert first == again
    assert first != other
    assert first != sorted(first)
    assert len(corpora[0].splits["val"]) == 3


def test_a_tokenizer_is_trained_on_the_text_it_is_for(tmp_path, notes):
    make_text(tmp_path / "s", notes, tokenizer="bpe", vocab_size=280)
    tokenizer = text.store_tokenizer(tmp_path / "s")
    assert tokenizer.vocab_size == 280
    ids = tokenizer.encode(NOTES[3])
    assert tokenizer.decode(ids) == NOTES[3]
    assert len(ids) < 0.5 * len(NOTES[3].encode())
    unseen = "x = 'é\n\t0' # \u4e16 \r\n"
    assert tokenizer.decode(tokenizer.encode(unseen)) == unseen
    lengths = token_store.read_attributes(tmp_path / "s")["bytes_per_token"]
    stored = documents(tmp_path / "s", "val", tokenizer.bos_token_id)
    size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in stored)
    assert lengths["val"] == pytest.approx(size / sum(len(ids) - 1 for ids in stored))


def test_token_bounds_cut_each_split(tmp_path, notes):
    seen = []
    make_text(
        tmp_path / "s", notes, train_tokens=100, val_tokens=5, on_progress=lambda *w: seen.append(w)
    )
    assert token_store.open_split(tmp_path / "s", "train").shape == (100,)
    assert token_store.open_split(tmp_path / "s", "val").shape == (5,)
    assert seen[-1] == (10, 10)


def test_files_that_are_no_utf8_are_all_named_and_nothing_is_made(tmp_path, notes, tokenizer_file):
    for name in ("a.txt", "b.txt"):
        (notes / name).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"2 of the files[^$]*[ab]\.txt\n.*[ab]\.txt"):
        make_text(tmp_path / "s", notes, tokenizer=str(tokenizer_file))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes"]
    make_text(tmp_path / "s", notes, tokenizer="bytes")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("text", {}, "needs the files"),
        ("text", {"text": ["no/*.txt"]}, r"No file matches 'no/\*\.txt'"),
        ("text", {"text": [__file__]}, "1 document"),
        ("text", {"text": ["{notes}/**"], "val_share": 1.0}, "between 0 and 1"),
        ("random", {"tokenizer": "bytes"}, "tokenizer: not for source random"),
        ("builtin", {"text": ["{notes}/**"]}, "text: not for source builtin"),
        ("text", {"text": ["{notes}/**"], "vocab_size": 300}, "the tokenizer bytes has its own"),
        ("text", {"text": ["{notes}/**"], "tokenizer": "bpe", "vocab_size": 9}, "alone are 258"),
        ("text", {"text": ["{notes}/**"], "tokenizer": "bpe", "bos_token": "<s>"}, "its own BOS"),
        ("random", {"val_tokens": 0}, "val_tokens=0 must be at least 1"),
        ("random", {"vocab_size": 1 << 32}, "vocab_size=4294967296 must be at most 2147483648"),
        ("random", {"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_wrong_option_is_refused(tmp_path, notes, source, options, message):
    if "text" in options:
        options = options | {"text": [options["text"][0].format(notes=notes)]}
    with pytest.raises(UserError, match=message):
        make_store(tmp_path / "s", source, **options)
    assert not (tmp_path / "s").exists()


def test_script_makes_a_store_once_and_prints_its_fingerprints(tmp_path, run_script):
    out = tmp_path / "s"

    def run(*more):
        arguments = f"--out {out} --source random --train-tokens 9 --val-tokens 4".split()
        return run_script("04_make_token_data.py", *arguments, *more)

    assert run("--dry-run")[0] == 0
    assert not out.exists()
    code, output = run()
    assert code == 0
    assert f"train: 9 tokens, {token_store.fingerprint(out, 'train')}" in output.out
    code, output = run()
    assert code == 2
    assert "never overwritten" in output.err
    code, output = run("--out", str(Path(__file__) / "s"), "--dry-run")
    assert code == 2
    assert "choose another destination" in output.err


def test_script_makes_random_ids_where_no_source_is_named(tmp_path, run_script):
    code, output = run_script("04_make_token_data.py", "--out", tmp_path / "s")
    assert code == 0
    assert "random ids below 258, 1000000 train and 100000 val" in output.out
    assert token_store.open_split(tmp_path / "s", "val").shape == (100_000,)
