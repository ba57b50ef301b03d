"""`generate`: a text in, a text out, states on disk, and what is refused."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt import generate
from ttt.config import compose, resolve, to_dict
from ttt.dataloader import text
from ttt.errors import UserError
from ttt.inference.engine import Engine
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.step_folders import run_folder
from ttt.model import published
from ttt.model.transformer import MetaModel

ROOT = Path(__file__).parents[1]
SMALL = [
    "data=bytes",
    "training.sample_tokens=0",
    "size.intermediate_size=32",
    "size.window=24",
    "size.chunk=16",
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "training.seq_length=48",
    "backend.compilation_cache_dir=''",
]
E2E = ["+experiment=tiny/pretrain/pretrain-tiny-e2e", "model.suffix_len=1", *SMALL]
FA = ["+experiment=tiny/pretrain/pretrain-tiny-fa", *SMALL]
PROMPT = "def fold(items):\n    return sum(items)\n"


def write_checkpoint(root: Path, overrides, change=lambda model: model) -> None:
    config = resolve(compose(overrides))
    model = change(MetaModel(config.model, key=jax.random.key(0)))
    folder = run_folder(root, config.training.exp_folder, config.training.exp_name)
    checkpoints = Checkpoints(folder)
    checkpoints.save(
        3,
        model_weights=published.to_stored(model),
        opt_state={"count": np.zeros(1)},
        loader_state={},
        manifest={"config": to_dict(config), "data": {}},
    )
    checkpoints.wait()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root, E2E)
    write_checkpoint(root, FA)
    return root


@pytest.fixture
def command(checkpoints, tmp_path, monkeypatch, capsys):
    """Run `generate` with overrides: (stdout, stderr)."""
    monkeypatch.setenv("TTT_DATA", str(tmp_path / "nowhere"))

    def run(*overrides, experiment=E2E, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        own = ["generate.max_new_tokens=24", f"deploy_paths.checkpoint={checkpoints}"]
        generate.run(resolve(compose([*experiment, *own, *overrides])))
        return capsys.readouterr()

    return run


def test_a_prompt_is_read_learned_from_and_written_on(command, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT)
    file = command(f"generate.prompt_file={tmp_path / 'prompt'}")
    piped = command(stdin=PROMPT.encode())
    assert piped.out == file.out
    assert len(file.out) > 1
    tokens = len(PROMPT) + 1
    for part in (
        f"read {tokens} tokens in",
        f"{(tokens - 1) // 16} test-time steps taken",
        "as read, learning chunk by chunk",
        "without learning",
        "read again by the learned weights",
        "wrote 24 tokens",
    ):
        assert part in file.err
    still = command(f"generate.prompt_file={tmp_path / 'prompt'}", "generate.learn=false")
    assert "0 test-time steps taken" in still.err
    assert "without learning" not in still.err


def test_a_saved_state_goes_on_as_if_it_had_never_stopped(command, tmp_path):
    state = tmp_path / "deep" / "state"
    told = command(
        f"generate.save_state={state}", "generate.max_new_tokens=0", stdin=PROMPT.encode()
    )
    assert "state saved" in told.err
    assert told.out == ""
    whole = command(stdin=PROMPT.encode())
    loaded = command(f"generate.load_state={state}")
    assert loaded.out == whole.out
    assert f"state: {len(PROMPT) + 1} tokens read before" in loaded.err
    assert "are saved" in loaded.err
    more = command(f"generate.load_state={state}", "generate.prompt='    x'")
    assert more.out != whole.out
    with pytest.raises(UserError, match="another model"):
        command(f"generate.load_state={state}", "training.optimizer_inner.lr=0.5")


def test_full_attention_takes_no_more_than_its_context(command):
    long = b"x" * 40
    with pytest.raises(UserError, match=r"comes to 65 tokens.*context=48"):
        command(experiment=FA, stdin=long)
    assert "wrote 24 tokens" in command("generate.context=65", experiment=FA, stdin=long).err


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "the prompt is empty"),
        (["generate.prompt=a", "generate.step=9"], "no step 9: choose one of 3"),
        (["generate.prompt=a", "generate.checkpoint=default/none"], "no checkpoint in"),
        (["generate.prompt=a", "training.exp_name=none"], "no checkpoint in"),
        (["generate.prompt_file=/none/there"], "cannot be read"),
        (["generate.prompt=a", "generate.load_state=/none"], "no saved state at /none"),
        (["generate.prompt=a", "generate.save_state=/"], "is a folder"),
        (["generate.prompt=a", "generate.tokenizer=/none.json"], "No tokenizer file"),
        (["generate.prompt=a", "model.bos_token_id=7"], "BOS 256, the model 258 and 7"),
        (["generate.prompt=a", "model.vocab_size=400"], "parameters cannot be restored"),
        (["generate.prompt=a", "training.dataset_name=books3"], "set generate.tokenizer"),
        (["generate.prompt=a", "generate.prompt_file=b"], "there can be one prompt"),
        (["generate.prompt=a", "generate.stop=[900]"], "must be below vocab_size"),
        (["generate.prompt=a", "generate.top_p=0"], "must lie in"),
    ],
)
def test_a_mistake_is_named(command, overrides, says):
    with pytest.raises(UserError, match=says):
        command(*overrides)


def test_weights_that_are_not_finite_are_refused(command, tmp_path):
    def broken(model):
        gain = model.language_model.model.ln_f.weight.at[3].set(jnp.nan)
        return eqx.tree_at(lambda m: m.language_model.model.ln_f.weight, model, gain)

    write_checkpoint(tmp_path, E2E, broken)
    with pytest.raises(UserError, match=r"not finite: language_model\.model\.ln_f\.weight"):
        command(f"deploy_paths.checkpoint={tmp_path}", "generate.prompt=a")


def test_mistakes_exit_with_2_and_no_traceback(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "ttt.generate", E2E[0], "generate.prompt=a"],
        cwd=tmp_path,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert "no checkpoint in" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_half_a_character_waits_for_its_other_half():
    shown = []
    stream = generate.Stream(text.ByteTokenizer(), shown.append)
    for byte in "aé\nb€".encode():
        stream.add(np.array([byte]))
    assert [part for part in shown if part] == ["a", "é", "\n", "b", "€"]
    stream.add(np.array([0xE2]))
    stream.end()
    assert "".join(shown) == "aé\nb€\ufffd\n"


def test_full_attention_gets_as_few_places_as_prompt_and_text_need():
    config = resolve(compose([FA[0], "generate.max_new_tokens=100"]))
    assert config.training.seq_length == 2048
    assert generate.places(config, 156) == 256
    assert generate.places(config, 157) == 512
    assert generate.places(config, 5000) == 2048  # and the prompt is refused
    kept = replace(config, generate=replace(config.generate, save_state="book.state"))
    assert generate.places(kept, 156) == 2048


# ---- one text, learning and not (script 16) --------------------------------------------------


@pytest.fixture(scope="module")
def learner(tmp_path_factory) -> Path:
    """The step's folder of a model whose checkpoint knows its tokenizer."""
    root = tmp_path_factory.mktemp("learner")
    config = resolve(compose([*E2E, "training.optimizer_inner.lr=0.3"]))
    checkpoints = Checkpoints(run_folder(root, "f", "run"))
    checkpoints.save(
        3,
        model_weights=published.to_stored(MetaModel(config.model, key=jax.random.key(0))),
        opt_state=None,
        loader_state={},
        manifest={"config": to_dict(config), "data": {}, "tokenizer": "bytes"},
    )
    checkpoints.wait()
    return checkpoints.find()


def test_a_text_is_read_learning_and_not(learner, tmp_path, run_script):
    text = tmp_path / "text.txt"
    text.write_text("the rain in Spain stays mainly in the plain. " * 8)
    script = ("16_read_and_learn.py", "--checkpoint-root", learner.parents[2], "--run", "f/run")
    code, said = run_script(*script, "--text", text, "--tokens", 100, "--out", tmp_path / "o")
    assert code == 0, said.err
    assert "read 100 of 100" in said.out
    assert (tmp_path / "o.png").stat().st_size > 5000
    rows = np.genfromtxt(tmp_path / "o.csv", delimiter=",", names=True)
    assert len(rows) == 99
    first = rows["token"] < 16
    np.testing.assert_allclose(rows["learning"][first], rows["still"][first], atol=1e-6)
    assert np.abs(rows["learning"] - rows["still"])[~first].max() > 1e-3
    # The same losses as of the engine that reads all at once.
    config = resolve(compose([*E2E, "training.optimizer_inner.lr=0.3"]))
    model, _ = published.load_model(config.model, learner)
    ids = np.frombuffer(text.read_bytes(), np.uint8)[:99].astype(np.int32)
    ids = np.concatenate([[256], ids]).astype(np.int32)
    engine = Engine(model, config.training, context=100)
    _, nll = engine.read(engine.start(1), [ids])
    np.testing.assert_allclose(rows["learning"], nll[0], atol=2e-6)

    assert run_script(*script, "--text", tmp_path / "none")[0] == 2
    code, said = run_script(*script, "--text", text, "--tokens", 20)
    assert (code, "give one of at least 32" in said.err) == (2, True)
