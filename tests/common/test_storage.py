"""Local files and a real S3 server behind one interface: whole or not at all, and errors in one sentence."""

import concurrent.futures
import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local import S3Server
from common import counts, storage
from common.errors import AlreadyExistsError, NoBucketError, NotFoundError, StorageError


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder and an S3 prefix: whatever holds for one holds for the other."""
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3")


def names(url: str) -> list[str]:
    return [entry.url.removeprefix(url + "/") for entry in storage.list_files(url)]


def test_what_is_published_is_read_back(base: str, tmp_path: Path) -> None:
    url = f"{base}/a b/ü%20#.bin"
    assert not storage.exists(url)
    storage.publish_bytes(b"0123456789", url)
    assert storage.exists(url) and storage.read(url) == b"0123456789"
    with storage.open_stream(url) as stream:
        assert stream.read(4) == b"0123"
    assert storage.read_range(url, 3, 4) == b"3456"
    assert storage.download(url, tmp_path / "deep" / "copy") == hashlib.sha256(b"0123456789").hexdigest()
    assert (tmp_path / "deep" / "copy").read_bytes() == b"0123456789"
    storage.publish_bytes(b"new", url)
    assert storage.read(url) == b"new"
    storage.delete(url)
    storage.delete(url)
    assert not storage.exists(url)


def test_list_names_files_below_a_prefix_in_order(base: str) -> None:
    for name in ("train/1", "train/0", "trainer/2", "x"):
        storage.publish_bytes(name.encode(), f"{base}/{name}")
    assert names(base) == ["train/0", "train/1", "trainer/2", "x"]
    assert [(e.url, e.size) for e in storage.list_files(f"{base}/train")] == [
        (f"{base}/train/0", 7),
        (f"{base}/train/1", 7),
    ]
    assert names(f"{base}/absent") == []


def test_linked_folders_are_listed_but_not_for_ever(tmp_path: Path) -> None:
    """People lay links to the disks that their videos are on."""
    for name in ("disk/deep/a", "videos/b"):
        storage.publish_bytes(b"x", str(tmp_path / name))
    (tmp_path / "videos/more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "videos")  # a circle of two links
    (tmp_path / "disk/gone").symlink_to(tmp_path / "nowhere")
    assert names(str(tmp_path / "videos")) == ["b", "more/deep/a"]


def test_more_than_a_page_is_listed(s3: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.publish_bytes(b"", f"{s3}/{i:04d}"), range(1005)))
    assert names(s3) == [f"{i:04d}" for i in range(1005)]


def test_of_several_conditional_writers_one_wins(base: str) -> None:
    url, start = f"{base}/plan.json", threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        try:
            storage.publish_bytes(b"%d" % number, url, if_none_match=True)
        except AlreadyExistsError as error:
            assert url in str(error)
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert storage.read(url) == b"%d" % won.index(True)


def test_a_range_past_the_end_is_an_error_not_less_bytes(base: str) -> None:
    url = f"{base}/a"
    storage.publish_bytes(b"0123456789", url)
    for start, length in ((8, 4), (10, 1), (50, 2)):
        with pytest.raises(StorageError, match=r"/a ends early"):
            storage.read_range(url, start, length)
    assert storage.read_range(url, 4, 0) == b""


def test_what_is_not_there_is_told(base: str, tmp_path: Path) -> None:
    url = f"{base}/absent"
    calls: list[Callable[[], Any]] = [
        lambda: storage.read(url),
        lambda: storage.read_range(url, 0, 1),
        lambda: storage.download(url, tmp_path / "copy"),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match="absent") as told:
            call()
        assert "\n" not in str(told.value)
    assert list(tmp_path.glob("**/*copy*")) == []
    assert names(base) == []


def test_multipart_above_its_size(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = 5 << 20  # the least that S3 takes
    monkeypatch.setattr(storage, "MULTIPART_BYTES", 4 * part)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(os.urandom(1000))
    large.write_bytes(os.urandom(4 * part + 12345))
    for path in (small, large):
        storage.publish(path, f"{s3}/{path.name}")
        assert storage.download(f"{s3}/{path.name}", tmp_path / "copy") == hashlib.sha256(path.read_bytes()).hexdigest()
    etag = {
        p.name: storage._client().head_object(Bucket="tests", Key=f"{s3[11:]}/{p.name}")["ETag"] for p in (small, large)
    }
    assert "-5" in etag["large"] and "-" not in etag["small"]


def test_a_local_write_that_fails_leaves_the_old_content_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store" / "a"
    storage.publish_bytes(b"old", str(target))

    def full(source: Path, copy: Path) -> None:
        Path(copy).write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.shutil, "copyfile", full)
    with pytest.raises(StorageError, match=r"cannot write .*/a: No space left"):
        storage.publish_bytes(b"new", str(target))
    assert target.read_bytes() == b"old"
    assert [p.name for p in target.parent.iterdir()] == ["a"]


def test_readers_never_see_half_a_local_file(tmp_path: Path) -> None:
    url, stop = str(tmp_path / "a"), threading.Event()
    contents = [bytes([i]) * 300_000 for i in range(4)]
    storage.publish_bytes(contents[0], url)

    def read() -> bool:
        whole = True
        while not stop.is_set():
            whole = whole and storage.read(url) in contents
        return whole

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for i in range(40):
            storage.publish_bytes(contents[i % 4], url)
        stop.set()
        assert all(reader.result() for reader in readers)


@contextlib.contextmanager
def cut_server(*answers: bytes) -> Iterator[str]:
    """An endpoint that gives these answers in turn, the last for ever, and closes: a connection lost in mid-body."""
    listener = socket.create_server(("127.0.0.1", 0))
    left = list(answers)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_a_download_cut_short_leaves_no_file(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: "x"\r\n\r\nonly this'
    with cut_server(head) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for call in (lambda: storage.read("s3://tests/a"), lambda: storage.download("s3://tests/a", tmp_path / "copy")):
            with pytest.raises(StorageError, match=r"'tests', key 'a'"):
                call()
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_breaks_off_is_asked_for_again(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail where boto3's own attempts are all: they end when the body begins."""
    head = b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\nETag: "x"\r\n\r\n'
    for read in (lambda: storage.read("s3://tests/a"), lambda: storage.read_range("s3://tests/a", 0, 9)):
        with cut_server(head + b"only", head, head + b"the whole") as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            counts.take()
            assert read() == b"the whole"
            assert counts.take() == {"s3_errors": 2}


def test_attempts_that_boto3_repeats_by_itself_are_counted(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail without the question that boto3 asks after each: a storage that chokes would not be seen."""
    slow_down = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n"
    with cut_server(slow_down, slow_down, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        counts.take()
        with pytest.raises(NotFoundError):
            storage.read("s3://tests/a")
        assert counts.take() == {"s3_errors": 2}


def test_a_missing_bucket_is_told_by_every_call(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    url = "s3://no-such-bucket/key"
    calls: list[Callable[[], Any]] = [
        lambda: storage.read(url),
        lambda: storage.read_range(url, 0, 1),
        lambda: storage.publish(tmp_path / "file", url),
        lambda: storage.publish(tmp_path / "file", url, if_none_match=True),
        lambda: list(storage.list_files(url)),
        lambda: storage.check_writable(url),
        lambda: storage.exists(url),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(StorageError, match="no-such-bucket") as told:
            call()
        assert "bucket" in str(told.value), number


def test_a_name_with_bucket_in_it_is_no_missing_bucket(s3: str, tmp_path: Path) -> None:
    url = f"{s3}/my-bucket/none"
    assert not storage.exists(url)
    with pytest.raises(NotFoundError, match=f"^{url} does not exist") as told:
        storage.read(url)
    assert not isinstance(told.value, NoBucketError)
    with pytest.raises(NoBucketError, match="'gone' does not exist"):
        storage.exists("s3://gone/key")


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_and_never_shown(
    wrong: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not storage.exists("s3://tests/a")  # a client with the right ones must not be used again
    monkeypatch.setenv(wrong, "wrongwrongwrongwrong")
    (tmp_path / "file").write_bytes(b"x")
    calls: list[Callable[[], Any]] = [
        lambda: storage.read("s3://tests/a"),
        lambda: storage.publish(tmp_path / "file", "s3://tests/a"),
        lambda: storage.publish(tmp_path / "file", "s3://tests/a", if_none_match=True),
        lambda: list(storage.list_files("s3://tests/a")),
        lambda: storage.exists("s3://tests/a"),
        lambda: storage.check_writable("s3://tests/run"),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(StorageError) as told:
            call()
        message = str(told.value)
        assert "AWS_ACCESS_KEY_ID" in message and "'tests'" in message, (number, message)
        for secret in (*s3_server.env.values(), "wrongwrong"):
            if secret not in ("us-east-1", s3_server.url):
                assert secret not in message
        assert not isinstance(told.value, NotFoundError)


def test_no_credentials_are_told(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match=r"no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read("s3://tests/a")


def test_a_dead_endpoint_is_told(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot read .*'tests'.*127\.0\.0\.1:9"):
        storage.read("s3://tests/a")


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://host/a", "unknown scheme"), ("s3:///key", "names no bucket"), ("s3://tests", "names no key")],
)
def test_a_url_of_no_object_is_told(url: str, words: str, s3_server: S3Server) -> None:
    with pytest.raises(StorageError, match=words):
        storage.read(url)
    with pytest.raises(StorageError, match=words):
        storage.publish_bytes(b"", url)


def test_a_whole_bucket_is_listed(s3: str) -> None:
    storage.publish_bytes(b"x", f"{s3}/a")
    for url in ("s3://tests", "s3://tests/"):
        assert f"{s3}/a" in [entry.url for entry in storage.list_files(url)]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        storage.read(str(tmp_path))
    assert not storage.exists(str(tmp_path))


def test_check_writable_leaves_nothing(base: str) -> None:
    storage.check_writable(f"{base}/run")
    assert names(base) == []


def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        storage.check_writable(str(tmp_path / "file" / "run"))


def test_join_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://b/a/", "/c", "d") == "s3://b/a/c/d"
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://b/runs") == "s3://b/runs"
