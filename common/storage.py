"""URL → bytes: local paths and s3:// behind one small interface. The only importer of boto3.

Credentials and endpoint come from the standard chain (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, a profile, an
instance role); none of them is ever an argument here, so none can reach a config, a log or MLflow.
Whatever is written appears whole or not at all.
"""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from common import counts
from common.errors import AlreadyExistsError, NoBucketError, NoSpaceError, NotFoundError, StorageError

MULTIPART_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
MAX_ATTEMPTS = 5


class Entry(NamedTuple):
    """One file or object: its full URL and its size in bytes."""

    url: str
    size: int


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *(p.strip("/") for p in parts)])


def absolute(url: str) -> str:
    """`url` with a local path made absolute, so that it means the same in every process of this machine."""
    return url if is_s3(url) else str(_path(url))


def read(url: str) -> bytes:
    """All bytes of a file or object. Raises NotFoundError, StorageError."""
    with _told(url, "read"):
        return _body(url) if is_s3(url) else _path(url).read_bytes()


def read_range(url: str, start: int, length: int) -> bytes:
    """`length` bytes from offset `start`. Raises StorageError also when fewer are there."""
    if length == 0:  # HTTP has no empty range
        return b""
    with _told(url, "read"):
        if is_s3(url):
            data = _body(url, Range=f"bytes={start}-{start + length - 1}")
        else:
            with open(_path(url), "rb") as file:
                file.seek(start)
                data = file.read(length)
    if len(data) != length:
        raise StorageError(f"{url} ends early: asked for {length} bytes at {start}, got {len(data)}")
    return data


def _body(url: str, **span: str) -> bytes:
    """An object's bytes. One that breaks off is asked for again: boto3 itself only does so before the body begins."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    bucket, key = _split(url)
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return bytes(_client().get_object(Bucket=bucket, Key=key, **span)["Body"].read())
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            counts.so_far["s3_errors"] += 1
    return bytes(_client().get_object(Bucket=bucket, Key=key, **span)["Body"].read())


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[IO[bytes]]:
    """A readable binary stream. Raises NotFoundError, StorageError."""
    with _told(url, "read"):
        if is_s3(url):
            bucket, key = _split(url)
            stream: Any = _client().get_object(Bucket=bucket, Key=key)["Body"]
        else:
            stream = open(_path(url), "rb")  # noqa: SIM115 (closed below)
    with contextlib.closing(stream):
        yield stream


def download(url: str, path: Path) -> str:
    """Copy a file or object to the local `path`, whole or not at all; returns the sha256 of its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with _temporary(path) as temporary:
        with open_stream(url) as stream, open(temporary, "wb") as out, _told(url, "download"):
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
        os.replace(temporary, path)
    return digest.hexdigest()


def publish(path: Path, url: str, if_none_match: bool = False) -> None:
    """Put the finished local file `path` at `url`, whole or not at all.

    With `if_none_match` an existing object is left alone and AlreadyExistsError is raised: of several
    writers exactly one wins. On S3 this is one conditional PUT, so the file is at most 5 GB.
    """
    assert path.is_file(), path
    with _told(url, "write"):
        if is_s3(url):
            _put(path, url, if_none_match)
            return
        target = _path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target) as temporary:
            shutil.copyfile(path, temporary)
            if if_none_match:
                os.link(temporary, target)  # fails where the target exists; os.replace would not
            else:
                os.replace(temporary, target)


def publish_bytes(data: bytes, url: str, if_none_match: bool = False) -> None:
    """`publish` for a small content in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "content"
        path.write_bytes(data)
        publish(path, url, if_none_match)


def list_files(url: str) -> Iterator[Entry]:
    """Every file below a folder or prefix, in the order of their names; nothing if it is empty or absent."""
    if is_s3(url):
        bucket, key = _parts(url.rstrip("/"))
        prefix = f"{key}/" if key else ""  # an empty one lists the whole bucket
        with _told(url, "list"):
            for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"])
        return
    root = _path(url)
    if root.is_dir():
        yield from _walk(str(root))


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[Entry]:
    """In S3's order, by the whole path; only the names of one folder and of those above it are in memory."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name + ("/" if entry.is_dir() else "") for entry in entries if not entry.name.startswith(".tmp-")
        )
    for name in names:
        path = f"{folder}/{name}"
        if name.endswith("/"):
            yield from _walk(path[:-1], (*above, real))
        else:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a link to nowhere
                status = os.stat(path)  # noqa: PTH116 (ten million times)
                if stat.S_ISREG(status.st_mode):
                    yield Entry(path, status.st_size)


def exists(url: str) -> bool:
    """True if there is a file or object at `url`. Raises StorageError if that can't be told."""
    try:
        with _told(url, "look up"):
            if not is_s3(url):
                return _path(url).is_file()
            bucket, key = _split(url)
            _client().head_object(Bucket=bucket, Key=key)
            return True
    except NoBucketError:
        raise
    except NotFoundError:
        if is_s3(url):
            _check_bucket(url)
        return False


def _check_bucket(url: str) -> None:
    """Raise NoBucketError if the bucket is missing: the answer to a HEAD of an object does not tell."""
    bucket, _ = _split(url)
    try:
        with _told(url, "look up"):
            _client().head_bucket(Bucket=bucket)
    except NotFoundError:
        raise _no_bucket(url, "look up") from None


def delete(url: str) -> None:
    """Remove one file or object; nothing happens if it is not there."""
    with contextlib.suppress(NotFoundError), _told(url, "delete"):
        if is_s3(url):
            bucket, key = _split(url)
            _client().delete_object(Bucket=bucket, Key=key)
        else:
            _path(url).unlink()


def check_writable(url: str) -> None:
    """Raise StorageError now if nothing can be written below `url` (missing bucket, wrong key, no space)."""
    probe = join(url, f".tmp-probe-{os.getpid()}")
    publish_bytes(b"", probe)
    delete(probe)


def _path(url: str) -> Path:
    if "://" in url and not url.startswith("file://"):
        raise StorageError(f"{url}: unknown scheme; use a local path or s3://bucket/key")
    return Path(url.removeprefix("file://")).expanduser().absolute()


def _parts(url: str) -> tuple[str, str]:
    """Bucket and key, which may be empty."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{url} names no bucket: write s3://bucket/key")
    return bucket, key


def _split(url: str) -> tuple[str, str]:
    """Bucket and key of an object."""
    bucket, key = _parts(url)
    if not key:
        raise StorageError(f"{url} names no key: write s3://bucket/key")
    return bucket, key


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _client() -> Any:
    return _client_for(os.getpid(), frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.lru_cache(maxsize=4)
def _client_for(pid: int, settings: frozenset[tuple[str, str]]) -> Any:
    """One client per process, endpoint and identity: building one takes ~0.2 s."""
    import boto3
    from botocore.config import Config

    endpoint = _endpoint()
    config = Config(
        retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        # Servers other than AWS rarely have a DNS name per bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    client = boto3.session.Session().client("s3", config=config, region_name=region)
    client.meta.events.register("needs-retry.s3", _count_error)
    return client


def _count_error(response: Any, caught_exception: Exception | None, **_: Any) -> None:
    """boto3 asks after every attempt, also those that it repeats in silence."""
    if caught_exception is not None or response[0].status_code in (429, *range(500, 600)):
        counts.so_far["s3_errors"] += 1


def _put(path: Path, url: str, if_none_match: bool) -> None:
    bucket, key = _split(url)
    if if_none_match:
        with open(path, "rb") as file:
            _client().put_object(Bucket=bucket, Key=key, Body=file, IfNoneMatch="*")
        return
    from boto3.s3.transfer import TransferConfig

    transfer = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4)
    _client().upload_file(str(path), bucket, key, Config=transfer)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new name beside `path`; whatever is left under it at the end is removed."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(url: str, verb: str) -> Iterator[None]:
    """Turn what boto3 and the file system raise into one sentence with bucket, key and cause."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{url} does not exist") from None
    except FileExistsError:
        raise AlreadyExistsError(f"{url} already exists") from None
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"cannot {verb} {url}: {error.strerror or error}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "boto3", "s3transfer", "urllib3")):
            raise
        raise _s3_error(url, verb, error) from None


def _s3_error(url: str, verb: str, error: Exception) -> StorageError:
    bucket, key = _parts(url)
    inner = error.__context__ if type(error).__name__ == "S3UploadFailedError" else error
    response = getattr(inner, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    where = f"bucket {bucket!r}, key {key!r}" + (f" at {_endpoint()}" if _endpoint() else "")
    if code == "NoSuchBucket":
        return _no_bucket(url, verb)
    if code in ("NoSuchKey", "404"):
        return NotFoundError(f"{url} does not exist" + (f" at {_endpoint()}" if _endpoint() else ""))
    if code in ("InvalidRange", "416"):
        return StorageError(f"{url} ends early: there is nothing at the offset asked for")
    if code in ("PreconditionFailed", "412"):
        return AlreadyExistsError(f"{url} already exists")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "ExpiredToken"):
        return StorageError(
            f"cannot {verb} {where}: {code}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
        )
    if type(inner).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        way_out = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        return StorageError(f"cannot {verb} {where}: no credentials; {way_out}")
    cause = code or str(inner).splitlines()[0]
    return StorageError(f"cannot {verb} {where}: {cause} (after {MAX_ATTEMPTS} attempts)")


def _no_bucket(url: str, verb: str) -> NoBucketError:
    bucket, _ = _parts(url)
    return NoBucketError(f"cannot {verb} {url}: bucket {bucket!r} does not exist; create it or correct the URL")
