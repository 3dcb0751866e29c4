"""Presets, overrides and what a person reads when one is wrong."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common import config as configs
from common.config import Settings
from common.errors import ConfigError, NotFoundError
from tests import entry


class Small(Settings):
    name: Literal["small"] = Field("small", description="tag")
    width: PositiveInt = Field(8, description="width in units")


class Deep(Settings):
    name: Literal["deep"] = Field("deep", description="tag")
    layers: PositiveInt = Field(2, description="number of layers")


class Optim(Settings):
    lr: PositiveFloat = Field(1e-3, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's betas")
    steps: int | None = Field(None, description="steps, or null")


class Whole(Settings):
    title: str = Field(description="what it is called")
    splits: list[str] = Field(["train"], description="splits")
    options: dict[str, Any] = Field({}, description="free keys")
    flip: bool = Field(False, description="flip or not")
    model: Annotated[Small | Deep, Field(discriminator="name")] = Small()
    optim: Optim = Optim()

    @model_validator(mode="after")
    def _check(self) -> "Whole":
        if self.flip and not self.splits:
            raise ValueError("flip=true needs splits: set splits=[train]")
        return self


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text("title: tiny\noptim:\n  lr: 0.01\n")
    (tmp_path / "large.yaml").write_text("title: large\nmodel: {name: deep, layers: 12}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("no", "no"),  # YAML 1.1 would say false
        ("on", "on"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("True", "True"),
        ('["a", 2]', ["a", 2]),
        ("[train, val]", "[train, val]"),  # not JSON: a string, which a list field refuses
        ('{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("s3://bucket/a=b", "s3://bucket/a=b"),
        ("", ""),
    ],
)
def test_override_values_are_json_or_else_a_string(text: str, value: Any) -> None:
    parsed = configs.parse_overrides([f"key={text}"])["key"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("argument", ["optim.lr", "=3", "--lr=3", "-x"])
def test_what_is_no_override_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        configs.parse_overrides([argument])


def test_overrides_reach_the_loaded_preset(presets: Path) -> None:
    config = configs.load(Whole, "tiny", ["optim.betas=[0.5, 0.6]", "flip=true"], presets)
    assert config.title == "tiny" and config.optim.lr == 0.01
    assert config.optim.betas == (0.5, 0.6) and config.flip is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["'optim.lrr'", "did you mean 'optim.lr'"]),
        ("lr=1", ["'lr'", "did you mean 'optim.lr'"]),
        ('model={"name": "small", "widht": 3}', ["'model.widht'", "did you mean 'model.width'"]),
        ("model.width=3", ["model.name is required", "model.name=..."]),
        ("zzz=3", ["'zzz'", "--help"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim.lr=Infinity", ["optim.lr=Infinity", "finite"]),
        ("optim.lr=fast", ['optim.lr="fast"', "number"]),
        ("optim.betas=[1]", ["optim.betas"]),
        ("splits=train", ['splits="train"', "list"]),
        ("splits=[1]", ["splits.0=1", "string"]),
        ("title.x=3", ["title", "no keys below"]),
        ("model.name=medium", ["model.name", "'medium'", "'small'", "'deep'"]),
        ("optim=3", ["optim=3"]),
    ],
)
def test_a_wrong_override_is_told_with_key_value_and_way_out(override: str, words: list[str], presets: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        configs.load(Whole, "tiny", [override], presets)
    message = str(refused.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and "pydantic" not in message


def test_several_mistakes_are_told_at_once(presets: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr=.*; .*optim\.stepz"):
        configs.load(Whole, "tiny", ["optim.lr=0", "optim.stepz=3"], presets)


def test_a_missing_key_and_a_sentence_of_ours_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"title is required: give title=\.\.\."):
        configs.validate(Whole, {})
    with pytest.raises(ConfigError, match=r"^flip=true needs splits: set splits=\[train\]$"):
        configs.validate(Whole, {"title": "x", "flip": True, "splits": []})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "holds no keys"),
        ("", "holds no keys"),
        (b"a: \xfc", "not UTF-8"),
    ],
)
def test_a_damaged_preset_is_told(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for preset, folder in ((str(path), None), ("p", tmp_path)):
        with pytest.raises(ConfigError, match=words):
            configs.load(Whole, preset, [], folder)


def test_an_unknown_preset_is_told_with_the_known_ones(presets: Path) -> None:
    with pytest.raises(ConfigError, match=r"'tyny', did you mean 'tiny'\?; known: large, tiny"):
        configs.load(Whole, "tyny", [], presets)
    with pytest.raises(NotFoundError, match="absent"):
        configs.load(Whole, str(presets / "absent.yaml"), [], presets)


def test_a_dump_is_a_preset_of_the_same_configuration(presets: Path, tmp_path: Path) -> None:
    config = configs.load(Whole, "large", ["title=über: #1", 'options={"a.b": [1, null]}', "optim.lr=1e-7"], presets)
    (tmp_path / "resolved.yaml").write_text(configs.dump(config))
    assert configs.load(Whole, str(tmp_path / "resolved.yaml")) == config


def test_a_preset_is_read_from_a_url(s3: str) -> None:
    from common import storage

    storage.publish_bytes(b"title: far\n", f"{s3}/preset.yaml")
    assert configs.load(Whole, f"{s3}/preset.yaml", ["flip=true"]).title == "far"


def test_apply_changes_one_thing_and_checks_it(presets: Path) -> None:
    config = configs.load(Whole, "large", [], presets)
    changed = configs.apply(config, {"model.layers": 3, "optim.lr": 0.5})
    assert isinstance(changed.model, Deep) and changed.model.layers == 3 and changed.optim.lr == 0.5
    assert isinstance(config.model, Deep) and config.model.layers == 12
    with pytest.raises(ConfigError, match=r"model\.layers=0"):
        configs.apply(config, {"model.layers": 0})


def test_another_member_of_a_union_comes_with_its_own_keys(presets: Path) -> None:
    config = configs.load(Whole, "large", ['model={"name": "small", "width": 4}'], presets)
    assert config.model == Small(width=4)
    with pytest.raises(ConfigError, match=r"model\.layers"):  # the old member's key does not go by in silence
        configs.load(Whole, "large", ["model.name=small"], presets)


def test_settings_are_frozen(presets: Path) -> None:
    config = configs.load(Whole, "tiny", [], presets)
    with pytest.raises(ValueError, match="frozen"):
        config.title = "other"  # type: ignore[misc]


def test_every_key_is_described_once() -> None:
    keys = configs.keys(Whole)
    assert len(keys) == len(set(keys))
    assert {"model.width", "model.layers", "model.name", "optim.betas", "options"} <= set(keys)
    for line in configs.describe(Whole).splitlines():
        assert line.split()[0] in keys
    assert "learning rate" in configs.describe(Whole) and "required" in configs.describe(Whole)


def test_help_says_which_member_of_a_union_has_a_key_and_what_a_preset_chose() -> None:
    text = configs.describe(Whole)
    assert re.search(r'model\.name +"small" \| "deep" +required ', text)
    assert re.search(r"model\.width +int +8 +\(small\) width", text)
    text = configs.describe(Whole, {"model": {"name": "deep", "layers": 7}, "flip": True})
    assert "model.width" not in text and re.search(r"model\.layers +int +7 +number of layers", text)
    assert re.search(r"flip +bool +true ", text) and re.search(r"title +str +required ", text)


PROGRAM = '''"""What it does."""
import sys
from pathlib import Path
from common import config
from common.errors import exit_with
from tests.common.test_config import Whole

def main():
    print(config.from_command_line(Whole, Path(sys.argv.pop(1)), "x.y").title)

exit_with(main)
'''


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["tiny", "title=new"], 0, "new", ""),
        (["--help"], 0, "What it does.", ""),
        (["tiny", "--print", "title=new"], 0, "title: new", ""),
        ([], 1, "", "error: no preset given"),
        (["tiny", "optim.lrr=1"], 1, "", "error: unknown key 'optim.lrr', did you mean 'optim.lr'?"),
        (["tiny", "optim.lr=1", "--quick"], 1, "", "error: '--quick' is not an override"),
    ],
)
def test_the_command_line(arguments: list[str], code: int, out: str, err: str, presets: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(presets), *arguments]
    done = subprocess.run(command, cwd=entry.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert out in done.stdout and err in done.stderr
    assert len(done.stderr.splitlines()) == (1 if err else 0), done.stderr


def test_printed_configuration_is_a_preset(presets: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(presets), "large", "--print", "optim.lr=2"]
    printed = subprocess.run(command, cwd=entry.REPOSITORY, capture_output=True, text=True, check=True).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    assert configs.load(Whole, str(tmp_path / "printed.yaml")) == configs.load(Whole, "large", ["optim.lr=2"], presets)
