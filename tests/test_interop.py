"""Foreign models in and out again: their function, every tensor, tokenizer, and bad input."""

import json
import re
from dataclasses import replace

import foreign
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ttt.config import of_stored
from ttt.errors import RunError, UserError
from ttt.infra import checkpoint, step_folders
from ttt.interop import export, families, imports, reference
from ttt.interop.convert import convert, half_split, interleaved
from ttt.interop.sources import open_source
from ttt.model import published
from ttt.model.published import load_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (source folder, imported checkpoint, configuration) of every tiny model."""
    place = tmp_path_factory.mktemp("foreign")
    found = {}
    for name in foreign.NAMES:
        path = foreign.folder(name, place)
        done = imports.import_model(
            open_source(path), name, root=place / "ckpt", exp_folder="ext", about={"model": name}
        )
        found[name] = (path, done)
    return found


def function(model, ids):
    """The logits of a model of ours."""
    return np.asarray(imports.logits(model, jnp.asarray(ids)), np.float64)


def oracle_logits(params, ids, config):
    """By the NumPy model of the tests, which shares nothing with ours."""
    model = {key: getattr(config.model, key) for key in config.model.__dataclass_fields__}
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    size = (0, config.model.num_key_value_heads, config.model.head_dim)
    pasts = {layer: (np.zeros(size), np.zeros(size)) for layer in range(3)}
    h, _ = oracle.run_blocks(oracle.Node(params[oracle.EMBEDDING][ids]), params, {}, pasts, model)
    h = oracle.rms_norm(h, params[oracle.FINAL_NORM], model["rms_norm_eps"]).value
    head = params[oracle.EMBEDDING].T if model["tie_word_embeddings"] else params[oracle.HEAD]
    return h @ head


# ---- their function ------------------------------------------------------------------


@pytest.mark.parametrize("name", foreign.NAMES)
def test_an_import_computes_what_the_model_does_in_other_programs(models, name):
    path, done = models[name]
    model, account = load_model(done.config.model, done.folder)
    assert (account.initialised, account.unused, account.cast) == ((), (), ())
    ids, expected = foreign.recorded(name)
    ours = function(model, ids)
    # transformers turns keys and queries in float32, whatever the dtype of the rest.
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    np.testing.assert_allclose(reference.logits(open_source(path), ids), expected, atol=2e-5)
    params = published.to_published(model)
    np.testing.assert_allclose(ours, oracle_logits(params, ids, done.config), atol=1e-5)


@pytest.mark.parametrize("name", foreign.NAMES)
def test_the_settings_are_those_of_the_family(models, name):
    _, done = models[name]
    model = done.config.model
    assert {key: getattr(model, key) for key in foreign.EXPECTED[name]} == foreign.EXPECTED[name]
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (4, 2, 8)
    assert (model.post_norm, model.prime) == (False, False)
    assert model.rms_norm_eps == (1e-5 if name.startswith("llama") else 1e-6)
    assert model.rope_scaling == ((8.0, 1.0, 4.0, 16.0) if name == "llama3" else ())
    # What a checkpoint says of itself is enough to build it again.
    assert of_stored(step_folders.read_manifest(done.folder)["config"]).model == model


def faults(config, arrays, source):
    """Ways to get an import wrong: name -> (settings, parameters)."""
    mixer = f"{families.BLOCKS}seq_modeling_block."
    turned = dict(arrays)
    for w in ("wq.weight", "wk.weight"):
        array = arrays[mixer + w]
        turned[mixer + w] = array[..., half_split(array.shape[-1], source.facts.head_dim)]
    swapped = arrays | {
        f"{families.BLOCKS}feed_forward.{a}.weight": arrays[
            f"{families.BLOCKS}feed_forward.{b}.weight"
        ]
        for a, b in (("w1", "w3"), ("w3", "w1"))
    }
    model = config.model

    def setting(**changed):
        return replace(config, model=replace(model, **changed))

    wrong = {
        "eps": (setting(rms_norm_eps=10 * model.rms_norm_eps), arrays),
        "theta": (setting(rope_theta=2 * model.rope_theta), arrays),
        "pairing": (config, turned),
        "gate and up": (config, swapped),
    }
    if source.facts.attention_bias:
        wrong["bias"] = (config, arrays | {f"{mixer}wq.bias": 0 * arrays[f"{mixer}wq.bias"]})
    if source.facts.qk_norm:
        name = f"{mixer}q_norm.weight"
        wrong["gain"] = (config, arrays | {name: np.ones_like(arrays[name])})
    if source.facts.rope_scaling:
        wrong["scaling"] = (setting(rope_scaling=()), arrays)
    return wrong


@pytest.mark.parametrize("name", foreign.NAMES)
def test_each_wrong_part_of_an_import_is_seen(models, name):
    path, done = models[name]
    source = open_source(path)
    arrays, _ = convert(source)
    ids, expected = foreign.recorded(name)
    for fault, (config, wrong) in faults(done.config, arrays, source).items():
        model = imports.network(config, wrong, path)
        # A wrong eps moves tiny models by less than the bound for real ones, not by less than ours.
        assert np.max(np.abs(function(model, ids) - expected)) > 2e-4, fault
        if fault != "eps":
            with pytest.raises(RunError, match=r"logits differ by up to .* Nothing was written"):
                imports.compare(source, model, ids)


def test_rows_of_half_split_heads_are_interleaved_and_back():
    assert interleaved(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = np.arange(24)
    np.testing.assert_array_equal(rows[interleaved(24, 6)][half_split(24, 6)], rows)


# ---- every tensor --------------------------------------------------------------------


def test_the_audit_names_every_tensor_and_what_was_done_to_it(models):
    path, done = models["qwen2"]
    rows = {row["source"]: row for row in json.loads((done.folder / "audit.json").read_text())}
    assert rows.keys() == foreign.tensors(path).keys()
    row = rows["model.layers.1.self_attn.k_proj.bias"]
    assert row["operation"] == "cast, permute"
    assert row["target"] == "language_model.model.h.blocks.seq_modeling_block.wk.bias[1]"
    assert (row["dtype"], row["shape"]) == ("BF16", [16])
    assert rows["model.layers.0.mlp.up_proj.weight"]["operation"] == "cast, transpose"
    assert rows["model.norm.weight"]["operation"] == "cast"
    assert len({row["sha256"] for row in rows.values()}) == len(rows)
    stored = checkpoint.read_flat(done.folder, "model_weights")
    numbers = sum(array.size for array in stored.values())
    assert numbers == families.parameters(open_source(path).facts)


def test_provenance_and_tokenizer_lie_in_the_checkpoint(models):
    path, done = models["qwen3"]
    manifest = step_folders.read_manifest(done.folder)
    known = manifest["provenance"]
    assert known["files"].keys() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert known["files"] == open_source(path).hashes
    assert (known["family"], known["stored_as"]) == ("qwen3", {"BF16": 35})
    assert known["check"]["largest_logit_difference"] < 1e-4
    text = "the rain, and 12 more"
    kept = foreign.tokenizers.Tokenizer.from_file(str(done.folder / "tokenizer.json"))
    assert kept.encode(text).ids == foreign.small_tokenizer().encode(text).ids
    latest = json.loads((done.folder.parent / "latest.json").read_text())
    assert (latest["step"], latest["path"]) == (0, str(done.folder))
    assert latest["provenance"] == known


def test_a_stored_copy_of_a_tied_head_must_be_the_embedding(tmp_path):
    path = foreign.folder("llama3", tmp_path)
    embedding = foreign.tensors(path)["model.embed_tokens.weight"]
    foreign.rewrite(path, {"lm_head.weight": embedding})
    _, audit = convert(open_source(path))
    assert audit[-1].operation == "equal to it"
    other = embedding.copy()
    other[0, 0] += 1
    foreign.rewrite(path, {"lm_head.weight": other})
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        convert(open_source(path))


# ---- GGUF ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", foreign.NAMES)
def test_a_gguf_file_gives_the_weights_of_the_folder_it_was_made_from(models, tmp_path, name):
    path = models[name][0]
    if name == "llama3":  # a scaling that is known by its numbers
        path = foreign.folder("llama3", tmp_path)
        scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        foreign.reconfigure(path, {"rope_parameters": scaling | {"rope_theta": 5e5}})
    folder, file = open_source(path), foreign.write_gguf(path, tmp_path / "model.gguf")
    source = open_source(file)
    assert source.facts == replace(folder.facts, eos_token_id=0)
    assert source.half_split == (name not in ("llama", "llama3"))
    ours, theirs = convert(source)[0], convert(folder)[0]
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    text = "the rain in 1999's Spain\n\n  stays"
    assert source.tokenizer().encode(text).ids[-1] == folder.tokenizer().encode(text).ids[-1]


# ---- out again -----------------------------------------------------------------------


@pytest.mark.parametrize("name", foreign.NAMES)
def test_an_import_leaves_again_as_it_came_bit_for_bit(models, tmp_path, name):
    path, done = models[name]
    out = export.export(done.folder, tmp_path / "out")
    assert out.dtype == "bfloat16"
    theirs, ours = foreign.tensors(path), foreign.tensors(out.folder)
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert array.tobytes() == ours[key].tobytes(), key
    ids, expected = foreign.recorded(name)
    # Read back by code that knows nothing of how it was written.
    np.testing.assert_allclose(reference.logits(open_source(out.folder), ids), expected, atol=2e-5)
    assert open_source(out.folder).facts == open_source(path).facts


def test_an_export_is_rounded_only_if_asked(models, tmp_path):
    _, done = models["qwen3"]
    arrays = checkpoint.read_flat(done.folder, "model_weights")
    assert (
        export.tensors(arrays, open_source(models["qwen3"][0]).facts, "float32")[
            "model.norm.weight"
        ].dtype
        == np.float32
    )
    arrays["language_model.model.ln_f.weight"] = np.full(24, 1 + 1e-4, np.float32)
    assert export._dtype(arrays, "auto") == "float32"
    assert export._dtype(arrays, "bfloat16") == "bfloat16"


REFUSED = {
    "prime": ({"prime": True, "suffix_len": 1}, "prime MLPs"),
    "norms behind": ({"post_norm": True}, "norms before attention and MLP"),
    "a window": ({"seq_modeling_block": "SWA"}, "full attention"),
    "biases and QK-norms": ({"attention_bias": True}, "Qwen2 has the biases"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_other_programs_cannot_compute_is_not_exported(models, why):
    _, done = models["qwen3"]
    changed, reason = REFUSED[why]
    config = replace(done.config, model=replace(done.config.model, **changed))
    with pytest.raises(UserError, match=reason):
        export.facts_of(config)


def test_an_export_overwrites_nothing_and_needs_a_tokenizer(models, tmp_path):
    _, done = models["qwen3"]
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists, and nothing is overwritten"):
        export.export(done.folder, tmp_path / "there")
    with pytest.raises(UserError, match="must be one of auto, float32, bfloat16"):
        export.export(done.folder, tmp_path / "out", dtype="int4")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


# ---- bad input -----------------------------------------------------------------------


def cut_short(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(path):
    gain = foreign.tensors(path)["model.norm.weight"].copy()
    gain[3] = np.nan
    foreign.rewrite(path, {"model.norm.weight": gain})


def with_more_rows(path):
    tokenizer = foreign.small_tokenizer()
    tokenizer.add_tokens(["another model's"])
    tokenizer.save(str(path / "tokenizer.json"))


def stored_twice(path):
    norm = {"model.norm.weight": foreign.tensors(path)["model.norm.weight"]}
    weights = {"model.safetensors", "extra.safetensors"}
    foreign.save_file(norm, path / "extra.safetensors")
    index = {"weight_map": dict(zip(("a", "b"), sorted(weights), strict=True))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def lacking_a_shard(path):
    index = {"weight_map": {"model.norm.weight": "model-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    "truncated": (cut_short, "damaged or truncated"),
    "not finite": (with_nan, "not finite in model.norm.weight"),
    "a tensor missing": (
        lambda path: foreign.rewrite(path, {"model.layers.1.mlp.up_proj.weight": None}),
        "missing tensors: model.layers.1.mlp.up_proj.weight",
    ),
    "a tensor more": (
        lambda path: foreign.rewrite(path, {"model.layers.1.gate": np.ones(3, np.float32)}),
        "tensors that a qwen3 model has not: model.layers.1.gate",
    ),
    "a tensor of a layer that the config has not": (
        lambda path: foreign.reconfigure(path, {"num_hidden_layers": 2}),
        "tensors that a qwen3 model has not: model.layers.2.",
    ),
    "another shape": (
        lambda path: foreign.rewrite(path, {"model.norm.weight": np.ones(23, np.float32)}),
        r"model.norm.weight \[23\], not \[24\]",
    ),
    "a tensor twice": (stored_twice, r"that two files hold: model.norm.weight"),
    "a shard missing": (lacking_a_shard, "lacks model-00002.safetensors"),
    "another family": (
        lambda path: foreign.reconfigure(path, {"model_type": "gemma3"}),
        "model_type=gemma3: no such family is supported; there are llama, qwen2, qwen3",
    ),
    "rope scaling that is not implemented": (
        lambda path: foreign.reconfigure(path, {"rope_scaling": {"rope_type": "yarn"}}),
        "rope_scaling of type yarn is not implemented",
    ),
    "a sliding window": (
        lambda path: foreign.reconfigure(path, {"use_sliding_window": True}),
        "use_sliding_window=True: weights trained with a sliding window",
    ),
    "layers with a window": (
        lambda path: foreign.reconfigure(path, {"layer_types": ["sliding_attention"] * 3}),
        r"layer_types=\['sliding_attention'\]",
    ),
    "another activation": (
        lambda path: foreign.reconfigure(path, {"hidden_act": "gelu"}),
        "hidden_act=gelu: the MLPs must be SwiGLU",
    ),
    "no width": (
        lambda path: foreign.reconfigure(path, {"hidden_size": None}),
        "lacks hidden_size",
    ),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        r"neither model.safetensors nor [^;]*; fetch the weights as safetensors",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "the tokenizer of another model": (with_more_rows, "it is another model's"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_or_unknown_model_is_refused_and_leaves_nothing(what, tmp_path, run_script):
    path = foreign.folder("qwen3", tmp_path)
    spoil, message = BAD[what]
    spoil(path)
    code, said = run_script(
        *("10_seed_external_import_checkpoints.py", "--model", "mine", "--from-dir", path),
        *("--checkpoint-root", tmp_path / "ckpt"),
    )
    assert code == 2
    assert re.search(message, said.err), said.err
    assert not (tmp_path / "ckpt").exists()


BAD_GGUF = {
    "truncated": ({}, "damaged or truncated"),
    "a window": ({"attention.sliding_window": 16}, "attention.sliding_window=16"),
    "scaled": ({"rope.scaling.type": "yarn"}, "rope.scaling.type=yarn is not implemented"),
    "half-turned heads": ({"rope.dimension_count": 4}, "rope.dimension_count=4"),
    "no width": ({"embedding_length": None}, "metadata lacks qwen3.embedding_length"),
}


@pytest.mark.parametrize("what", BAD_GGUF)
def test_a_damaged_or_unknown_gguf_file_is_refused(models, what, tmp_path):
    metadata, message = BAD_GGUF[what]
    file = foreign.write_gguf(models["qwen3"][0], tmp_path / "model.gguf", **metadata)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match=message):
        open_source(file)


def test_an_import_that_is_there_stays_unless_forced(tmp_path, run_script):
    path, root = foreign.folder("qwen3", tmp_path), tmp_path / "ckpt"
    script = ("10_seed_external_import_checkpoints.py", "--model", "mine", "--from-dir", path)
    code, said = run_script(*script, "--checkpoint-root", root)
    assert (code, "35 tensors in" in said.out) == (0, True)
    folder = root / "external_phase1" / "import-mine-fa-base"
    before = (folder / "0" / "hashes.json").stat()
    code, said = run_script(*script, "--checkpoint-root", root)
    assert (code, "imported already, from the same files" in said.out) == (0, True)
    other = ("--from-dir", foreign.folder("llama", tmp_path))
    code, said = run_script(*script[:-2], *other, "--checkpoint-root", root)
    assert code == 2
    assert "holds an import of other files already, and nothing is overwritten" in said.err
    assert (folder / "0" / "hashes.json").stat() == before
    assert run_script(*script, "--checkpoint-root", root, "--force")[0] == 0
    assert (folder / "0" / "hashes.json").stat() != before
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    (folder / "0").rename(tmp_path / "elsewhere")
    code, said = run_script(*script, "--checkpoint-root", root, "--force")
    assert (code, "is in the way and holds no import" in said.err) == (2, True)


def test_a_root_that_cannot_be_written_to_is_refused_at_once(tmp_path, run_script):
    (tmp_path / "file").write_text("in the way")
    code, said = run_script(
        *("10_seed_external_import_checkpoints.py", "--model", "mine"),
        *("--from-dir", foreign.folder("qwen3", tmp_path)),
        *("--checkpoint-root", tmp_path / "file" / "ckpt"),
    )
    assert code == 2
    assert "no folder that you may write to" in said.err
