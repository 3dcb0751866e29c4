import posixpath
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import storage
from common.errors import DataError
from datasets_prep.sources import files as files_module
from datasets_prep.sources.files import VIDEO_EXTENSIONS, VideoFiles


def lay(folder: Path, *names: str) -> VideoFiles:
    """Files whose sizes are 1, 2, 3, … in the order of `names`."""
    for size, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return VideoFiles(str(folder))


def naive(names: list[str], asked: str) -> set[str]:
    """Every file that may be meant, by the rule as the docs say it."""

    def without(name: str) -> str:
        return next((name[: -len(e)] for e in VIDEO_EXTENSIONS if name.lower().endswith(e)), name)

    def ends(path: str, with_: str) -> bool:
        return path.split("/")[-len(with_.split("/")) :] == with_.split("/")

    exact = {n for n in names if n == asked}
    same = {n for n in names if ends(n, asked)}
    other = {n for n in names if n != without(n) and (ends(without(n), asked) or ends(without(n), without(asked)))}
    return exact or same or other


BASE = st.sampled_from(["a", "b", "a.mp4", "a.AVI", "a.webm", "a.mov.mp4", "b.mkv", "b.txt", "a.b", "a.b.mp4"])
PATH = st.builds("/".join, st.tuples(st.lists(st.sampled_from(["x", "y", "a"]), max_size=2).map("/".join), BASE)).map(
    lambda p: p.lstrip("/")
)


@settings(max_examples=200)
@given(names=st.sets(PATH, max_size=8), asked=PATH)
def test_as_a_naive_search(names: set[str], asked: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        laid: list[str] = []
        for name in sorted(names):  # "a" can't be a file and a folder
            path = Path(folder) / name
            if not path.exists() and not any(p.is_file() for p in path.parents):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x" * (len(laid) + 1))
                laid.append(name)
        if not laid:
            return
        files = VideoFiles(folder)
        assert len(files) == len(laid)
        meant = naive(laid, asked)
        if len({posixpath.dirname(n) for n in meant}) > 1:
            with pytest.raises(DataError, match="may be"):
                files.find(asked)
            return
        found = files.find(asked)
        assert (found is None) == (not meant)
        if found is not None:
            assert found[0] in meant
            assert laid[found[1] - 1] == found[0]  # the size is this file's
        assert files.exact(asked) == ((asked, laid.index(asked) + 1) if asked in laid else None)


def test_names_as_annotations_have_them(tmp_path: Path) -> None:
    clip = "1012_Unbreakable_00.05.16.065-00.05.21.941"
    files = lay(tmp_path, "flat.avi", "deep/er/nested.MKV", f"m/{clip}.avi", "dir/1.mp4", "x.mov.mp4", "bare")
    assert files.find("flat") == files.find("flat.mp4") == files.find("flat.avi") == ("flat.avi", 1)
    assert files.find("nested") == files.find("nested.mp4") == files.find("er/nested") == ("deep/er/nested.MKV", 2)
    assert files.find(clip) == (f"m/{clip}.avi", 3)  # ".941" is no extension
    assert files.find("dir/1") == files.find("./dir/../dir/1.mp4") == ("dir/1.mp4", 4)
    assert files.find("x.mov") == ("x.mov.mp4", 5)
    assert files.find("bare") == ("bare", 6)
    for absent in ("fla", "lat", "other/1.mp4", "../flat.avi", "bare.mp4", "1012_Unbreakable_00.05.16", "r/nested"):
        assert files.find(absent) is None


def test_a_video_is_never_a_file_of_another_kind(tmp_path: Path) -> None:
    files = lay(tmp_path, "a.json", "a.txt", "sub/a.avi")
    assert files.find("a") == files.find("a.mp4") == ("sub/a.avi", 3)
    assert files.find("a.json") == ("a.json", 1)


def test_of_several_the_exact_one_then_by_extension(tmp_path: Path) -> None:
    files = lay(tmp_path, "x/a.avi", "x/a.mp4", "x/a.webm", "y/b.mp4", "b.mp4", "y/c.mp4", "z/c.avi")
    assert files.find("a") == ("x/a.mp4", 2)
    assert files.find("a.webm") == ("x/a.webm", 3)
    assert files.find("b.mp4") == ("b.mp4", 5)  # exact, though there is another below
    assert files.find("c.avi") == ("z/c.avi", 7)  # by its whole name, though "c.mp4" has the stem
    with pytest.raises(DataError, match=r"'c' may be 'y/c.mp4' or 'z/c.avi' below source.videos=.*: remove one"):
        files.find("c")
    with pytest.raises(DataError, match=r"'b' may be 'b.mp4' or 'y/b.mp4'"):
        files.find("b")


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    with open(bytes(tmp_path) + b"/caf\xe9.mp4", "wb") as file:
        file.write(b"xyz")
    found = VideoFiles(str(tmp_path)).find("caf\udce9")
    assert found == ("caf\udce9.mp4", 3)
    assert (tmp_path / found[0]).is_file()


def test_names_whose_hashes_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_hash", lambda text: len(text) % 2)
    files = lay(tmp_path, *[f"{d}/{i}.mp4" for d in "ab" for i in range(20)])
    assert files.find("a/7") == ("a/7.mp4", 8)
    assert files.find("b/7.avi") == ("b/7.mp4", 28)
    assert files.find("77") is None


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=r"source.videos=.* is no folder with videos in it: correct the path"):
            VideoFiles(str(folder))


def test_a_prefix_on_s3(s3: str) -> None:
    storage.publish_bytes(b"xyz", f"{s3}/videos/deep/a.avi")
    storage.publish_bytes(b"other", f"{s3}/videos2/b.avi")
    files = VideoFiles(f"{s3}/videos/")
    assert len(files) == 1
    assert files.find("a.mp4") == ("deep/a.avi", 3)


def test_a_file_costs_28_bytes_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    number = 200_000
    names = [f"{i // 1000:05d}/{i:012d}.mp4" for i in range(number)]
    entries = (storage.Entry(f"/videos/{name}", i) for i, name in enumerate(names))
    monkeypatch.setattr(storage, "list_files", lambda url: entries)
    files = VideoFiles("/videos")
    kept = list(vars(files).values())
    arrays = sum(v.nbytes for v in kept if hasattr(v, "nbytes"))
    assert arrays <= (28 + len(names[0]) + 1) * number
    assert all(hasattr(v, "nbytes") or sys.getsizeof(v) < 200 for v in kept)  # nothing else grows
    assert files.find("000000123456") == ("00123/000000123456.mp4", 123456)
    assert files.find("000000999999") is None
