"""`benchmark`: variants side by side, their record, table and picture, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ttt import benchmark, figures, mixers
from ttt.bench import numerics, report, timing
from ttt.bench.timing import Timing
from ttt.config import compose, differences, resolve, to_dict
from ttt.errors import UserError
from ttt.infra.record import RunRecord
from ttt.knobs import BENCHMARK_CALLS
from ttt.plan import hardware

ROOT = Path(__file__).parents[1]
SMALL = [
    "data=bytes",
    "training.sample_tokens=0",
    "model.remat_prefix=attention",
    "+experiment=tiny/pretrain/pretrain-tiny-e2e",
    "size.intermediate_size=32",
    "size.window=24",
    "size.chunk=16",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.suffix_len=1",
    "model.num_attention_heads=2",
    "training.seq_length=48",
    "training.global_batch_size=2",
    "backend.compilation_cache_dir=''",
    "benchmark.exp_name=trial",
    "benchmark.calls=[gradient]",
    "benchmark.repetitions=2",
]
TWO = [
    "+benchmark.variants.plain='method=fa model.suffix_len=0'",
    "+benchmark.variants.fast='method=fa model.suffix_len=0 model.remat_prefix=block'",
]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run the benchmark with overrides: (exit code, its record)."""
    monkeypatch.setattr(timing, "from_scratch", nullcontext)  # the tests' own cache serves here

    def run(*overrides):
        given = [*SMALL, f"deploy_paths.experiments={tmp_path}", *overrides]
        code = benchmark.benchmark(resolve(compose(given)), given)
        return code, RunRecord(tmp_path / "default" / "trial")

    return run


@pytest.fixture
def sound(monkeypatch):
    """No numerics check: the test is about something else, and the check compiles much."""
    monkeypatch.setattr(numerics, "fault", lambda config: None)


def results_of(record: RunRecord) -> list[dict]:
    return json.loads((record.folder / "benchmark.json").read_text())["results"]


def result(variant="e2e", call="prefill", context=1024, seconds=(2.0, 1.0, 4.0), **more) -> Timing:
    return Timing(variant, call, context, 2, tuple(seconds), 3.0, 5.0, 8e12, 0.5, **more)


# ---- the command -----------------------------------------------------------------------


def test_two_variants_leave_record_and_table_and_end_in_one_json_object(measure, capsys):
    code, record = measure(*TWO)
    assert not code
    assert record.run()["status"] == "finished"
    assert record.run()["attempts"][0]["versions"]["jax"] == jax.__version__
    rows = results_of(record)
    assert [row["variant"] for row in rows] == ["plain", "fast"]
    for row in rows:
        assert (row["call"], row["context"], row["sequences"]) == ("gradient", 48, 2)
        assert len(row["seconds"]) == 2
        assert row["spread_s"]["min"] <= row["step_s"] <= row["spread_s"]["max"]
        assert row["tokens_per_s"] == pytest.approx(96 / row["step_s"])
        assert row["temp_mb"] > 0
        assert row["flops"] > 0
        assert row["mfu"] is None  # nobody knows the peak of this CPU
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert list(last) == ["plain", "fast"]
    for numbers in last.values():
        assert numbers.keys() == {"step_s", "temp_mb", "compile_s"}
        assert all(value > 0 for value in numbers.values())
    table = (record.folder / "benchmark.md").read_text()
    assert table in out
    assert not (record.folder / "benchmark.png").exists()  # one context is no curve


def test_every_call_runs(measure, sound):
    calls = f"benchmark.calls=[{','.join(BENCHMARK_CALLS)}]"
    code, record = measure(calls, TWO[0], "training.accum_steps=2")
    assert not code
    assert [row["call"] for row in results_of(record)] == list(BENCHMARK_CALLS)


def test_contexts_share_the_tokens_and_make_a_picture(measure, sound):
    many = ["benchmark.contexts=[16,32]", "benchmark.tokens=64", "benchmark.calls=[evaluate]"]
    code, record = measure(*many, TWO[0])
    assert not code
    rows = results_of(record)
    assert [(row["context"], row["sequences"]) for row in rows] == [(16, 4), (32, 2)]
    assert (record.folder / "benchmark.png").stat().st_size > 10_000


def test_what_auto_became_is_measured_and_recorded(measure, sound, monkeypatch):
    seen = []

    def timed(configs, *call, **asked):
        settings = [(c.model.remat_prefix, c.training.inner_remat_freq) for c in configs.values()]
        seen.extend(settings)
        return [result(name) for name in configs]

    machine = hardware.find_hardware(resolve(compose(SMALL)))
    monkeypatch.setattr(hardware, "find_hardware", lambda config: replace(machine, budget=1))
    monkeypatch.setattr(timing, "measure", timed)
    auto = ["model.remat_prefix=auto", "training.inner_remat_freq=0"]
    code, record = measure(*auto, "+benchmark.variants.set='model.remat_prefix=dots'", TWO[0])
    assert not code
    # What keeps least; and three chunks have no divisor up to their root.
    assert seen == [("dots", 1), ("block", 1)]
    chosen = json.loads((record.folder / "benchmark.json").read_text())["chosen"]
    assert [(row["variant"], row["context"]) for row in chosen] == [("set", 48), ("plain", 48)]
    assert chosen[0]["training.inner_remat_freq"] == 1
    assert chosen[1]["model.remat_prefix"] == "block"
    assert "model.remat_prefix" not in chosen[0]


def test_without_variants_the_settings_are_measured_as_they_stand():
    config = resolve(compose(SMALL))
    found = benchmark.variants(config, SMALL, 32)
    (one,) = found.items()
    assert one[0] == "pretrain-tiny-e2e"
    assert differences(to_dict(one[1]), to_dict(config)) == {"training.seq_length": (32, 48)}


def test_a_variant_with_wrong_numbers_gets_no_timings_and_exit_code_1(measure, capsys, monkeypatch):
    original = numerics._loss_and_gradient

    def wrong(model, training):
        loss, gradient = original(model, training)
        return loss, jax.tree.map(
            lambda g: g * 1.001 if model.remat_prefix == "block" else g, gradient
        )

    monkeypatch.setattr(numerics, "_loss_and_gradient", wrong)
    code, record = measure(*TWO)
    assert code == 1
    rows = {row["variant"]: row for row in results_of(record)}
    assert "step_s" in rows["plain"]
    assert rows["fast"].keys() == {"variant", "call", "context", "sequences", "failed"}
    assert "gradient 1.0e-03" in rows["fast"]["failed"]
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["fast"] == {"failed": rows["fast"]["failed"]}
    assert rows["fast"]["failed"] in (record.folder / "benchmark.md").read_text()


def test_a_variant_that_finds_no_memory_fails_and_the_others_are_timed(measure, sound, monkeypatch):
    program = timing.BatchProgram

    def full(config, call):
        if config.model.remat_prefix == "attention":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return program(config, call)

    monkeypatch.setattr(timing, "BatchProgram", full)
    code, record = measure(*TWO)
    assert code == 1
    assert [row.get("failed") for row in results_of(record)] == ["out of memory", None]


def test_a_mistake_in_a_variant_is_named_before_anything_is_measured(measure, tmp_path):
    with pytest.raises(
        UserError, match=r"benchmark\.variants\.odd='model.remat_prefix=all' at 48"
    ) as error:
        measure("+benchmark.variants.odd='model.remat_prefix=all'")
    assert "none, dots" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cache(tmp_path):
    """The persistent cache of compiled programs in a folder of its own, for all programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path / "cache"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_timed_compilations_leave_the_persistent_cache_alone(cache):
    def compiled(factor):
        jax.jit(lambda x: x * factor).lower(1.0).compile()
        return len(list(cache.glob("*"))) if cache.exists() else 0

    with timing.from_scratch():
        assert compiled(2) == 0
    assert compiled(3) > 0  # and it serves again afterwards


def test_the_command_runs_inside_hydra_and_mistakes_exit_with_2(tmp_path):
    command = [sys.executable, "-m", "ttt.benchmark", "+benchmark=second_order"]
    ran = subprocess.run(
        [*command, "benchmark.variants.fast='model.hidden_size=-1'"],
        cwd=tmp_path,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "benchmark.variants.fast='model.hidden_size=-1'" in ran.stderr
    assert "Traceback" not in ran.stderr


# ---- the named benchmarks ----------------------------------------------------------------


def test_second_order_has_the_shape_that_its_figures_are_compared_at():
    given = ["+benchmark=second_order"]
    config = resolve(compose(given))
    model, training = config.model, config.training
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (256, 512, 6)
    assert (model.suffix_len, model.num_attention_heads, model.vocab_size) == (2, 4, 4096)
    assert (training.seq_length, training.global_batch_size) == (2048, 1)
    assert (model.mini_batch_size, model.sliding_window_size) == (256, 512)
    assert model.compute_dtype == model.param_dtype == model.state_dtype == "fp32"
    assert training.train_mode == "meta"
    assert config.benchmark.calls == ("gradient",)
    found = benchmark.variants(config, given, 2048)
    assert list(found) == ["naive", "fast", "small"]
    for variant in found.values():
        assert differences(to_dict(variant), to_dict(config)) == {}


@pytest.mark.parametrize(("size", "name"), [("125m", "methods"), ("tiny", "tiny")])
def test_methods_are_those_of_their_names(size, name):
    given = [f"+experiment={size}/pretrain/pretrain-{size}-e2e", f"+benchmark={name}"]
    config = resolve(compose(given))
    for context in config.benchmark.contexts:
        found = benchmark.variants(config, given, context)
        kinds = {n: (v.training.train_mode, v.model.seq_modeling_block) for n, v in found.items()}
        kept = [mixers.grows(variant.model) for variant in found.values()]
        assert kept == [True, False, True, False]
        assert kinds == {
            "fa": ("pretrain", "self_attention"),
            "swa": ("pretrain", "SWA"),
            "hybrid": ("pretrain", ""),
            "e2e": ("meta", "SWA"),
        }
        tokens = {v.training.seq_length * v.training.global_batch_size for v in found.values()}
        assert tokens == {config.benchmark.tokens}


@pytest.mark.parametrize(("size", "name"), [("125m", "latency"), ("tiny", "tiny_latency")])
def test_latency_reads_and_writes_one_sequence_of_every_method_at_every_context(size, name):
    given = [f"+experiment={size}/pretrain/pretrain-{size}-e2e", f"+benchmark={name}"]
    config = resolve(compose(given))
    assert config.benchmark.calls == ("prefill", "decode", "decode_between_steps")
    assert min(config.benchmark.contexts) == 1024
    assert max(config.benchmark.contexts) >= 65536
    for context in config.benchmark.contexts:
        found = benchmark.variants(config, given, context)
        assert list(found) == ["fa", "swa", "hybrid", "e2e"]
        assert {v.training.global_batch_size for v in found.values()} == {1}


# ---- the crossing ------------------------------------------------------------------------


def latencies(variant, *seconds, call="decode"):
    kind = {"learns": variant == "e2e", "grows": variant in ("fa", "hybrid")}
    return [
        Timing(variant, call, 1024 * 2**i, 1, (s,), tokens=128, **kind)
        for i, s in enumerate(seconds)
    ]


def test_the_crossing_lies_where_two_straight_lines_of_the_picture_meet(tmp_path):
    found = [*latencies("fa", 1, 2, 4, 8), *latencies("e2e", 3, 3, 3, 3)]
    (crossing,) = report.crossings(found).values()
    assert crossing == pytest.approx(3 * 1024)  # fa takes 1 s per 1,024 tokens, so 3 s at 3,072
    assert "decoding, steps included: e2e is cheaper than fa from about 3,072" in report.table(
        found
    )
    report.draw(found, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_last_crossing_counts_and_none_is_said_so():
    fa = latencies("fa", 4, 1, 4, 4)
    assert (
        2048 < report.crossings([*fa, *latencies("e2e", 3, 3, 3, 3)])["decode", "e2e", "fa"] < 4096
    )
    for seconds, says in (((9, 9, 9, 9), "dearer"), ((0.1,) * 4, "at every context")):
        assert says in report.table([*fa, *latencies("e2e", *seconds)])
    assert report.crossings([*fa, *latencies("swa", 3, 3, 3, 3)]) == {}
    assert report.crossings([*fa[:1], *latencies("e2e", 3)]) == {}


def test_a_method_that_learns_is_compared_with_each_whose_state_grows():
    growing = [*latencies("fa", 1, 2, 4, 8), *latencies("hybrid", 2, 2, 3, 5)]
    others = [*latencies("swa", 1, 1, 1, 1), *latencies("e2e", 3, 3, 3, 3)]
    found = report.crossings([*growing, *others])
    assert found == {
        ("decode", "e2e", "fa"): pytest.approx(3 * 1024),
        ("decode", "e2e", "hybrid"): pytest.approx(4 * 1024),
    }


def test_words_at_a_crossing_stand_above_all_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "finish", lambda figure, path, title: drawn.append(figure))
    both = [*latencies("fa", 1, 2, 4, 8), *latencies("hybrid", 2, 2, 3, 5)]
    report.draw([*both, *latencies("e2e", 3, 3, 3, 3)], tmp_path / "a.png", title="t")
    (figure,) = drawn
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert len(axes.texts) == 2
    highest = axes.transData.transform([(1024, max(t.s_per_1k_tokens for t in both))])[0, 1]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert min(box.y0 for box in boxes) > highest
    assert boxes[1].y1 < boxes[0].y0


def test_a_picture_tells_any_number_of_variants_apart(tmp_path):
    looks = [figures.style(number) for number in range(50)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 50
    many = [t for i in range(12) for t in latencies(f"variant-{i}", 1 + i, 2 + i)]
    report.draw(many, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_a_written_token_counts_as_one_and_not_as_its_context():
    (one,) = latencies("e2e", 0.64)
    assert one.tokens_per_s == pytest.approx(200)
    assert one.s_per_1k_tokens == pytest.approx(5)  # milliseconds per token


# ---- the check ---------------------------------------------------------------------------


def test_the_small_network_keeps_the_kind_and_lets_the_window_slide():
    config = resolve(compose(["+experiment=760m/extension/ext-760m-e2e-32K"]))
    model, training = numerics._small(config.model, config.training)
    assert model.hidden_size <= 32
    assert model.compute_dtype == "fp32"
    assert (model.suffix_len, model.num_hidden_layers) == (2, 4)
    assert model.mini_batch_size < model.sliding_window_size < training.seq_length
    assert 0 < model.loss_block < model.vocab_size  # 16384 of 128256 entries: still in blocks
    full = resolve(compose(["+experiment=760m/extension/ext-760m-fa-32K"]))
    model, training = numerics._small(full.model, full.training)
    assert model.mini_batch_size == training.seq_length


def test_the_small_network_has_every_mixer_and_as_many_query_heads_to_a_key_head():
    config = resolve(compose(["+experiment=760m/pretrain/pretrain-760m-swa"]))
    cycle = ("sliding_attention",) * 5 + ("full_attention",)
    real = replace(config.model, seq_modeling_block="", layer_types=cycle, num_key_value_heads=8)
    model, _ = numerics._small(real, config.training)
    assert set(mixers.layer_types(model)) == set(cycle)
    assert (model.num_attention_heads, model.num_key_value_heads) == (2, 1)
    assert model.num_attention_heads * model.head_dim == model.hidden_size


def test_test_time_training_agrees_with_its_plain_twin():
    changes = ["model.remat_prefix=block", "training.inner_remat_freq=2", "model.loss_block=100"]
    assert numerics.fault(resolve(compose([*SMALL, *changes]))) is None


def test_a_gradient_of_nan_is_no_agreement(monkeypatch):
    def twice(model, training):
        nan = training.inner_gradient == "forward_over_reverse"
        return 1.0, jax.numpy.full(3, float("nan") if nan else 1.0)

    monkeypatch.setattr(numerics, "_loss_and_gradient", twice)
    config = resolve(compose(SMALL))
    assert "gradient nan" in (numerics.fault(config) or "")


# ---- the report --------------------------------------------------------------------------


def test_figures_follow_from_the_median():
    assert result().median == 2.0
    assert result().tokens_per_s == 1024
    assert result().s_per_1k_tokens == pytest.approx(1000 / 1024)


def test_table_shows_speed_spread_and_costs_and_why_something_failed():
    lost = dataclasses.replace(result("fa"), seconds=(), failed="out of memory")
    lines = report.table([result(), lost]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        *("e2e", "prefill", "1,024", "2", "2", "1 – 4", "0.977"),
        *("1,024", "4", "50.0%", "5", "3.0"),
    ]
    assert "failed" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[-1] == "fa, prefill, 1024: out of memory"


def test_summary_tells_contexts_apart_where_there_are_several():
    assert json.loads(report.summary([result(), result(context=2048)])) == {
        "e2e/prefill/1024": {"step_s": 2.0, "temp_mb": 5.0, "compile_s": 3.0},
        "e2e/prefill/2048": {"step_s": 2.0, "temp_mb": 5.0, "compile_s": 3.0},
    }


def test_picture_leaves_out_what_failed(tmp_path):
    lost = dataclasses.replace(result("fa", context=2048), seconds=(), failed="out of memory")
    report.draw([result(), result("fa"), lost], tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").stat().st_size > 5_000
