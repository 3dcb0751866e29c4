"""The files below a folder or prefix, found by name. Frugal, as there may be ten million."""

import posixpath
import zlib
from array import array
from os import fsdecode, fsencode

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common import storage
from common.errors import DataError

# In the order in which one is taken where a folder holds several files of one name: converted copies come first.
VIDEO_EXTENSIONS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".3g2", ".3gpp"),
    *(".mts", ".m2ts", ".ts", ".qt", ".asf", ".divx", ".ogv", ".vob"),
)
CHUNK = 1 << 16


class VideoFiles:
    """Every file below `folder`, listed once.

    A file takes 28 bytes and its name: names and sizes lie in the order of the names' hashes, next to a second,
    sorted array of hashes of the names without folder and extension. No Python object lives per file.

    Raises:
        DataError: there is no file.
        StorageError: the folder can't be listed.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        root = storage.absolute(folder).rstrip("/") + "/"
        chunks, chunk = [], list[bytes]()
        sizes, by_path, by_stem = array("q"), array("I"), array("I")
        for entry in storage.list_files(folder):
            path = entry.url.removeprefix(root)
            chunk.append(fsencode(path))  # bytes: a name on disk need not be UTF-8
            sizes.append(entry.size)
            by_path.append(_hash(path))
            by_stem.append(_hash(_stem(posixpath.basename(path))))
            if len(chunk) == CHUNK:
                chunks.append(pa.array(chunk, pa.large_binary()))
                chunk = []
        if not sizes:
            raise DataError(f"source.videos={folder} is no folder with videos in it: correct the path")
        paths = pa.concat_arrays([*chunks, pa.array(chunk, pa.large_binary())])
        del chunks  # there are never three copies of all names
        path_hashes = np.frombuffer(by_path, np.uint32)
        order = np.argsort(path_hashes, kind="stable")
        self._paths = paths.take(order)
        self._sizes = np.frombuffer(sizes, np.int64)[order]
        self._path_hashes = path_hashes[order]
        stems = np.frombuffer(by_stem, np.uint32)[order]
        self._stem_order = np.argsort(stems, kind="stable").astype(np.uint32)
        self._stem_hashes = stems[self._stem_order]

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Relative path and bytes of a file, by the number that `index` gives."""
        return fsdecode(self._paths[index].as_py()), int(self._sizes[index])

    def exact(self, path: str) -> tuple[str, int] | None:
        """Path and bytes of the file with exactly this relative path."""
        index = self._exact(posixpath.normpath(path))
        return None if index is None else self[index]

    def find(self, name: str) -> tuple[str, int] | None:
        """Path and bytes of the file that `name` means: see `index`."""
        index = self.index(name)
        return None if index is None else self[index]

    def index(self, name: str) -> int | None:
        """The number of the file that `name` means.

        It is the file with that relative path; else one of that name in any folder below; else one that differs in
        its video extension only, or has one more. A folder in `name` must be the file's, so "cat/1.mp4" is never
        taken for "dog/1.mp4".

        Raises:
            DataError: files in different folders fit equally well.
        """
        name = posixpath.normpath(name)
        index = self._exact(name)
        if index is not None:
            return index
        paths = {candidate: self[candidate][0] for candidate in self._of_stem(name)}
        fitting = {i: path for i, path in paths.items() if f"/{path}".endswith(f"/{name}")}
        if not fitting:
            ends = (f"/{name}", f"/{_stem(name)}")
            stems = {i: _stem(path) for i, path in paths.items()}
            fitting = {i: path for i, path in paths.items() if stems[i] != path and f"/{stems[i]}".endswith(ends)}
        return self._choose(name, fitting)

    def _choose(self, name: str, fitting: dict[int, str]) -> int | None:
        if not fitting:
            return None
        paths = sorted(fitting.values(), key=lambda p: (_rank(p), p))
        for path in paths[1:]:
            if posixpath.dirname(path) != posixpath.dirname(paths[0]):
                raise DataError(
                    f"{name!r} may be {paths[0]!r} or {path!r} below source.videos={self.folder}: remove one of them"
                )
        return next(index for index, path in fitting.items() if path == paths[0])

    def _exact(self, path: str) -> int | None:
        for index in range(*_run(self._path_hashes, path)):
            if self[index][0] == path:
                return index
        return None

    def _of_stem(self, name: str) -> list[int]:
        """Files whose name without folder and extension has the hash of this one's, with or without its extension."""
        base = posixpath.basename(name)
        found = (self._stem_order[slice(*_run(self._stem_hashes, key))] for key in {base, _stem(base)})
        return [int(index) for part in found for index in part]


def _stem(path: str) -> str:
    """Without a known video extension; a name like "00.05.16.065-00.05.21.941" has none."""
    stem, extension = posixpath.splitext(path)
    return stem if extension.lower() in VIDEO_EXTENSIONS else path


def _rank(path: str) -> int:
    extension = posixpath.splitext(path)[1].lower()
    return VIDEO_EXTENSIONS.index(extension) if extension in VIDEO_EXTENSIONS else len(VIDEO_EXTENSIONS)


def _hash(text: str) -> int:
    return zlib.crc32(fsencode(text))


def _run(hashes: NDArray[np.uint32], text: str) -> tuple[int, int]:
    """Where the hash of `text` begins and ends in sorted hashes."""
    key = np.uint32(_hash(text))  # of the array's type: searchsorted would convert the whole array for a Python int
    return int(hashes.searchsorted(key, "left")), int(hashes.searchsorted(key, "right"))
