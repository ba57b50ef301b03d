"""Suites without a model: intervals, bins, rows, RULER's prompts and scores, repetition, jobs."""

import csv
import io
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import jax
import numpy as np
import pytest
import tokenizers
from builders import MODEL, TRAINING
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ttt.dataloader.lm_dataset import HeldOut, TokenSource
from ttt.dataloader.text import ByteTokenizer, FileTokenizer
from ttt.errors import UserError
from ttt.evaluate import SUITES
from ttt.evaluation import repetition, result, ruler
from ttt.evaluation.judge import Judged
from ttt.evaluation.long_decoding import binned
from ttt.evaluation.loss_by_position import LearningComparison, PositionLoss
from ttt.evaluation.resources import in_batches
from ttt.evaluation.result import Row, estimate, log_edges
from ttt.evaluation.suite import AbstractSuite, Job, measure
from ttt.intervals import bootstrap, median, nested, share, student
from ttt.knobs import NEEDLE_TASKS
from ttt.knobs import SUITES as SUITE_NAMES
from ttt.model.loop import Scores
from ttt.model.trained import TrainedModel
from ttt.model.transformer import MetaModel

# ---- intervals -------------------------------------------------------------------------


def test_bootstrap_of_a_mean_has_the_standard_error_in_closed_form():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values, np.ones(400), resamples=4000, seed=1)
    error = values.std() / np.sqrt(400)  # the bootstrap's own: of the sample, not of the source
    assert found.value == pytest.approx(values.mean())
    for bound, quantile in ((found.low, 0.025), (found.high, 0.975)):
        expected = NormalDist(values.mean(), error).inv_cdf(quantile)
        assert bound == pytest.approx(expected, abs=0.1 * error)


def test_bootstrap_weighs_documents_by_what_they_count():
    sums, counts = np.array([[10.0, 0], [2, 0]]), np.array([[5.0, 0], [1, 0]])
    found = bootstrap(sums, counts, resamples=100, seed=0)
    assert found.value[0] == pytest.approx(2)  # 12 / 6, both documents' means being 2
    assert (found.low[0], found.high[0]) == pytest.approx((2, 2))
    assert np.isnan(found.value[1])


def test_bootstrap_of_one_document_tells_no_spread_and_a_seed_fixes_the_draws():
    one = bootstrap(np.array([4.0]), np.array([2.0]), resamples=50, seed=0)
    assert one.value == 2
    assert np.isnan([one.low, one.high]).all()
    draws = [
        bootstrap(np.arange(9.0), np.ones(9), resamples=50, seed=seed).low for seed in (5, 5, 6)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_bootstrap_is_scipys_own_of_the_ratio_of_sums():
    rng = np.random.default_rng(0)
    counts = rng.lognormal(3, 1, 40)
    sums = counts * rng.normal(3, 1, 40)
    theirs = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        n_resamples=200,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    ours = bootstrap(sums, counts, resamples=200, seed=7)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs))


def test_seeds_and_documents_add_in_squares_and_one_seed_leaves_documents_alone():
    rng = np.random.default_rng(0)
    counts = rng.lognormal(3, 1, (30, 2))
    sums = counts * (rng.normal(3, 1, (30, 2)) + rng.normal(0, 0.3, (4, 1, 1)))
    found = nested(sums, counts)
    documents = bootstrap(sums.mean(axis=0), counts)
    seeds = student(sums.sum(axis=1) / counts.sum(axis=0))
    np.testing.assert_allclose(found.value, seeds.value)
    for ours, of_documents, of_seeds in zip(found[1:], documents[1:], seeds[1:], strict=True):
        parts = (of_documents - found.value) ** 2 + (of_seeds - found.value) ** 2
        np.testing.assert_allclose((ours - found.value) ** 2, parts)
    for ours, of_documents in zip(
        nested(sums[:1], counts), bootstrap(sums[0], counts), strict=True
    ):
        np.testing.assert_array_equal(ours, of_documents)


def test_median_has_the_exact_interval_of_ordered_samples():
    samples = np.random.default_rng(0).permutation(30.0 + np.arange(30))
    value, low, high = median(samples)
    assert value == 44.5
    # P(9 <= successes of 30 fair throws <= 20) is the least above 0.95 of its kind.
    assert (low, high) == (39, 50)
    assert median(np.array([1.0, 5, 2]))[0] == 2
    assert np.isnan(median(np.array([1.0, 5, 2]))[1:]).all()


COVERAGE = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "interval_coverage.py"))


@pytest.mark.parametrize("documents", [60, 250])
def test_a_95_percent_interval_over_documents_holds_the_truth_as_often_as_it_says(documents):
    trials = 400
    found = COVERAGE["over_documents"](documents, trials, resamples=300)["percentile"]
    assert found.covered >= 0.92 - 2 * np.sqrt(0.92 * 0.08 / trials)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.3), (5, 0.3), (3, 0.0)])
def test_an_interval_over_seeds_and_documents_holds_the_truth_as_often(seeds, spread):
    trials = 300
    found = COVERAGE["over_seeds"](seeds, 60, spread, trials, resamples=200)
    least = 0.92 - 2 * np.sqrt(0.92 * 0.08 / trials)
    assert found["squares"].covered >= least
    alone = found["t over seeds"] if spread == 0 else found["bootstrap of both"]
    assert alone.covered < least  # either of them alone would be too narrow


def test_interval_of_a_share_is_wilsons():
    value, low, high = share(7, 10)
    z = NormalDist().inv_cdf(0.975)
    for bound in (low, high):  # where the score test just does not refuse the bound
        assert abs(value - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / 10))
    assert share(0, 5)[0:2] == (0, 0)
    assert share(5, 5)[2] == 1
    assert 0 < share(0, 5)[2] < 0.5


# ---- bins and rows ---------------------------------------------------------------------


@given(st.integers(1, 200_000))
def test_log_bins_cover_every_position_once_and_widen(length):
    edges = log_edges(length)
    assert (edges[0], edges[-1]) == (0, length)
    assert np.all(np.diff(edges) > 0)
    longer = log_edges(2 * length)
    assert set(edges[:-1]) <= set(longer)  # bins of two contexts are the same but for the last


def position_loss(nll: np.ndarray) -> PositionLoss:
    """Of N sequences [N, T], each a document, all targets counting."""
    edges = log_edges(nll.shape[1])
    binned = np.add.reduceat(nll, edges[:-1], axis=1)
    counts = np.broadcast_to(np.diff(edges).astype(float), binned.shape)
    total = nll.sum(axis=0), np.full(nll.shape[1], float(len(nll)))
    return PositionLoss(*total, nll.mean(axis=1), edges, np.arange(len(nll)), binned, counts)


LIKE = Row("loss_by_context", "a", "e2e", 7, 64, "loss")


def test_rows_hold_the_mean_of_every_bin_and_their_average_is_the_whole():
    nll = np.random.default_rng(0).uniform(1, 3, (6, 64))
    rows = position_loss(nll).rows(LIKE, resamples=200, seed=0, keys={"learning": True})
    whole, bins = rows[0], rows[1:]
    assert whole.value == pytest.approx(nll.mean())
    assert whole.keys == {"learning": True, "position_from": 0, "position_to": 64}
    for row in bins:
        start, stop = row.keys["position_from"], row.keys["position_to"]
        assert row.value == pytest.approx(nll[:, start:stop].mean())
        assert row.low < row.value < row.high
        assert (row.n, row.unit) == (6, "nats per token")
    widths = [row.keys["position_to"] - row.keys["position_from"] for row in bins]
    assert np.average([row.value for row in bins], weights=widths) == pytest.approx(whole.value)


BOS = 0


def documents_of(tokens: np.ndarray) -> np.ndarray:
    """The place of the last BOS at or before each token."""
    return np.maximum.accumulate(np.where(tokens == BOS, np.arange(len(tokens)), 0))


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_losses_are_means_over_counted_tokens_and_by_document_whatever_the_chunks(chunk):
    """Against sums in plain loops over a text whose token j is worth nll[j]."""
    rng = np.random.default_rng(0)
    places = np.arange(97)
    tokens = np.where((rng.random(97) < 0.06) | (places == 0), BOS, places)
    worth = 1 + rng.random(97) + places / 97
    source = TokenSource(tokens, 16, 97, "text")
    text = HeldOut.drawn(source, BOS, seed=1, count=5)

    def scores(model, batch, *, learn):
        nll = worth[batch.targets] + (0 if learn else 1)
        mask = batch.loss_mask.astype(float)
        parts = [x.reshape(len(nll), -1, chunk).sum(axis=2) for x in (nll * mask, mask)]
        return Scores((parts[0] / parts[1]).mean(axis=1), nll, mask)

    learning, still = (
        PositionLoss.measure(scores, None, text, batch_size=2, learn=learn)
        for learn in (True, False)
    )
    places = (text.starts[:, None] + np.arange(1, 17)).ravel()
    places = places[tokens[places] != BOS]
    documents = documents_of(tokens)[places]
    assert learning.documents.tolist() == sorted(set(documents.tolist()))
    for document, nll, count in zip(
        learning.documents, learning.document_nll, learning.document_count, strict=True
    ):
        own = places[documents == document]
        assert (nll.sum(), count.sum()) == (pytest.approx(worth[own].sum()), len(own))
    summary = LearningComparison(learning, still, window=16, bytes_per_token=2.5).summary()
    mean = worth[places].mean()
    assert summary["loss"] == pytest.approx(mean)
    assert summary["loss_without_learning"] == pytest.approx(mean + 1)
    assert summary["bits_per_byte"] == pytest.approx(mean / np.log(2) / 2.5)
    assert summary["documents"] == len(set(documents.tolist()))
    alone = LearningComparison(learning, None, window=16).summary()
    assert not {"loss_without_learning", "bits_per_byte"} & alone.keys()
    if chunk < 16:
        assert summary["chunk_loss"] != pytest.approx(mean)  # every chunk weighs the same there
    half = PositionLoss.measure(scores, None, text, batch_size=2, most=1, learn=True)
    assert len(half.sequence_loss) == 2
    assert not half.same_text(learning)
    assert still.same_text(learning)


def test_a_row_says_what_the_loss_is_in_bits_per_byte():
    losses = position_loss(np.random.default_rng(0).uniform(1, 3, (6, 64)))
    loss, bits, *_ = losses.rows(LIKE, keys={}, bytes_per_token=2.0)
    assert (bits.measure, bits.unit, bits.n) == ("bits_per_byte", "bits per byte", 6)
    for ours, theirs in ((loss.value, bits.value), (loss.low, bits.low), (loss.high, bits.high)):
        assert theirs == pytest.approx(ours / np.log(2) / 2)


def test_a_bound_that_nobody_knows_is_empty_and_not_a_number():
    assert estimate((1.5, np.nan, np.nan)) == {"value": 1.5, "low": None, "high": None}


def test_differences_of_paired_sequences_are_surer_than_the_losses():
    text = np.random.default_rng(0).normal(3, 1, (16, 1)) + np.zeros((16, 64))
    better = text - 0.1 + np.random.default_rng(1).normal(0, 0.01, text.shape)
    draws = {"resamples": 500, "seed": 0, "keys": {}}
    (loss, *_) = position_loss(better).rows(LIKE, **draws)
    (less, *rest) = position_loss(better).rows(LIKE, reference=position_loss(text), **draws)
    assert (less.measure, rest[0].measure) == ("difference", "difference_at")
    assert less.value == pytest.approx(-0.1, abs=0.005)
    assert less.high - less.low < 0.05 * (loss.high - loss.low)


def test_csv_has_the_schemas_columns_the_keys_between_and_one_line_a_row():
    rows = [
        replace(LIKE, keys={"learning": True}, value=1.5, low=1.0, high=2.0, n=4, unit="nats"),
        replace(LIKE, keys={"learning": True, "depth": 50.0}, failed='why, "so"'),
    ]
    lines = list(csv.DictReader(io.StringIO(result.to_csv(rows))))
    fixed = ["suite", "run", "method", "step", "context", "measure"]
    assert list(lines[0]) == [*fixed, "learning", "depth", *("value", "low", "high"), "n", "unit",
                              "failed"]  # fmt: skip
    assert lines[0]["value"] == "1.5"
    assert lines[0]["depth"] == ""
    assert (lines[1]["value"], lines[1]["failed"]) == ("", 'why, "so"')


def test_json_holds_notes_and_rows_and_no_number_that_json_has_not(tmp_path):
    rows = [replace(LIKE, value=float("nan")).checked()]
    result.save(tmp_path, "trial", rows, {"what": "a test"})
    found = json.loads((tmp_path / "trial.json").read_text())
    assert found["notes"] == {"what": "a test"}
    assert found["rows"][0]["value"] is None
    assert "not a finite number" in found["rows"][0]["failed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial.csv", "trial.json"]


# ---- suites and their jobs -------------------------------------------------------------


def test_the_table_of_suites_has_every_name_that_can_be_asked_for():
    assert tuple(SUITES) == SUITE_NAMES
    assert tuple(ruler.TASKS) == NEEDLE_TASKS


class Fickle(AbstractSuite):
    """Three jobs, the second of which fails."""

    name = "fickle"

    def __init__(self):
        self.done = []

    def jobs(self, run):
        for context in (1, 2, 3):

            def work(on_progress, context=context):
                on_progress(1)
                if context == 2:
                    raise MemoryError("too long")
                self.done.append(context)
                return [self.row(run, context, "x", value=float(context))]

            yield Job(context, {"learning": False}, 1, work)

    def notes(self):
        return {}

    def table(self, rows):
        raise NotImplementedError

    def draw(self, rows, folder, title):
        raise NotImplementedError


def test_a_failed_job_leaves_a_row_that_says_so_and_the_others_are_done_and_saved(caplog):
    suite, saved = Fickle(), []
    model = jax.eval_shape(lambda: MetaModel(MODEL, key=jax.random.key(0)))
    runs = [TrainedModel(name, 3, TRAINING, model) for name in "ab"]
    rows = measure([suite], runs, saved=lambda which, rows: saved.append(len(rows)))["fickle"]
    assert suite.done == [1, 3, 1, 3]
    assert [(row.run, row.context, row.failed) for row in rows if row.failed] == [
        ("a", 2, "MemoryError: too long"),
        ("b", 2, "MemoryError: too long"),
    ]
    assert saved == [1, 2, 3, 4, 5, 6, 6]
    assert "MemoryError" in caplog.text


@pytest.mark.parametrize(("count", "most"), [(5, 4), (1, 8), (8, 4), (9, 4), (3, 1)])
def test_batches_have_one_size_and_hold_every_number(count, most):
    batches = in_batches(count, most)
    assert {len(batch) for batch in batches} == {len(batches[0])}
    assert len(batches[0]) <= most
    rows = [row for batch in batches for row in batch]
    assert rows[:count] == list(range(count))
    assert set(rows[count:]) <= {count - 1}


# ---- needles ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> ruler.Haystack:
    sentences = " ".join(f"Sentence {i} says very little." for i in range(400))
    return ruler.Haystack("numbered sentences", tuple(sentences.split()))


def prompts(task, haystack, tokenizer=None, **changes):
    asked = {"length": 1500, "tokens_to_generate": 128, "depths": [0.0, 25.0, 50.0, 100.0]}
    asked |= {"samples": 2, "seed": 3, **changes}
    return ruler.make_prompts(task, haystack, tokenizer or ByteTokenizer(), **asked)


def test_prompt_is_rulers_in_the_singular(words):
    prompt = prompts("niah_single_2", words, depths=[0.0], samples=1)[0]
    said = ByteTokenizer().decode(prompt.tokens)
    assert prompt.tokens[0] == 256  # BOS
    head, body, question = said.split("\n")
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    needle, rest = body.split(f": {prompt.answer}. ")
    key = needle.removeprefix("One of the special magic numbers for ").removesuffix(" is")
    assert question == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert rest.startswith("Sentence 0 says")
    assert "Sentence 0 says very little. Sentence 1 says" in rest


@pytest.mark.parametrize(
    ("task", "pattern"),
    [
        ("niah_single_1", r"\d{7}"),
        ("niah_single_2", r"\d{7}"),
        ("niah_single_3", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    ],
)
def test_needle_lies_at_its_depth_within_a_sentence_and_the_answer_fits(task, pattern, words):
    haystack = ruler.noise() if task == "niah_single_1" else words
    made = prompts(task, haystack)
    assert [p.depth for p in made] == [0, 0, 25, 25, 50, 50, 100, 100]
    for prompt in made:
        assert re.fullmatch(pattern, prompt.answer)
        assert len(prompt.tokens) + 128 <= 1500
        unit = max(map(len, haystack.units)) + 1
        assert len(prompt.tokens) + 128 > 1500 - unit - 16  # and the length is used
        said = ByteTokenizer().decode(prompt.tokens)
        body = said.split("afterwards.\n")[1].split("\nWhat is")[0]
        start = body.index("One of the special")
        needle = body[start : body.index(prompt.answer) + len(prompt.answer) + 1]
        rest = len(body) - len(needle)
        longest = max(map(len, haystack.sentences(1000))) + 1
        assert start == pytest.approx(rest * prompt.depth / 100, abs=longest)
        assert said.count(prompt.answer) == 1
        # `needle_at` and `distance` are places of tokens, which bytes make easy to check.
        assert said[prompt.needle_at - 1 :].startswith("One of the special")
        assert prompt.needle_at + prompt.distance == len(prompt.tokens) - 1


def places(task, haystack) -> np.ndarray:
    """Sentences (lines) before the needle in 400 prompts at drawn depths, and their numbers."""
    made = prompts(task, haystack, depths=[], samples=400)
    assert len(made) == 400
    found = []
    for prompt in made:
        body = ByteTokenizer().decode(prompt.tokens).split("afterwards.\n")[1].split("\nWhat is")[0]
        before = body[: body.index("One of the special")]
        unit = "There and back again." if haystack.endless else "very little."
        found.append((before.count(unit), body.count(unit), prompt.depth))
    return np.array(found)


def test_drawn_needles_stand_before_any_line_of_the_noise_alike():
    before, lines, _ = places("niah_single_1", ruler.noise()).T
    count = int(lines[0])
    assert set(lines) == {count}
    seen = np.bincount(before.astype(int), minlength=count)
    assert len(seen) == count  # RULER never hides it behind the last line
    assert np.all(np.abs(seen - 400 / count) < 4.5 * np.sqrt(400 / count))


def test_drawn_needles_stand_at_rulers_forty_depths_in_essays(words):
    _, _, depths = places("niah_single_2", words).T
    assert set(depths) <= set(ruler.depths(40))
    assert len(set(depths)) == 40
    seen = np.array([np.sum(depths == depth) for depth in ruler.depths(40)])
    assert np.all(np.abs(seen - 10) < 4.5 * np.sqrt(10))


def test_what_is_not_as_in_ruler_is_said():
    chosen, drawn = (ruler.differences(drawn=drawn) for drawn in (False, True))
    assert chosen[1:] == drawn
    assert "needles.depths=0" in chosen[0]


def test_prompts_are_a_function_of_the_seed(words):
    first, again, other = (
        [p.answer for p in prompts("niah_single_2", words, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == len(first)


def test_noise_is_rulers_sentences_line_by_line():
    said = ByteTokenizer().decode(prompts("niah_single_1", ruler.noise())[0].tokens)
    lines = said.split("\n")[2:-1]
    assert set(lines) == {
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    }


def test_any_tokenizer_file_serves(words, tmp_path):
    vocabulary = {"<s>": 0, "<unk>": 1, "Sentence": 2, "says": 3, "very": 4, "little": 5, ".": 6}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "tokenizer.json"))
    made = prompts(
        "niah_single_2", words, FileTokenizer(tmp_path / "tokenizer.json"),
        length=400, tokens_to_generate=16,
    )  # fmt: skip
    assert all(400 - 16 - 8 <= len(p.tokens) <= 400 - 16 for p in made)


def test_depths_spread_evenly_and_forty_of_them_are_rulers():
    assert ruler.depths(5) == [0, 25, 50, 75, 100]
    assert ruler.depths(1) == [50]
    assert ruler.depths(40)[:10] == [0, 3, 5, 8, 10, 13, 15, 18, 21, 23]


def test_a_length_without_room_and_a_text_too_short_are_refused(words):
    with pytest.raises(UserError, match=r"lengths=300: the shortest prompt .* at least \d+"):
        prompts("niah_single_1", ruler.noise(), length=300)
    with pytest.raises(UserError, match=r"lower the length, or give more text"):
        prompts("niah_single_2", words, length=40_000)


def test_haystack_comes_from_a_file_plain_or_json(tmp_path):
    (tmp_path / "plain.txt").write_text("One here.  Two\nhere! Three?")
    (tmp_path / "essays.json").write_text(json.dumps({"text": "First.\n\nSecond."}))
    plain = ruler.essays(str(tmp_path / "plain.txt"))
    assert plain.sentences(9) == ["One here.", "Two here!", "Three?"]
    assert plain.sentences(3) == ["One here.", "Two"]  # RULER cuts essays at any word
    assert ruler.essays(str(tmp_path / "essays.json")).units == ("First.", "Second.")


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.txt", None), ("a.json", b"[1]"), ("b.txt", b"\xff"), ("c.txt", b" ")],
)
def test_unusable_haystack_is_refused_by_name(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"haystack=.*{name}.*leave evaluation.needles.haystack"):
        ruler.essays(str(tmp_path / name))


def test_built_in_haystack_is_prose_of_the_held_out_modules_and_says_so():
    found = ruler.essays("")
    assert "docstrings" in found.source
    assert "Paul Graham" in found.source
    assert len(found.sentences(10**9)) > 1000


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (" 1234567.", "1234567", True),
        ("the number is\x001234567 I think", "1234567", True),
        ("123 4567", "1234567", False),
        ("ABCD-EF", "abcd-ef", True),
        ("", "1", False),
        ("91234567", "1234567", True),  # RULER's match is of substrings
    ],
)
def test_an_answer_counts_where_the_value_occurs_in_any_case(said, answer, right):
    assert ruler.holds(said, answer) is right


# ---- repetition ------------------------------------------------------------------------


def test_distinct_counts_different_ngrams():
    tokens = np.array([1, 2, 1, 2, 1])
    assert repetition.distinct(tokens, 1) == 2 / 5
    assert repetition.distinct(tokens, 2) == 2 / 4
    assert repetition.distinct(np.arange(9), 4) == 1
    assert repetition.distinct(np.arange(2), 4) == 1


def test_repeated_counts_tokens_seen_within_the_span():
    tokens = np.array([1, 2, 3, 1, 2, 9])
    assert repetition.repeated(tokens, 3) == 2 / 5
    assert repetition.repeated(tokens, 2) == 0


def longest_by_trying(tokens: list[int]) -> int:
    n = len(tokens)
    found = 0
    for size in range(1, n):
        stretches = [tuple(tokens[i : i + size]) for i in range(n - size + 1)]
        found = size if len(set(stretches)) < len(stretches) else found
    return found


@given(st.lists(st.integers(0, 2), max_size=24))
def test_longest_repeat_is_that_of_trying_them_all(tokens):
    assert repetition.longest_repeat(np.array(tokens, int)) == longest_by_trying(tokens)


def test_tokens_of_a_judge_fall_into_the_bins_of_their_positions():
    judged = Judged(np.array([1.0, 2, 3, 5]), np.array([1.0, 2, 4, 8], np.float32))
    sums, counts = binned(judged, np.array([0, 3, 5]))
    assert sums.tolist() == [3, 4]
    assert counts.tolist() == [2, 1]
