"""A token store in a Google Cloud Storage bucket: the list of its objects, and their bytes.

gcsfs makes the requests. It tries each six times, half a minute in all, when the store answers 408,
429 or 5xx or the connection breaks. Added here: missing credentials are an error and not an
anonymous request, and every error is explained to the user.
"""

import difflib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ttt.errors import RunError, UserError

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
LOGIN = (
    "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS "
    "to the file of a service account's key"
)
PAYER_MISSING = (
    "the reader pays for requests to this bucket, and no project to bill is named: give "
    "--billing-project PROJECT, a Google Cloud project of yours with billing switched on."
)
# gcsfs's own `find` asks for every field, and reports no progress, over any number of objects.
_FIELDS = "items(name,size,crc32c,md5Hash,generation),prefixes,nextPageToken"


class UnreachableError(RunError):
    """The store does not answer; it may do so later."""


@dataclass(frozen=True)
class StoredObject:
    """One object of a store, as the bucket lists it."""

    name: str
    """Relative to the store's root, as `train/c/0`."""
    size: int
    crc32c: str
    """Base64 of the big-endian checksum; empty where the listing has none."""
    md5: str
    """The same of MD5."""
    generation: str | None
    """Changes whenever the object is written."""


class Bucket:
    """A store at `gs://BUCKET/PATH`, for reading."""

    def __init__(self, source: str, *, billing_project: str | None, endpoint_url: str | None):
        """Find the credentials; nothing is read yet.

        billing_project: who pays for the requests; None: the bucket's owner.
        endpoint_url: `http(s)://HOST:PORT` of an emulator or a store of one's own; None: the
            environment's STORAGE_EMULATOR_HOST, or Google. Credentials are sent to Google alone.
        Raises `UserError` for an unusable address or missing, refused or expired credentials.
        """
        self.source = source.rstrip("/")
        scheme, _, path = self.source.partition("://")
        self._bucket, _, folder = path.partition("/")
        if scheme != "gs" or not self._bucket:
            raise UserError(f"{source}: a source is gs://BUCKET or gs://BUCKET/PATH.")
        self._prefix = f"{folder}/" if folder else ""
        self.endpoint = _endpoint(endpoint_url or os.environ.get("STORAGE_EMULATOR_HOST"))
        self._project = billing_project
        token = "anon" if self.endpoint else self._credentials()

        import aiohttp  # these two take seconds, which a check without a network does not need
        from gcsfs.core import GCSFileSystem

        # gcsfs logs a traceback of each error that it also raises.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        self._files = GCSFileSystem(
            token=token,
            access="read_only",
            requester_pays=billing_project or False,
            endpoint_url=self.endpoint,
            # gcsfs's default is to wait for ever.
            requests_timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
            session_kwargs={"trust_env": True},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def objects(
        self, splits: Iterable[str], on_progress: Callable[[int], None] = lambda count: None
    ) -> list[StoredObject]:
        """List the objects of the root and of `splits`; `on_progress` gets the count so far.

        Raises `UserError` if there is no zarr v3 store, or a split is not in it.
        """
        objects, folders = [], []
        for page in self._pages("", delimiter="/"):
            objects += self._objects_of(page)
            folders += [name[len(self._prefix) : -1] for name in page.get("prefixes", [])]
        if "zarr.json" not in {stored.name for stored in objects}:
            raise UserError(
                f"{self.source} holds no zarr.json, so it is no zarr v3 store: "
                "name the folder that holds it."
            )
        for split in splits:
            if split not in folders:
                raise UserError(
                    f"{self.source} has no split {split!r}; it has "
                    f"{', '.join(sorted(folders)) or 'none'}{did_you_mean(split, folders)}"
                )
            for page in self._pages(f"{split}/"):
                objects += self._objects_of(page)
                on_progress(len(objects))
        return objects

    def read(self, stored: StoredObject, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object as it was listed.

        Raises `UserError` where the store refuses, `UnreachableError` where it does not answer.
        """
        path = f"{self._bucket}/{self._prefix}{stored.name}"
        with self._explained():
            data = self._files.cat_file(path, start=start, end=end, generation=stored.generation)
        if len(data) != end - start:
            raise UnreachableError(
                f"{self.source}/{stored.name}: {end - start} bytes requested, {len(data)} arrived."
            )
        return data

    def _pages(self, prefix: str, **query: str) -> Iterator[dict[str, Any]]:
        """The pages of a listing, of up to 1000 objects each."""
        query |= {"prefix": self._prefix + prefix, "fields": _FIELDS, "maxResults": "1000"}
        while True:
            with self._explained():
                page = self._files.call("GET", "b/{}/o", self._bucket, json_out=True, **query)
            yield page
            if "nextPageToken" not in page:
                return
            query["pageToken"] = page["nextPageToken"]

    def _objects_of(self, page: dict[str, Any]) -> Iterator[StoredObject]:
        for item in page.get("items", []):
            name = item["name"].removeprefix(self._prefix)
            if not name or name.endswith("/"):  # a marker of a folder
                continue
            if {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
                raise UserError(
                    f"{self.source} holds an object {name!r}, which is no name of a file below a "
                    "folder: this store is not to be trusted; use another."
                )
            checksums = item.get("crc32c", ""), item.get("md5Hash", "")
            yield StoredObject(name, int(item["size"]), *checksums, item.get("generation"))

    def _credentials(self) -> Any:
        import google.auth
        from google.auth.transport.requests import Request

        with self._explained():
            credentials, _ = google.auth.default(scopes=[SCOPE])
            credentials.refresh(Request())  # an expired login is reported here, once
        return credentials

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Raise gcsfs's errors as `UserError` or `UnreachableError`."""
        try:
            yield
        except Exception as error:
            raise self._explanation(error) from error

    def _explanation(self, error: Exception) -> UserError | RunError:
        from google.auth.exceptions import GoogleAuthError, TransportError

        first, *rest = str(error).splitlines() or [type(error).__name__]
        code = getattr(error, "code", None)
        causes = (
            (
                isinstance(error, FileNotFoundError),
                "not found (404): the bucket or the object does not exist, or the object was "
                "replaced meanwhile; check the source, and run the same command again.",
            ),
            ("requester pays" in first, PAYER_MISSING),
            (
                first.startswith("Forbidden"),
                f"forbidden (403): {' '.join(rest)} Your account must be allowed to read the "
                f"bucket and to bill the project {self._project!r} (permission "
                "serviceusage.services.use): use another account, or another --billing-project.",
            ),
            (
                (code == 401 or isinstance(error, GoogleAuthError | PermissionError))
                and not isinstance(error, TransportError),
                f"no Google credentials that are valid (401): {first}; {LOGIN}.",
            ),
            (
                code == 400 or isinstance(error, ValueError),
                f"the request is refused: {[first, *rest][-1]}; check the source and "
                f"--billing-project ({self._project!r}).",
            ),
        )
        for applies, message in causes:
            if applies:
                return UserError(f"{self.source}: {message}")
        return UnreachableError(f"{self.source} does not answer: {first}")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest of `options`, or a full stop."""
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {close[0]}?" if close else "."


def _endpoint(url: str | None) -> str | None:
    """The full address; None for Google's own."""
    if not url or url == "default":
        return None
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    parts = urlsplit(full)
    if "@" in parts.netloc:  # it would be written into logs and fetch.json
        raise UserError("The endpoint's address holds a name or password: leave them out of it.")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
        raise UserError(f"{url}: an endpoint is http://HOST:PORT or https://HOST, no path.")
    return full
