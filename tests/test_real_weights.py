"""A real model: SmolLM2-135M, fetched, imported, and compared with what other programs computed.

Cases are the `*.json` in `$TTT_GOLDEN_EXTERNAL_DIR`, or `shared/external` beside the clone, or a
copy in `tests/data/external` (README there). The weights (98 MB, Apache-2.0) are fetched once, to
`$TTT_TEST_MODELS` or a temporary folder.
"""

import doctest
import fcntl
import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt import language_model
from ttt.config import of_stored
from ttt.core.batch import from_tokens
from ttt.dataloader import text
from ttt.errors import UserError
from ttt.infra import step_folders
from ttt.interop import catalog, imports
from ttt.model.published import load_model

KEY = "smollm2_135m"


def golden_folder() -> Path:
    """Where the recorded values lie."""
    beside = Path(__file__).parents[2] / "shared" / "external"
    copy = Path(__file__).parent / "data" / "external"
    return Path(os.environ.get("TTT_GOLDEN_EXTERNAL_DIR") or (beside if beside.is_dir() else copy))


CASES = sorted(golden_folder().glob("*.json"))


@pytest.fixture(scope="module")
def root():
    """A checkpoint root with the imported model, shared by all workers and later runs."""
    place = Path(os.environ.get("TTT_TEST_MODELS", Path(tempfile.gettempdir()) / "ttt-test-models"))
    place.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(imports.__file__).parent.glob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    model, root = catalog.MODELS[KEY], place / f"checkpoints-{code}"  # anew once the code changed
    folder = step_folders.run_folder(root, catalog.EXP_FOLDER, catalog.run_name(model.short))
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "latest.json").is_file():
            try:
                catalog.prepare(model, place, from_dir=None, force=False, say=lambda line: None)
            except UserError as error:
                pytest.skip(f"SmolLM2-135M is not here: {error}")
            source, about = catalog.locate(model, place, None)
            imports.import_model(
                source,
                model.short,
                root=root,
                exp_folder=catalog.EXP_FOLDER,
                about=about,
                force=True,
            )
    return root


@pytest.fixture(scope="module")
def real(root):
    """(model on the device, its tokenizer)."""
    folder = root / catalog.EXP_FOLDER / catalog.run_name("smol135") / "0"
    manifest = step_folders.read_manifest(folder)
    model, account = load_model(of_stored(manifest["config"]).model, folder)
    assert (account.initialised, account.unused) == ((), ())
    return jax.tree.map(jnp.asarray, model), text.checkpoint_tokenizer(folder, manifest)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_golden_external_losses_and_ids(real, case):
    model, tokenizer = real
    golden = json.loads(case.read_text())
    assert golden["model"] == KEY
    ids = tokenizer.encode((case.parent / golden["text"]).read_bytes())[: golden["tokens"]]
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    assert digest.startswith(golden["ids_sha256_prefix"])
    batch = from_tokens(ids[None], -1)
    for context, expected in golden["losses"].items():
        # Full attention reads each window of `mini_batch_size` tokens on its own.
        how = replace(model.config, mini_batch_size=int(context), attention_block=256)
        nll = eqx.filter_jit(lambda model: model.loss(batch).token_nll)(model.with_config(how))
        assert np.mean(np.asarray(nll), dtype=np.float64) == pytest.approx(expected, abs=1e-4), (
            context
        )


def test_golden_external_logits(real):
    model, _ = real
    with np.load(golden_folder() / "smollm2_135m_gpl3.npz") as golden:
        ids = golden["ids"]
        logits = np.asarray(imports.logits(model, jnp.asarray(ids)), np.float64)
        ours = logits[:, golden["vocabulary"]]
        np.testing.assert_allclose(ours, golden["logits"], rtol=0, atol=2e-3)
        total = np.log(np.sum(np.exp(logits), axis=1))
        np.testing.assert_allclose(total, golden["logsumexp"], rtol=0, atol=2e-3)
        nll = total[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
        assert np.mean(nll) == pytest.approx(np.mean(golden["token_nll"]), abs=2e-5)
        np.testing.assert_array_equal(np.argmax(logits, axis=1), golden["argmax"])


def test_the_four_lines_of_the_documentation_run(root, monkeypatch):
    monkeypatch.setenv("TTT_CHECKPOINTS", str(root))
    failed, tried = doctest.testmod(language_model)
    assert (failed, tried) == (0, 5)
