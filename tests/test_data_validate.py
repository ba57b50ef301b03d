"""scripts/02_data_validate.py: each fault alone, in a store that is sound otherwise."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from ttt.dataloader import token_store, validate
from ttt.dataloader.token_store import StoreError
from ttt.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "02_data_validate.py"
VOCABULARY, BOS, LENGTH = 500, 7, 128
TRAIN, VAL = 40_000, 9_000


def words(tokens, seed):
    """Ids of very unequal frequency, as words have, with a BOS every thousand tokens."""
    ids = np.minimum(np.random.default_rng(seed).zipf(1.3, tokens) + BOS, VOCABULARY - 1)
    ids[::1000] = BOS
    return ids.astype(np.int32)


@pytest.fixture(scope="module")
def sound():
    return {"train": words(TRAIN, 0), "val": words(VAL, 1)}


@pytest.fixture
def validated(tmp_path, sound):
    """Validate the sound store with other splits, attributes or options."""

    def run(changed=None, attributes=None, **options):
        root = tmp_path / "store"
        if attributes is None:
            attributes = {"vocab_size": VOCABULARY, "bos_token_id": BOS}
        group = zarr.create_group(root, attributes=attributes)
        for name, tokens in (sound | (changed or {})).items():
            if tokens is not None:
                group.create_array(name, data=tokens, chunks=(1000,) * tokens.ndim)
        return validate.validate(root, **{"seq_length": LENGTH, "samples": 0} | options)

    return run


def checks(report, verdict):
    return {(finding.split, finding.check) for finding in report.having(verdict)}


@pytest.mark.parametrize("samples", [0, 50])
def test_sound_store_has_no_faults_or_warnings(validated, samples):
    report = validated(samples=samples)
    assert {finding.verdict for finding in report.findings} == {"ok"}
    numbers = report.numbers["train"]
    assert numbers["samples"] == (TRAIN - 1) // LENGTH
    assert numbers["looked_at"] == (samples or numbers["samples"])
    assert numbers["documents_per_million_tokens"] == pytest.approx(1000, rel=0.3)
    assert numbers["fingerprint"].startswith("sha256:")


@pytest.fixture
def in_many_blocks(monkeypatch):
    monkeypatch.setattr(validate, "_BLOCK_TOKENS", 1000)


def test_numbers_are_those_of_the_tokens(validated, sound, in_many_blocks):
    numbers = validated().numbers["train"]
    seen = sound["train"][: numbers["samples"] * LENGTH]
    shares = np.unique(seen, return_counts=True)[1] / seen.size
    assert numbers["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert numbers["documents"] == (seen == BOS).sum() == 40
    assert numbers["samples_with_bos"] == pytest.approx(40 / numbers["samples"])
    assert (numbers["least_id"], numbers["most_id"]) == (seen.min(), seen.max())


def test_absent_split_is_a_fault_of_the_data(validated):
    report = validated({"val": None})
    assert checks(report, "fault") == {("val", "opens")}
    assert "it has train" in report.having("fault")[0].message


@pytest.mark.parametrize("tokens", [np.zeros((9, 9), np.int32), np.zeros(9000, np.float32)])
def test_split_of_wrong_shape_or_type_is_a_fault(validated, tokens):
    report = validated({"val": tokens})
    assert checks(report, "fault") == {("val", "opens")}
    assert "1-D and of integers" in report.having("fault")[0].message


def test_too_short_a_split_is_a_fault(validated, sound):
    report = validated({"val": sound["val"][:LENGTH]})
    assert checks(report, "fault") == {("val", "samples")}
    assert "lower --seq-length" in report.having("fault")[0].message


@pytest.mark.parametrize("value", [VOCABULARY, -1])
def test_id_outside_the_vocabulary_is_a_fault_with_its_place(
    validated, sound, value, in_many_blocks
):
    tokens = sound["train"].copy()
    tokens[1234] = value
    report = validated({"train": tokens})
    assert checks(report, "fault") == {("train", "ids")}
    assert f"id {value} at token 1,234 is outside [0, 500)" in report.having("fault")[0].message


def test_vocabulary_of_the_options_goes_before_the_stores(validated):
    assert ("", "vocabulary") in checks(validated(vocab_size=VOCABULARY - 1), "fault")


def test_unknown_vocabulary_is_not_assumed(validated):
    report = validated(attributes={"bos_token_id": BOS})
    assert checks(report, "not checked") == {("train", "ids"), ("val", "ids")}
    assert "--vocab-size (128256 for the published" in report.having("not checked")[0].message


def test_documents_without_a_beginning_are_a_fault_where_all_was_read(validated, sound):
    without = {name: np.where(ids == BOS, BOS + 1, ids) for name, ids in sound.items()}
    report = validated(without)
    assert checks(report, "fault") == {("train", "BOS"), ("val", "BOS")}


def test_documents_without_a_beginning_are_a_warning_in_a_few_samples(validated, sound):
    report = validated(
        {"train": np.where(sound["train"] == BOS, BOS + 1, sound["train"])}, samples=9
    )
    assert checks(report, "fault") == set()
    assert ("train", "BOS") in checks(report, "warning")


def test_other_bos_than_the_stores_is_a_fault(validated):
    assert ("", "BOS") in checks(validated(bos_token_id=BOS + 1), "fault")


def test_unknown_bos_is_a_warning(validated):
    report = validated(attributes={"vocab_size": VOCABULARY})
    assert checks(report, "warning") == {("train", "BOS"), ("val", "BOS")}
    assert "--bos-token-id" in report.having("warning")[0].message


@pytest.mark.parametrize(("length", "verdict"), [(300, "warning"), (1100, "fault")])
def test_long_run_of_one_token_is_found(validated, sound, length, verdict):
    tokens = sound["train"].copy()
    tokens[5000 : 5000 + length] = 9
    report = validated({"train": tokens})
    assert checks(report, verdict) == {("train", "equal tokens")}
    assert report.numbers["train"]["longest_run"] >= length


def test_many_samples_of_one_token_are_a_fault_at_any_place(validated, sound):
    tokens = sound["train"].copy()
    for start in range(0, TRAIN - 2 * LENGTH, 20 * LENGTH):
        tokens[start : start + LENGTH] = 9
    report = validated({"train": tokens}, samples=200)
    assert checks(report, "fault") == {("train", "equal tokens")}


def test_copied_samples_are_found(validated, sound):
    tokens = sound["train"].copy()
    tokens[60 * LENGTH : 90 * LENGTH] = tokens[: 30 * LENGTH]
    report = validated({"train": tokens})
    assert checks(report, "fault") == {("train", "copies")}
    assert report.numbers["train"]["copied_samples"] == 30


def test_text_repeated_at_another_offset_is_found(validated, sound):
    third = sound["train"][: TRAIN // 3 - 37]
    report = validated({"train": np.concatenate([third, third[:50], third, third[:11], third])})
    assert checks(report, "fault") == {("train", "repeats")}
    assert report.numbers["train"]["copied_samples"] == 0
    assert report.numbers["train"]["repeated_stretches"] == pytest.approx(2 / 3, abs=0.02)


def test_lines_of_one_token_are_no_repeats(validated, sound):
    tokens = sound["train"].copy()
    for start in range(0, TRAIN, 400):
        tokens[start + 1 : start + 200] = 9
    assert validated({"train": tokens}).numbers["train"]["repeated_stretches"] < 0.01


def test_validation_text_that_is_in_train_is_found(validated, sound):
    report = validated({"val": sound["train"][50 * LENGTH : 50 * LENGTH + VAL]})
    assert checks(report, "fault") == {("val", "held out")}
    assert report.numbers["val"]["samples_in_train"] == report.numbers["val"]["samples"]


def test_validation_text_that_is_in_train_at_another_offset_is_found(validated, sound):
    report = validated({"val": sound["train"][5001 : 5001 + VAL]})
    assert checks(report, "fault") == {("val", "held out")}
    assert report.numbers["val"]["samples_in_train"] == 0
    assert report.numbers["val"]["stretches_in_train"] == 1


def test_thinned_out_stretches_still_find_repeats(validated, sound, monkeypatch):
    monkeypatch.setattr(validate, "_KEPT_STRETCHES", 2000)
    report = validated({"val": sound["train"][5001 : 5001 + VAL]})
    assert report.numbers["val"]["stretches_in_train"] == 1
    assert report.numbers["train"]["repeated_stretches"] == 0


def test_uniform_random_ids_are_a_warning(validated):
    uniform = np.random.default_rng(3).integers(0, VOCABULARY, TRAIN, dtype=np.int32)
    report = validated({"train": uniform})
    assert checks(report, "warning") == {("train", "frequencies")}
    assert checks(report, "fault") == set()


def test_hardly_anything_but_one_token_is_a_fault(validated):
    tokens = np.full(TRAIN, 9, np.int32)
    tokens[::1000] = BOS
    assert ("train", "frequencies") in checks(validated({"train": tokens}), "fault")


def test_damaged_chunk_is_a_fault(validated, tmp_path, sound):
    validated()
    (tmp_path / "store" / "train" / "c" / "20").write_bytes(b"damage")
    report = validate.validate(tmp_path / "store", seq_length=LENGTH, samples=0)
    assert ("train", "opens") in checks(report, "fault")


def test_damaged_chunk_outside_the_fingerprint_is_a_fault_too(
    validated, tmp_path, monkeypatch, in_many_blocks
):
    monkeypatch.setattr(token_store, "_FINGERPRINT_SPAN_TOKENS", 10)
    validated()
    (tmp_path / "store" / "train" / "c" / "20").write_bytes(b"damage")
    report = validate.validate(tmp_path / "store", seq_length=LENGTH, samples=0)
    assert checks(report, "fault") == {("train", "samples")}
    assert "store: tokens 19712 to 20608 cannot be read" in report.having("fault")[0].message


def test_samples_follow_the_seed(validated, tmp_path):
    validated()

    def seen(seed):
        return validate.validate(
            tmp_path / "store", seq_length=LENGTH, samples=20, seed=seed
        ).numbers["train"]["unigram_entropy"]

    assert seen(0) == seen(0) != seen(1)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"seq_length": 0}, "--seq-length 0: must be at least 1"),
        ({"samples": -1}, "--samples -1: must be at least 0"),
        ({"vocab_size": 0}, "--vocab-size 0"),
        ({"splits": ["val", "val"]}, "each once"),
    ],
)
def test_wrong_request_is_refused(validated, options, fragment):
    with pytest.raises(UserError, match=fragment):
        validated(**options)


def test_absent_store_is_a_mistake_of_the_request(tmp_path):
    with pytest.raises(StoreError, match="scripts/00_data_fetch"):
        validate.validate(tmp_path / "books3")


@pytest.fixture
def script(tmp_path, run_script):
    def run(*options):
        return run_script(SCRIPT.name, "--dataset-path", tmp_path / "store", *options)

    return run


def test_exit_code_and_report_of_a_sound_store(validated, script):
    validated()
    code, output = script("--seq-length", LENGTH, "--samples", 0, "--format", "json")
    assert code == 0
    report = json.loads(output.out)
    assert report["numbers"]["val"]["tokens"] == VAL
    assert {finding["verdict"] for finding in report["findings"]} == {"ok"}


def test_exit_code_of_bad_data_of_no_vocabulary_and_of_no_store(validated, script, sound):
    code, output = script()
    assert code == 2
    assert "No token store at" in output.err
    validated({"val": sound["val"][:9]}, attributes={})
    code, output = script("--seq-length", LENGTH, "--vocab-size", VOCABULARY)
    assert code == 1
    assert "lower --seq-length" in output.out
    code, output = script("--seq-length", LENGTH, "--splits", "train")
    assert code == 2
    assert "give --vocab-size" in output.err
    assert script("--seq-length", LENGTH, "--splits", "train", "--vocab-size", VOCABULARY)[0] == 0


def test_dry_run_shows_what_would_be_looked_at_and_reads_no_token(validated, script, tmp_path):
    validated()
    for chunk in (tmp_path / "store" / "train" / "c").iterdir():
        chunk.write_bytes(b"damage")
    code, output = script("--seq-length", LENGTH, "--samples", 50, "--dry-run")
    assert code == 0
    assert output.out.splitlines()[0] == "train: would look at 50 of 312 samples of 128 tokens"
    assert script("--seq-length", 0, "--dry-run")[0] == 2
