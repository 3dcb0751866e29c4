"""The reference tensors of the official implementations."""

from pathlib import Path

import numpy as np
import pytest

from tests import parity

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


@pytest.mark.parametrize(
    "name",
    [
        "promptswitch_square.npz",
        "promptswitch_chunked.npz",
        "clip4clip.npz",
        "vop.npz",
        "clipvip.npz",
        "tokshift.npz",
        "xpool.npz",
        "xclip.npz",
        "ts2net.npz",
    ],
)
def test_official_outputs_and_gradients(name: str, capsys: pytest.CaptureFixture[str]):
    if not (GOLDEN / name).is_file():
        pytest.skip("reference tensors (../shared/golden) are not on this machine")
    assert parity.compare(GOLDEN / name), capsys.readouterr().out


def test_a_deviation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if not GOLDEN.is_dir():
        pytest.skip("reference tensors (../shared/golden) are not on this machine")
    with np.load(GOLDEN / "promptswitch_square.npz") as file:
        values = dict(file)
    values["out.video_features"] = values["out.video_features"] + 1e-7
    np.savez(tmp_path / "promptswitch_other.npz", **values)
    monkeypatch.setattr("sys.argv", ["parity", str(tmp_path / "promptswitch_other.npz")])
    assert parity.main() == 1
    assert "out.video_features" in capsys.readouterr().out
