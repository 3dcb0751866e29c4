"""Configuration: a frozen pydantic schema, a YAML preset, and `key.path=value` overrides.

`apply` is the one way in which a value changes: the command line, Ray Tune and the tests all use it. The
YAML that `dump` writes is itself a preset.
"""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common import storage
from common.errors import ConfigError

TAG = "name"  # the key that tells the members of a union apart


class Settings(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


S = TypeVar("S", bound=Settings)


def load(schema: type[S], preset: str, overrides: Sequence[str] = (), presets: Path | None = None) -> S:
    """Read a preset by name (in the folder `presets`), path or URL and apply `key.path=value` overrides.

    Raises:
        ConfigError: unknown preset, bad YAML, unknown key or bad value; one sentence that says which.
    """
    values = _read_preset(preset, presets)
    for key, value in parse_overrides(overrides).items():
        _set(values, key, value)
    return validate(schema, values)


def apply(config: S, overrides: Mapping[str, Any]) -> S:
    """`config` with each dotted key set to its value, validated again."""
    values = config.model_dump(mode="json")
    for key, value in overrides.items():
        _set(values, key, value)
    return validate(type(config), values)


def validate(schema: type[S], values: Mapping[str, Any]) -> S:
    """Check plain data against a schema. Raises ConfigError naming each wrong key."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(schema, e) for e in error.errors())) from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=3e-5", "name=x"]` to a dict; a value is JSON if it parses as JSON, else a string."""
    parsed = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"{argument!r} is not an override: write key.path=value (see --help)")
        try:
            parsed[key] = json.loads(text)
        except ValueError:
            parsed[key] = text
    return parsed


def dump(config: Settings) -> str:
    """The resolved configuration as YAML; a preset that loads to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def refuse_relative_in_job(config: Settings, *paths: str) -> None:
    """Raise ConfigError if one of these dotted keys holds a relative path and this process is a submitted job's."""
    if "_ray_pkg_" in str(Path.cwd()):  # how Ray names the unpacked working_dir
        refuse_relative(config, *paths)


def refuse_relative(config: Settings, *paths: str) -> None:
    """Raise ConfigError if one of these dotted keys holds a relative path.

    A job runs in a copy of the code that is deleted with the session: what it writes there is lost, and what the
    submitter meant is not there.
    """
    for path in paths:
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        local = str(value).removeprefix("sqlite:///")
        if value is not None and "://" not in local and not Path(local).expanduser().is_absolute():
            raise ConfigError(
                f"{path}={value} is relative, but a submitted job runs in a temporary folder: give a full path or a URL"
            )


def from_command_line(schema: type[S], presets: Path, module: str, argv: Sequence[str] | None = None) -> S:
    """The configuration that `python -m MODULE PRESET [key.path=value ...]` asks for.

    `--help` lists the presets and every key, `PRESET --help` those that it has; `--print` shows the resolved
    configuration. Both exit 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = f"python -m {module} PRESET [key.path=value ...] [--print] [--help]"
    if "--help" in arguments or "-h" in arguments:
        doc = (sys.modules["__main__"].__doc__ or "").strip()
        names = ", ".join(preset_names(presets))
        preset = next((a for a in arguments if "=" not in a and not a.startswith("-")), None)
        values = _read_preset(preset, presets) if preset else {}
        which = f"PRESET: {names}, or the path or URL of a YAML file; PRESET --help shows the keys that it has"
        print(f"{usage}\n\n{doc}\n\n{which}\n\n{describe(schema, values)}")
        sys.exit(0)
    show = "--print" in arguments
    arguments = [a for a in arguments if a != "--print"]
    if not arguments:
        raise ConfigError(f"no preset given: {usage}; presets: {', '.join(preset_names(presets))}")
    config = load(schema, arguments[0], arguments[1:], presets)
    if show:
        print(dump(config), end="")
        sys.exit(0)
    return config


def preset_names(presets: Path) -> list[str]:
    return sorted(p.stem for p in presets.glob("*.yaml"))


def describe(schema: type[Settings], values: Mapping[str, Any] | None = None) -> str:
    """One line per key: path, type, default, and its sentence.

    Args:
        values: of a preset: they are shown as the defaults, and of a union only the member that they name.
    """
    lines = []
    for row in _rows(schema, "", values or {}):
        only = f"({', '.join(row.members)}) " if row.members else ""
        lines.append(f"  {row.key:<32} {_type_name(row.type):<24} {row.default:<20} {only}{row.description}")
    return "\n".join(lines)


def _read_preset(preset: str, presets: Path | None) -> dict[str, Any]:
    is_name = "/" not in preset and not preset.endswith((".yaml", ".yml"))
    if is_name:
        if presets is None or not (presets / f"{preset}.yaml").is_file():
            known = preset_names(presets) if presets else []
            raise ConfigError(f"unknown preset {preset!r}{_near(preset, known)}; known: {', '.join(known) or 'none'}")
        data = (presets / f"{preset}.yaml").read_bytes()
    else:
        data = storage.read(preset)
    try:
        values = yaml.safe_load(data.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"preset {preset} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"preset {preset} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"preset {preset} holds no keys: expected 'key: value' lines")
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents, 1):
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {'.'.join(parents[:depth])} is {child!r} and has no keys below it")
        node = child
    node[last] = value


def _sections(annotation: Any) -> list[type[Settings]]:
    """The Settings classes that an annotation allows (through Optional, Union and Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if get_origin(annotation) in (list, dict, tuple):
        return []
    return [s for a in get_args(annotation) for s in _sections(a)]


class _Row(NamedTuple):
    """A key as `describe` shows it; `members`: those of a union that have it, if not all do."""

    key: str
    type: Any
    default: str
    description: str
    members: tuple[str, ...] = ()


def _rows(schema: type[Settings], prefix: str, values: Mapping[str, Any]) -> list[_Row]:
    """Every leaf of a schema; a key that is not the same in all members of a union comes once for each kind of it."""
    rows: list[_Row] = []
    for name, field in schema.model_fields.items():
        given = values.get(name)
        sections = _sections(field.annotation)
        if not sections:
            if field.is_required() and name not in values:
                text = "required"
            else:
                shown = given if name in values else field.get_default(call_default_factory=True)
                text = json.dumps(_plain(shown))
            rows.append(_Row(prefix + name, field.annotation, text, field.description or ""))
            continue
        inner: Mapping[str, Any] = given if isinstance(given, dict) else {}
        members = {_tag(section): _rows(section, f"{prefix}{name}.", inner) for section in sections}
        if inner.get(TAG) in members:
            members = {inner[TAG]: members[inner[TAG]]}
        elif len(members) > 1:
            rows.append(_Row(f"{prefix}{name}.{TAG}", Literal[tuple(members)], "required", "which of them"))
            members = {tag: [r for r in found if r.key != f"{prefix}{name}.{TAG}"] for tag, found in members.items()}
        having: dict[_Row, list[str]] = {}
        for tag, found in members.items():
            for row in found:
                having.setdefault(row, []).append(tag)
        rows += [r._replace(members=tuple(t) if len(t) < len(members) else r.members) for r, t in having.items()]
    return rows


def _tag(section: type[Settings]) -> str:
    field = section.model_fields.get(TAG)
    return str(field.default) if field else section.__name__


def keys(schema: type[Settings]) -> list[str]:
    """Every dotted key of a schema."""
    return list(dict.fromkeys(row.key for row in _rows(schema, "", {})))


def _explain(schema: type[Settings], error: Any) -> str:
    path = _path(schema, error["loc"])
    if error["type"] == "extra_forbidden":
        # A union's members have different keys: suggest from all of them, and name the section.
        return f"unknown key {path!r}{_near(path, keys(schema))} (--help lists every key)"
    if error["type"] == "missing":
        return f"{path} is required: give {path}=..."
    if error["type"] == "union_tag_not_found":
        return f"{path}.name is required beside the other keys of {path}: give {path}.name=..."
    if error["type"] == "union_tag_invalid":
        return f"{path}.name: {error['ctx']['tag']!r} is not one of {error['ctx']['expected_tags']}"
    reason = error["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if error["type"] == "value_error":  # a validator of ours: its sentence names keys and values
        return f"{path}: {reason}" if path else reason
    return f"{path}={json.dumps(_plain(error['input']))}: {reason}"


def _path(schema: type[Settings], loc: tuple[Any, ...]) -> str:
    """The dotted key of a pydantic location, without the tags that name a union's member."""
    known = set(keys(schema))
    parts: list[str] = []
    for item in loc:
        candidate = ".".join([*parts, str(item)])
        is_known = candidate in known or any(k.startswith(candidate + ".") for k in known)
        inside_leaf = ".".join(parts) in known
        if is_known or inside_leaf or item is loc[-1]:
            parts.append(str(item))
    return ".".join(parts)


def _near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # a right name in a wrong place: compare the last part only
        close = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f", did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    origin = get_origin(annotation)
    if origin in (list, tuple, dict):
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in get_args(annotation) if a is not Ellipsis)}]"
    if get_args(annotation):
        return " | ".join(
            _type_name(a) if isinstance(a, type) or get_args(a) else json.dumps(a) for a in get_args(annotation)
        )
    return str(annotation)
