"""scripts/00_data_fetch.py against an object store on loopback: whole, verified, resumable."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from bucket_emulator import PROJECT, Emulator, serving

from ttt.dataloader import fetch, token_store
from ttt.errors import RunError, UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "00_data_fetch.py"
BUCKET = "llama3-books3"
CHUNKS = [f"data.zarr/train/c/{i}" for i in range(6)] + ["data.zarr/val/c/0"]
METADATA = ["data.zarr/train/zarr.json", "data.zarr/val/zarr.json", "data.zarr/zarr.json"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A store of six and one chunks that do not compress away."""
    root = tmp_path_factory.mktemp("source") / "store"
    rng = np.random.default_rng(0)
    group = zarr.create_group(root)
    for split, length in (("train", 6000), ("val", 700)):
        tokens = rng.integers(0, 1 << 17, length, dtype=np.int32)
        group.create_array(split, data=tokens, chunks=(1000,))
    return root


@pytest.fixture
def store(source, monkeypatch):
    """The emulator that holds it as `books3`; nobody waits before another try."""
    import gcsfs.retry

    async def at_once(seconds):
        pass

    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=at_once))
    monkeypatch.setattr(fetch, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 1000)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    emulator = Emulator(page=3)
    emulator.put(BUCKET, source)
    with serving(emulator):
        yield emulator


@pytest.fixture
def make_request(store, tmp_path):
    """A request, with defaults that work."""

    def request(**changes):
        defaults = {
            "dest_root": tmp_path / "data",
            "datasets": ["books3"],
            "billing_project": PROJECT,
            "endpoint_url": store.url,
            "threads": 3,
        }
        return fetch.Request(**defaults | changes)

    return request


@pytest.fixture
def root(tmp_path):
    """Where the dataset goes."""
    return tmp_path / "data" / "books3"


@pytest.fixture
def script(store, tmp_path, run_script):
    def run(*options, datasets="books3"):
        common = ["--dest-root", tmp_path / "data", "--datasets", datasets]
        return run_script(SCRIPT.name, *common, "--endpoint-url", store.url, *options)

    return run


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != fetch.RECORD
    }


def test_what_arrives_is_the_source_bit_for_bit_and_a_store(script, store, source, root):
    code, output = script("--billing-project", PROJECT)
    assert (code, output.err) == (0, "")
    assert files(root) == files(source)
    np.testing.assert_array_equal(
        token_store.open_split(root, "train")[:], token_store.open_split(source, "train")[:]
    )
    record = json.loads((root / fetch.RECORD).read_text())
    assert record["source"] == f"gs://{BUCKET}/data.zarr"
    for split, objects in (("train", 7), ("val", 2)):
        fingerprint = token_store.fingerprint(source, split)
        assert record["splits"][split]["fingerprint"] == fingerprint
        assert record["splits"][split]["objects"] == objects
        assert fingerprint in output.out
    assert {query["userProject"] for query in store.queries} == {PROJECT}


def test_metadata_arrives_after_the_chunks(make_request, store):
    fetch.fetch(make_request())
    read = list(dict.fromkeys(store.reads))
    assert set(read[:7]) == set(CHUNKS)
    assert set(read[7:9]) == set(METADATA[:2])
    assert read[9:] == METADATA[2:]


def test_login_is_not_sent_to_other_endpoints(make_request, store):
    fetch.fetch(make_request())
    assert store.headers
    assert not [header for header in store.headers if "Authorization" in header]


def test_missing_billing_project_is_reported_before_any_request(script, store, tmp_path):
    code, output = script()
    assert code == 2
    assert "give --billing-project PROJECT" in output.err
    assert store.queries == []
    assert not (tmp_path / "data").exists()


def test_bucket_that_needs_a_billing_project_is_a_users_mistake(script, store):
    code, output = script("--source-root", f"gs://{BUCKET}", datasets="data.zarr")
    assert code == 2
    assert "give --billing-project PROJECT" in output.err


@pytest.mark.parametrize(
    ("faults", "fragment"),
    [
        ([403], "permission serviceusage.services.use"),
        ([404], "not found (404)"),
        ([401] * 6, "gcloud auth application-default login"),
    ],
)
def test_refused_request_is_a_users_mistake_with_its_remedy(script, store, faults, fragment):
    store.faults[""] = faults
    code, output = script("--billing-project", PROJECT)
    assert code == 2
    assert fragment in output.err
    assert "Traceback" not in output.err


def test_billing_project_that_is_refused_is_named(script):
    code, output = script("--billing-project", "other")
    assert code == 2
    assert "--billing-project ('other')" in output.err


def test_missing_login_is_reported_with_how_to_get_one(make_request, tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="gcloud auth application-default login"):
        fetch.fetch(make_request(endpoint_url=None))


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        ("RefreshError", UserError, "Reauthenticate.*gcloud auth application-default login"),
        ("TransportError", RunError, "does not answer: Reauthenticate"),
    ],
)
def test_expired_login_and_dead_network_are_different_errors(
    make_request, monkeypatch, cause, error, message
):
    import google.auth.exceptions

    def refresh(request):
        raise getattr(google.auth.exceptions, cause)("Reauthenticate.")

    monkeypatch.setattr(
        google.auth, "default", lambda scopes: (SimpleNamespace(refresh=refresh), None)
    )
    with pytest.raises(error, match=message):
        fetch.fetch(make_request(endpoint_url=None))


def test_dead_network_is_a_failure_and_not_a_mistake(make_request):
    with pytest.raises(RunError, match="does not answer"):
        fetch.fetch(make_request(endpoint_url="http://127.0.0.1:9"))


@pytest.mark.parametrize("faults", [[503, 429], ["cut"], ["spoil", "spoil"], [503] * 7])
def test_temporary_failures_are_retried(make_request, store, source, root, faults):
    store.faults[CHUNKS[2]] = faults
    fetch.fetch(make_request())
    assert files(root) == files(source)


def test_object_that_never_has_its_checksum_is_not_kept(make_request, store, root):
    store.faults[CHUNKS[2]] = ["spoil"] * 100
    with pytest.raises(RunError, match=r"train/c/2 arrived 3 times with another checksum"):
        fetch.fetch(make_request())
    assert not (root / "train" / "c" / "2").exists()


def test_interrupted_fetch_reads_only_what_is_missing(script, store, source, root):
    store.faults[CHUNKS[3]] = [503] * 100
    code, output = script("--billing-project", PROJECT, "--threads", 1)
    assert code == 1
    assert "the same command continues" in output.err
    assert not (root / "zarr.json").exists()
    whole = {f"data.zarr/{name}" for name in files(root) if ".partial" not in name}
    assert whole == set(CHUNKS[:3])
    del store.faults[CHUNKS[3]]
    store.reads.clear()
    assert script("--billing-project", PROJECT)[0] == 0
    assert not whole & set(store.reads)
    assert files(root) == files(source)


def test_part_of_a_file_is_continued(make_request, store, source, root):
    chunk = source / "train" / "c" / "1"
    size = chunk.stat().st_size
    part = root / "train" / "c" / ".1.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(chunk.read_bytes()[: size - 10])
    fetch.fetch(make_request())
    assert store.reads.count(CHUNKS[1]) == 1
    assert store.reads.count(CHUNKS[0]) > 1
    assert files(root) == files(source)


@pytest.mark.parametrize(("size", "tries"), [(500, 2), (50_000, 1)])
def test_part_of_another_version_is_not_kept(make_request, store, source, root, size, tries):
    part = root / "train" / "c" / ".1.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(size))
    fetch.fetch(make_request())
    assert store.reads.count(CHUNKS[1]) == tries * store.reads.count(CHUNKS[0])
    assert files(root) == files(source)


def test_second_fetch_reads_nothing(make_request, store):
    fetch.fetch(make_request())
    store.reads.clear()
    fetch.fetch(make_request())
    assert store.reads == []


def test_damaged_file_is_reported_and_replaced_only_with_force(script, source, root):
    pays = ("--billing-project", PROJECT)
    assert script(*pays)[0] == 0
    chunk = root / "train" / "c" / "2"
    damaged = bytes([*chunk.read_bytes()[:-1], chunk.read_bytes()[-1] ^ 1])
    chunk.write_bytes(damaged)
    code, output = script("--check-only", *pays)
    assert code == 1
    assert f"{chunk}: not as in the store" in output.err
    code, output = script(*pays)
    assert code == 2
    assert str(chunk) in output.err
    assert "add --force" in output.err
    assert chunk.read_bytes() == damaged
    assert script("--force", *pays)[0] == 0
    assert files(root) == files(source)
    assert script("--check-only", *pays)[0] == 0


def test_check_without_a_network_finds_damage_by_the_record(make_request, store, root):
    fetch.fetch(make_request())
    store.queries.clear()
    alone = make_request(billing_project=None, endpoint_url=None)
    fetch.check(alone)
    attributes = root / "val" / "zarr.json"
    attributes.write_text(attributes.read_text() + " ")  # no token, no length, no type changes
    with pytest.raises(RunError, match="checksums is sha256:"):
        fetch.check(alone)
    assert store.queries == []


def test_check_reports_what_it_could_not_check(make_request, source, root):
    shutil.copytree(source, root)
    lines = []
    fetch.check(make_request(billing_project=None, endpoint_url=None), on_message=lines.append)
    assert "not compared with an earlier fetch" in lines[0]
    assert "checksums not checked" in lines[0]
    assert token_store.fingerprint(source, "val") in lines[-1]


def test_check_of_a_lost_chunk_and_of_no_store(make_request, source, root):
    alone = make_request(billing_project=None, endpoint_url=None)
    with pytest.raises(UserError, match=r"00_data_fetch\.py --datasets books3"):
        fetch.check(alone)
    shutil.copytree(source, root)
    (root / "train" / "c" / "0").unlink()
    with pytest.raises(RunError, match="5 of its 6 chunks"):
        fetch.check(alone)


def test_files_that_are_not_in_the_store_are_reported_and_kept(make_request, root):
    fetch.fetch(make_request())
    stray = root / "train" / "c" / "77"
    stray.write_text("mine")
    lines = []
    fetch.fetch(make_request(), on_message=lines.append)
    assert "1 files are not in the store: train/c/77" in lines[0]
    assert stray.read_text() == "mine"


def test_one_split_alone_and_the_other_later(make_request, store, source, root):
    fetch.fetch(make_request(splits=["val"]))
    assert token_store.open_split(root, "val").shape == (700,)
    assert not (root / "train").exists()
    fetch.fetch(make_request(splits=["train"]))
    assert files(root) == files(source)
    assert set(json.loads((root / fetch.RECORD).read_text())["splits"]) == {"train", "val"}


def test_dry_run_writes_and_reads_nothing(script, store, tmp_path):
    code, output = script("--billing-project", PROJECT, "--dry-run")
    assert code == 0
    assert "10 objects" in output.out
    assert store.reads == []
    assert not (tmp_path / "data").exists()


def test_full_disk_is_reported_before_the_first_byte(make_request, store, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=5000))
    with pytest.raises(UserError, match=r"the disk has 5\.0 kB free"):
        fetch.fetch(make_request())
    assert store.reads == []
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"datasets": ["book3"]}, "did you mean books3"),
        ({"datasets": ["../books3"]}, "no name of a folder"),
        ({"splits": ["tain"]}, "did you mean train"),
        ({"splits": ["val", "val"]}, "each once"),
        ({"threads": 0}, "at least 1"),
        ({"endpoint_url": "ftp://here"}, "an endpoint is"),
        ({"endpoint_url": "http://me:secret@here"}, "leave them out"),
        ({"source_root": "s3://there"}, "a source is gs://"),
    ],
)
def test_wrong_request_is_refused(make_request, changes, fragment):
    with pytest.raises(UserError, match=fragment) as error:
        fetch.fetch(make_request(**changes))
    assert "secret" not in str(error.value)


def test_store_that_is_broken_in_the_bucket_is_reported_as_such(make_request, store):
    del store.buckets[BUCKET][CHUNKS[0]]
    with pytest.raises(RunError, match=r"which is broken: .* holds 5 of its 6 chunks"):
        fetch.fetch(make_request())


def test_object_outside_the_store_is_not_written(make_request, store, tmp_path):
    store.buckets[BUCKET]["data.zarr/train/../../../out"] = b"x"
    with pytest.raises(UserError, match="not to be trusted"):
        fetch.fetch(make_request())
    assert not (tmp_path / "data").exists()


def test_two_fetches_into_one_folder_do_not_mix(make_request, store, root):
    with fetch._locked(root), pytest.raises(UserError, match="Another process fetches"):
        fetch.fetch(make_request())
    assert store.reads == []


def test_emulator_of_the_environment_is_used(make_request, store, source, root, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url.removeprefix("http://"))
    fetch.fetch(make_request(endpoint_url=None))
    assert files(root) == files(source)


def test_listing_without_crc32c_is_checked_by_md5(make_request, store, source, root):
    store.without_crc32c = True
    store.faults[CHUNKS[2]] = ["spoil"]
    fetch.fetch(make_request())
    assert store.reads.count(CHUNKS[2]) > store.reads.count(CHUNKS[1])
    assert files(root) == files(source)
    fetch.check(make_request(billing_project=None, endpoint_url=None))


def test_ctrl_c_ends_with_130_and_a_hint(store, tmp_path):
    reading, ended = threading.Event(), threading.Event()

    def never_answer(name):
        reading.set()
        ended.wait(120)

    store.before_read = never_answer
    arguments = ["--dest-root", tmp_path / "data", "--datasets", "books3", "--threads", "1"]
    arguments += ["--billing-project", PROJECT, "--endpoint-url", store.url]
    # A shell's background job ignores Ctrl-C, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        signal.signal(signal.SIGINT, before)
        try:
            assert reading.wait(120)
            process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=60)[1]
        finally:
            process.kill()
            ended.set()
    assert process.returncode == 130
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
