"""A token store that lies in a Google Cloud Storage bucket: its objects, and their bytes.

Transfers are gcsfs's. It tries a request six times, half a minute in all, when the store answers
408, 429 or 5xx or the connection breaks; what it does not do is done here: absent credentials are
an error and not an anonymous try, and all errors are told in the user's words.
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
_PAGE = 1000
_FIELDS = "items(name,size,crc32c,md5Hash,generation),prefixes,nextPageToken"


class UnreachableError(RunError):
    """The store does not answer, or no longer; it may do so later."""


@dataclass(frozen=True)
class Stored:
    """One object of a store."""

    name: str
    """Below the store's root, as `train/c/0`."""
    size: int
    crc32c: str
    """Base64 of the big-endian sum, as the listing has it; empty where it has none."""
    md5: str
    """The same of MD5, for objects without crc32c."""
    generation: str | None
    """Changes whenever the object is written."""


class Bucket:
    """A store at `gs://BUCKET/PATH`, for reading."""

    def __init__(self, source: str, *, billing_project: str | None, endpoint_url: str | None):
        """Find the credentials; nothing is read yet.

        billing_project: who pays for the requests; None: the bucket's owner.
        endpoint_url: `http(s)://HOST:PORT` of an emulator or a store of one's own, or else the
            environment's STORAGE_EMULATOR_HOST. It is spoken to without credentials: a login of
            Google's is sent to nobody else.
        Raises `UserError` for an unusable address or absent, refused or expired credentials.
        """
        self.source = source.rstrip("/")
        scheme, _, path = self.source.partition("://")
        self._bucket, _, self._prefix = path.partition("/")
        if scheme != "gs" or not self._bucket:
            raise UserError(f"{source}: a source is gs://BUCKET or gs://BUCKET/PATH.")
        self.endpoint = _endpoint(endpoint_url or os.environ.get("STORAGE_EMULATOR_HOST"))
        self._project = billing_project
        token = "anon" if self.endpoint else self._credentials()

        import aiohttp  # these two cost seconds that whoever only reads from a disk does without
        from gcsfs.core import GCSFileSystem

        # Its tracebacks; what they say comes as an exception too.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        # Of a connection that hangs; gcsfs's default is to wait for ever.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        self._files = GCSFileSystem(
            token=token,
            access="read_only",
            requester_pays=billing_project or False,
            endpoint_url=self.endpoint,
            requests_timeout=patience,
            session_kwargs={"trust_env": True},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def objects(
        self, splits: Iterable[str], progress: Callable[[int], None] = lambda found: None
    ) -> list[Stored]:
        """List the objects of the root and of `splits`; `progress` hears how many so far.

        Raises `UserError` if there is no zarr v3 store, or a split is not in it.
        """
        found, folders = [], []
        for page in self._pages("", delimiter="/"):
            found += self._stored(page)
            folders += [self._below_root(name).rstrip("/") for name in page.get("prefixes", [])]
        if "zarr.json" not in {stored.name for stored in found}:
            raise UserError(
                f"{self.source} holds no zarr.json, so it is no zarr v3 store: "
                "name the folder that holds it."
            )
        for split in splits:
            if split not in folders:
                close = difflib.get_close_matches(split, folders, n=1)
                raise UserError(
                    f"{self.source} has no split {split!r}; it has "
                    f"{', '.join(sorted(folders)) or 'none'}"
                    + (f"; did you mean {close[0]}?" if close else ".")
                )
            for page in self._pages(f"{split}/"):
                found += self._stored(page)
                progress(len(found))
        return found

    def read(self, stored: Stored, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object as it was listed.

        Raises `UserError` where the store refuses, `UnreachableError` where it does not answer.
        """
        with self._in_words():
            data = self._files.cat_file(
                self._key(stored.name, with_bucket=True),
                start=start,
                end=end,
                generation=stored.generation,
            )
        if len(data) != end - start:
            raise UnreachableError(
                f"{self.source}/{stored.name}: asked for {end - start} bytes, got {len(data)}."
            )
        return data

    def _pages(self, prefix: str, **query: str) -> Iterator[dict[str, Any]]:
        token = None
        while True:
            with self._in_words():
                page = self._files.call(
                    "GET",
                    "b/{}/o",
                    self._bucket,
                    json_out=True,
                    prefix=self._key(prefix) or None,
                    maxResults=_PAGE,
                    pageToken=token,
                    fields=_FIELDS,
                    **query,
                )
            yield page
            if not (token := page.get("nextPageToken")):
                return

    def _stored(self, page: dict[str, Any]) -> Iterator[Stored]:
        for item in page.get("items", []):
            name = self._below_root(item["name"])
            if not name or name.endswith("/"):  # stands for a folder
                continue
            if {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
                raise UserError(
                    f"{self.source} holds an object {name!r}, which is no name of a file below a "
                    "folder: this store is not to be trusted; use another."
                )
            yield Stored(
                name,
                int(item["size"]),
                item.get("crc32c", ""),
                item.get("md5Hash", ""),
                item.get("generation"),
            )

    def _key(self, name: str, *, with_bucket: bool = False) -> str:
        parts = [self._bucket if with_bucket else "", self._prefix]
        return "/".join([part for part in parts if part] + [name])

    def _below_root(self, key: str) -> str:
        return key.removeprefix(f"{self._prefix}/") if self._prefix else key

    def _credentials(self) -> Any:
        import google.auth
        from google.auth import exceptions
        from google.auth.transport.requests import Request

        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
            credentials.refresh(Request())  # tells now, and once, that a login has expired
        except exceptions.TransportError as error:
            raise UnreachableError(
                f"Google's login cannot be reached: {_first_line(error)}"
            ) from error
        except exceptions.RefreshError as error:
            raise UserError(
                f"The Google credentials are refused or expired ({_first_line(error)}): {LOGIN}."
            ) from error
        except (exceptions.GoogleAuthError, OSError, ValueError) as error:
            raise UserError(
                f"{self.source} is read with Google credentials, and none are usable "
                f"({_first_line(error)}): {LOGIN}."
            ) from error
        return credentials

    @contextmanager
    def _in_words(self) -> Generator[None]:
        """Raise what the store or the way to it did wrong as `UserError` or `UnreachableError`."""
        try:
            yield
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        from google.auth.exceptions import GoogleAuthError

        said, code = _first_line(error), getattr(error, "code", None)
        if isinstance(error, FileNotFoundError):
            return UserError(
                f"{self.source}: not found (404): the bucket or the object is not there, or was "
                "replaced meanwhile; check the source, and run the same command again."
            )
        if "requester pays" in said:
            return UserError(
                f"{self.source}: whoever reads this bucket pays for it, and no project to bill was "
                "named: give --billing-project PROJECT, a Google Cloud project of yours with "
                "billing switched on."
            )
        if str(error).startswith("Forbidden"):
            said = " ".join(str(error).splitlines()[1:])
            return UserError(
                f"{self.source}: forbidden (403): {said} Your account must be allowed to read the "
                f"bucket and to bill the project {self._project!r} (permission "
                "serviceusage.services.use): use another account, or another --billing-project."
            )
        if code == 401 or isinstance(error, GoogleAuthError):
            return UserError(f"{self.source}: not let in (401): {said}; {LOGIN}.")
        if isinstance(error, ValueError) or code == 400:
            said = " ".join(str(error).splitlines()[-1:])
            return UserError(
                f"{self.source}: the request is refused: {said}; check the source and "
                f"--billing-project ({self._project!r})."
            )
        return UnreachableError(f"{self.source} does not answer, after six tries: {said}")


def _endpoint(url: str | None) -> str | None:
    """The address in full; None for Google's own."""
    if not url or url == "default":
        return None
    full = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
    parts = urlsplit(full)
    if "@" in parts.netloc:  # it would stand in logs and in fetch.json
        raise UserError("The endpoint's address holds a name or password: leave them out of it.")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
        raise UserError(f"{url}: an endpoint is http://HOST:PORT or https://HOST, no path.")
    return full


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0]
