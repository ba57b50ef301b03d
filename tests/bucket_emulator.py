"""As much of Google Cloud Storage's JSON interface as reading takes, over loopback, with faults.

Objects are listed with paging and delimiter, and read with ranges; a bucket is requester-pays; the
requests are recorded. (The emulators on the package index know neither requester-pays nor paging,
and cannot be made to fail.)
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PROJECT = "who-pays"


class Emulator:
    """Buckets, faults and recorded requests; `url` is its address."""

    def __init__(self, page: int = 1000):
        """page: the most objects it lists at a time."""
        self.page = page
        self.url = ""
        self.buckets: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.faults: dict[str, list[str | int]] = defaultdict(list)
        """Object, or "" for the listing -> what goes wrong at the next requests: a status, "cut"
        (half the body, then a broken connection), "spoil" (a changed byte)."""
        self.reads: list[str] = []
        """The objects that were read, in order, one for each request that was answered."""
        self.queries: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.without_crc32c = False
        self.before_read: Callable[[str], None] = lambda name: None

    def put(self, bucket: str, folder: Path, prefix: str = "data.zarr") -> None:
        """Copy a folder's files into a bucket."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            self.buckets[bucket][name] = path.read_bytes()

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, bytes, str]:
        """Status, body and what goes wrong with it."""
        parts = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.queries.append(query)
        self.headers.append(headers)
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", parts.path)
        bucket, name = unquote(match[1]), unquote(match[2] or "")
        fault = self.faults[name].pop(0) if self.faults[name] else ""
        if isinstance(fault, int):
            return self._error(fault, "does not have storage.objects access")
        if "userProject" not in query:
            return self._error(
                400, "Bucket is a requester pays bucket but no user project provided."
            )
        if query["userProject"] != PROJECT:
            return self._error(400, "User project specified in the request is invalid.")
        if bucket not in self.buckets:
            return self._error(404, "The specified bucket does not exist.")
        if not name:
            return 200, self._listing(bucket, query), fault
        self.before_read(name)
        self.reads.append(name)
        data = self.buckets[bucket].get(name)
        if data is None or query.get("generation") != self._generation(data):
            return self._error(404, "No such object")
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["Range"])
        return 206, data[int(bounds[1]) : int(bounds[2]) + 1], fault

    def _listing(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = [name for name in sorted(self.buckets[bucket]) if name.startswith(prefix)]
        rest = {name: name.removeprefix(prefix) for name in names}
        folders = {prefix + r.split("/")[0] + "/" for r in rest.values() if delimiter and "/" in r}
        names = [name for name in names if not (delimiter and "/" in rest[name])]
        start = int(query.get("pageToken", 0))
        end = start + min(self.page, int(query["maxResults"]))
        page = {"items": [self._item(bucket, name) for name in names[start:end]]}
        page["prefixes"] = sorted(folders) if not start else []
        if end < len(names):
            page["nextPageToken"] = str(end)
        return json.dumps({key: value for key, value in page.items() if value}).encode()

    def _item(self, bucket: str, name: str) -> dict[str, str]:
        data = self.buckets[bucket][name]
        crc = google_crc32c.value(data).to_bytes(4, "big")
        crc32c = {} if self.without_crc32c else {"crc32c": base64.b64encode(crc).decode()}
        return crc32c | {
            "name": name,
            "size": str(len(data)),
            "generation": self._generation(data),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }

    def _generation(self, data: bytes) -> str:
        return str(google_crc32c.value(data) + 1)

    def _error(self, status: int, message: str) -> tuple[int, bytes, str]:
        body = {"error": {"code": status, "message": message}}
        return status, json.dumps(body).encode(), ""


@contextmanager
def serving(emulator: Emulator) -> Generator[Emulator]:
    """Let it listen on a free port of loopback."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with lock:
                status, body, fault = emulator.answer(self.path, dict(self.headers))
            if fault == "spoil":
                body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "cut":
                body = body[: len(body) // 2]
                self.close_connection = True
            with suppress(ConnectionError):  # of a client that was stopped
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    emulator.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield emulator
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
