"""environment.yml: one a solver accepts, with the same pins that `make` installs. No conda needed."""

import json
from pathlib import Path

import pytest
import rattler
import yaml

from tests.entry import REPOSITORY

REQUIREMENTS = ["-r requirements.txt", "-c constraints.txt"]


@pytest.fixture
def environment() -> dict:
    return yaml.safe_load((REPOSITORY / "environment.yml").read_text())


def test_the_pip_part_is_the_files_that_make_installs(environment: dict) -> None:
    *conda, pip = environment["dependencies"]
    assert all(isinstance(spec, str) for spec in conda) and pip == {"pip": REQUIREMENTS}
    assert "pip" in conda
    script = (REPOSITORY / "cluster" / "install.sh").read_text()
    for argument in REQUIREMENTS:
        assert argument in script
        assert (REPOSITORY / argument.split()[1]).is_file()
    assert "python=3.11" in conda
    assert 'requires-python = ">=3.11,<3.12"' in (REPOSITORY / "pyproject.toml").read_text()


async def solve(specs: list[str], channel: Path) -> set[str]:
    """Names that conda's solver picks from a channel that has only what environment.yml asks conda for."""
    names = {"python": "3.11.9", "pip": "25.0", "git": "2.49.0"}
    packages = {
        f"{name}-{version}-0.tar.bz2": {
            "name": name,
            "version": version,
            "build": "0",
            "build_number": 0,
            "subdir": "linux-64",
            "depends": [],
            "md5": "0" * 32,
            "sha256": "0" * 64,
            "size": 1,
        }
        for name, version in names.items()
    }
    for subdir, content in (("linux-64", packages), ("noarch", {})):
        (channel / subdir).mkdir(parents=True)
        repodata = {"info": {"subdir": subdir}, "packages": content, "packages.conda": {}}
        (channel / subdir / "repodata.json").write_text(json.dumps(repodata))
    records = await rattler.solve(
        sources=[rattler.Channel(channel.as_uri())],
        specs=[rattler.MatchSpec(spec) for spec in specs],
        platforms=["linux-64", "noarch"],
    )
    return {record.name.normalized for record in records}


@pytest.mark.parametrize("spec", ["python=>3.11", "numpy=="])
def test_a_wrong_spec_would_be_seen(spec: str) -> None:
    with pytest.raises(Exception, match=r"(?i)invalid|parse|version|operator"):
        rattler.MatchSpec(spec)


def test_condas_solver_accepts_it(environment: dict, tmp_path: Path) -> None:
    import asyncio

    assert environment["channels"] == ["conda-forge"]
    specs = [spec for spec in environment["dependencies"] if isinstance(spec, str)]
    assert asyncio.run(solve(specs, tmp_path / "channel")) == {"python", "pip", "git"}
