"""video2dataset 1.3.0 on local files, as benchmarks.prep starts it: with the interpreter of its own environment.

    PYTHON benchmarks/prep_video2dataset.py TABLE.parquet OUTPUT PROCESSES SHORT_SIDE FPS SAMPLES_PER_SHARD PRECISION

The release needs three things to do this work. Its modules import torch, torchaudio, torchdata and transformers, which
this way through it never calls: where they are not installed, empty ones stand in. `ResolutionSubsampler` and
`FrameSubsampler` lack the attribute `encode_formats` that the download worker reads. `FrameSubsampler` changes the dict
that the worker is iterating over. Nothing else of it is changed.
"""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

ABSENT = [name for name in ("torch", "torchaudio", "torchdata", "transformers") if not importlib.util.find_spec(name)]


class Absent(types.ModuleType):
    """A module any name of which is an empty class."""

    __path__: list[str] = []  # noqa: RUF012 (what makes it a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})


class AbsentFinder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Absent:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


# Not under __main__: its worker processes are spawned, import this file, and need the same.
sys.meta_path.append(AbsentFinder())  # type: ignore[arg-type]

from video2dataset import video2dataset  # type: ignore[import-not-found]  # noqa: E402
from video2dataset.subsamplers import FrameSubsampler, ResolutionSubsampler  # type: ignore  # noqa: E402

FrameSubsampler.encode_formats = ResolutionSubsampler.encode_formats = {"video": "mp4"}
_call = FrameSubsampler.__call__
FrameSubsampler.__call__ = lambda self, streams, metadata=None: _call(self, dict(streams), metadata)


def main() -> None:
    table, output, processes, short_side, fps, samples, precision = sys.argv[1:]
    config = {
        "subsampling": {
            "ClippingSubsampler": {"args": {"precision": precision}},
            # The test videos are wide, so the height is the short side.
            "ResolutionSubsampler": {"args": {"resize_mode": ["scale"], "height": int(short_side)}},
            "FrameSubsampler": {"args": {"frame_rate": float(fps)}},
        },
        "reading": {"yt_args": {"yt_metadata_args": None}, "timeout": 60, "sampler": None},
        "storage": {"number_sample_per_shard": int(samples), "oom_shard_count": 5, "captions_are_subtitles": False},
        "distribution": {
            "processes_count": int(processes),
            "thread_count": 1,
            "subjob_size": 1000,
            "distributor": "multiprocessing",
        },
    }
    columns = {"url_col": "path", "caption_col": "caption", "clip_col": "clips"}
    formats = {"input_format": "parquet", "output_format": "webdataset"}
    video2dataset(url_list=table, output_folder=output, config=config, **columns, **formats)


if __name__ == "__main__":
    main()
