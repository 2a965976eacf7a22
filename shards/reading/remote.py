"""A folder of shards on a server: S3 or HTTP through fsspec, concurrent, and patient with what may pass.

fsspec keeps one event loop in a thread of each process; requests run there and the caller waits. Retries are counted
here alone: those of the libraries below are off, or five tries would be a hundred (aiohttp alone insists on making a
connection that broke before the answer anew, once). S3 takes endpoint, region and credentials from the usual AWS_*
variables; HTTP takes only proxies from theirs.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import fsspec

from nsi.errors import UserError
from shards.reading.storage import PIECE_BYTES, HashedFile, Request, Retries, Storage

CONCURRENT = 32  # requests under way for one call of read_ranges

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteStorage(Storage):
    """s3://bucket/prefix or http(s)://host/path. Connects when first used, anew in each process."""

    @property
    def is_local(self) -> bool:
        return False

    def path(self, name: str) -> Path:
        raise ValueError(f"{self.where(name)} has no path")

    def read(self, name: str) -> bytes:
        return self._run(self._patiently(self.where(name), lambda: self._read(name, None)))

    def read_ranges(self, requests: Sequence[Request]) -> list[bytes]:
        return self._run(self._read_ranges(requests))

    def fetch(self, name: str, target: Path) -> str:
        return self._run(self._patiently(self.where(name), lambda: self._fetch(name, target)))

    def sizes(self) -> dict[str, int] | None:
        if not self._is_s3:
            return None
        return self._run(self._patiently(self.location, self._sizes))

    @property
    def _is_s3(self) -> bool:
        return self.location.startswith("s3://")

    def _connection(self) -> Any:
        if not self._is_s3:
            return _connect_http(self.retries, os.getpid())
        variables = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        return _connect_s3(self.retries, os.getpid(), tuple(variables))

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._connection().loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # where it was the caller that was interrupted, nothing goes on behind its back
            raise

    async def _patiently(self, where: str, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Makes attempts until one succeeds, the limit is reached, or the error is one that will not pass."""
        for tried in count(1):
            try:
                return await attempt()
            except UserError:
                raise
            except Exception as error:
                failure = _failure_of(error)
                if failure is None:
                    raise  # a defect
                if failure.advice:
                    raise UserError(f"{where}: {failure.reason}; {failure.advice}") from None
                if tried >= self.retries.limit:
                    raise UserError(
                        f"{where}: cannot be read, tried {tried} times (the last: {failure.reason}); "
                        "check the network and the server, then start again"
                    ) from None
            # Ranks that failed together must not come back together.
            await asyncio.sleep(self.retries.wait_s(tried) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    async def _read_ranges(self, requests: Sequence[Request]) -> list[bytes]:
        turns = asyncio.Semaphore(CONCURRENT)

        async def read_one(name: str, offset: int, size: int) -> bytes:
            if size == 0:
                return b""  # HTTP has no words for an empty range
            where = f"{self.where(name)} (offset {offset}, {size} bytes)"
            async with turns:
                return await self._patiently(where, lambda: self._read(name, (offset, size)))

        tasks = [asyncio.ensure_future(read_one(*request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # after one range's error nobody waits for the others

    async def _read(self, name: str, span: tuple[int, int] | None) -> bytes:
        async with self._body(name, span) as read:
            data = await read(-1)
        if span is not None and len(data) != span[1]:
            raise EOFError(f"{len(data)} of {span[1]} bytes came")
        return data

    async def _fetch(self, name: str, target: Path) -> str:
        # The disk is waited for in threads, so that it does not hold up other requests on the loop.
        async with self._body(name, None) as read:
            with HashedFile(target) as file:
                while piece := await read(PIECE_BYTES):
                    await asyncio.to_thread(file.write, piece)
                return await asyncio.to_thread(file.finish)

    async def _sizes(self) -> dict[str, int]:
        entries = await self._connection()._ls(self.location, detail=True, refresh=True)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    @asynccontextmanager
    async def _body(
        self, name: str, span: tuple[int, int] | None
    ) -> AsyncIterator[Callable[[int], Coroutine[Any, Any, bytes]]]:
        """The body of a file or of its (offset, size): `read(n)` gives up to n bytes, all for -1, none at the end."""
        connection, url = self._connection(), self.where(name)
        span_header = {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"} if span else {}
        if self._is_s3:
            bucket, key, _ = connection.split_path(url)
            response = await connection._call_s3("get_object", Bucket=bucket, Key=key, **span_header)
            async with response["Body"] as body:
                yield body.read
            return
        session = await connection.set_session()
        async with session.get(connection.encode_url(url), headers=span_header) as response:
            response.raise_for_status()
            if span and response.status != 206:  # before its body, which is the whole shard, is read
                raise UserError(f"{url}: its server does not serve ranges of bytes; use a cache, or another server")
            yield response.content.read


# Connections are made once a process (and once for what else they depend on) and kept until it ends. A forked child
# makes its own, and never drops its parent's: closing those there would take them out of the parent's event loop too.
@cache
def _connect_s3(retries: Retries, process: int, variables: tuple[tuple[str, str], ...]) -> Any:
    connection = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": retries.timeout_s,
            "read_timeout": retries.timeout_s,
            "max_pool_connections": CONCURRENT,
            "retries": {"total_max_attempts": 1},
        },
    )
    connection.retries = 1
    return connection


@cache
def _connect_http(retries: Retries, process: int) -> Any:
    return fsspec.filesystem(
        "http",
        skip_instance_cache=True,
        client_kwargs={
            # No limit in total, since a shard may be large and the network slow.
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=retries.timeout_s, sock_read=retries.timeout_s),
            "headers": {"Accept-Encoding": "identity"},  # a range of a compressed body is none of the file
            "read_bufsize": PIECE_BYTES,
            "trust_env": True,  # proxies
        },
    )


class _Failure(NamedTuple):
    reason: str
    advice: str = ""  # what to do at once; empty where trying again may help


_PASSING_STATUSES = (408, 425, 429)
_PASSING_CODES = (  # S3 sends some of them with status 400
    "RequestTimeout",
    "RequestThrottled",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
)


def _failure_of(error: Exception) -> _Failure | None:
    """What a failed attempt means; None for an error that neither network nor server explains."""
    answer = _answer_of(error)
    if answer is not None:
        status, code, reason = answer
        if code in _PASSING_CODES or status in _PASSING_STATUSES or status >= 500:
            return _Failure(reason)
        if status in (404, 410):
            return _Failure(f"not found ({reason})", "check the location, or copy the file there again")
        if status in (401, 403):
            return _Failure(f"access denied ({reason})", "check the credentials and what they permit")
        if status == 416:
            return _Failure(f"has no such bytes ({reason})", "it is shorter than its index says: copy it there again")
        return _Failure(f"refused ({reason})", "check the location and the credentials")
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return _Failure("not found", "check the location, or copy the file there again")
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
        return _Failure(f"not a URL ({reason})", "check the location")
    if isinstance(error, asyncio.TimeoutError):
        return _Failure("timed out")
    if isinstance(error, (EOFError, OSError, aiohttp.ClientError)):
        return _Failure(reason)
    from botocore import exceptions, parsers  # here, since HTTP alone does not need it

    passing = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
    if isinstance(error, (*passing, parsers.ResponseParserError)):
        return _Failure(reason)
    if isinstance(error, exceptions.BotoCoreError):
        return _Failure(reason, "set the AWS_* variables (credentials, region, endpoint) and check the bucket's name")
    return None


def _answer_of(error: Exception) -> tuple[int, str, str] | None:
    """Status, S3's error code and a line of reason, where a server answered with an error."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status, "", f"HTTP {error.status} {error.message}".strip()
    response = getattr(error.__cause__, "response", None)  # s3fs translates botocore's errors, and names them as cause
    if not isinstance(response, dict):
        return None
    status, answer = response["ResponseMetadata"]["HTTPStatusCode"], response.get("Error", {})
    code, message = answer.get("Code", ""), " ".join(str(answer.get("Message", "")).split())
    return status, code, f"HTTP {status} {code}: {message}"
