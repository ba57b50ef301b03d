"""The built-in corpus: modules of the machine, divided so that none is held out and known."""

import random

import numpy as np
import pytest

from ttt.dataloader import builtin, token_store


@pytest.fixture(scope="module")
def corpus():
    return builtin.corpus()


def test_it_holds_the_standard_library_and_the_packages_without_tests(corpus):
    names = {path.as_posix() for path in corpus.paths}
    for module in ("/json/decoder.py", "/numpy/lib/_npyio_impl.py", "/optax/_src/base.py"):
        assert any(name.endswith(module) for name in names)
    assert not [name for name in names if "/tests/" in name]
    assert corpus.size > 30e6


def test_its_splits_share_no_module_and_hold_out_about_a_twentieth_and_a_tenth(corpus):
    assert list(corpus.splits) == ["train", "dev", "val"]
    assert len(set(corpus.paths)) == len(corpus.paths)
    dev, val = (len(corpus.splits[name]) / len(corpus.paths) for name in ("dev", "val"))
    assert 0.03 < dev < 0.06
    assert 0.07 < val < 0.11


def module(seed, *, lines=60):
    rng = random.Random(seed)
    names = ("".join(rng.choices("abcdefgh", k=8)) for _ in range(3 * lines))
    return "".join(f"{a}_{b} = {c}(1)\n" for a, b, c in zip(*[names] * 3, strict=True))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes modules in place of those of the machine: name -> content."""

    def write(contents):
        modules = {}
        for name, content in contents.items():
            path = tmp_path / "lib" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            modules[name] = path
        monkeypatch.setattr(builtin, "_modules", lambda: modules)

    return write


def names(corpus, split):
    return {path.name for path in corpus.splits[split]}


def test_what_is_no_text_or_there_twice_is_left_out(machine):
    own = {f"{i}.py": module(i) for i in range(20)}
    wrong = {"short.py": "pass\n", "long.py": module(0) * 300, "latin.py": b"\xff" * 2000}
    machine(own | wrong | {"twice.py": module(3)})
    left = {path.name for path in builtin.corpus().paths}
    assert not left & wrong.keys()
    assert len(left) == 20


def test_a_held_out_module_whose_lines_are_known_goes_to_training(machine):
    own = {f"{i}.py": module(i) for i in range(40)}
    machine(own)
    first = builtin.corpus()
    held_out = sorted(names(first, "dev") | names(first, "val"))
    assert len(held_out) == 6
    known = next(iter(names(first, "train")))
    copied, kept = held_out[:2]
    lines = own[known].splitlines(keepends=True)
    machine(own | {copied: "".join(lines[:40]) + module(99, lines=20)})
    again = builtin.corpus()
    assert copied in names(again, "train")
    assert kept in names(again, "dev") | names(again, "val")


def test_a_seed_gives_another_order_and_the_same_seed_the_same(machine):
    machine({f"{i}.py": module(i) for i in range(40)})
    first, again, other = (builtin.corpus(seed=seed).paths for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["builtin", "builtin_bpe"])
def test_a_store_is_made_once_and_names_its_tokenizer(tmp_path, machine, name):
    machine({f"{i}.py": module(i) for i in range(20)})
    root = tmp_path / "data" / name
    builtin.ensure(name, root)
    assert token_store.splits(root) == ["dev", "train", "val"]
    stored = token_store.read_attributes(root)
    tokens = np.asarray(token_store.open_split(root, "train")[:])
    assert np.sum(tokens == stored["bos_token_id"]) == 17
    before = (root / "zarr.json").stat().st_ino
    builtin.ensure(name, root)
    assert (root / "zarr.json").stat().st_ino == before


def test_of_processes_that_make_a_store_at_once_the_first_wins(tmp_path, machine):
    machine({f"{i}.py": module(i) for i in range(20)})
    root = tmp_path / "builtin"

    def other_finishes_first(done, total):
        if done == 1:
            builtin.ensure("builtin", root)

    builtin.ensure("builtin", root, on_progress=other_finishes_first)
    assert token_store.splits(root) == ["dev", "train", "val"]
    assert [path.name for path in tmp_path.glob("*builtin*")] == ["builtin"]
