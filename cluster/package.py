"""What a submitted job takes along: the git-tracked files, files named beside them, and its checked configuration."""

import difflib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.config import COMMANDS, OF_A_RUN, OF_URLS
from common import config as configs
from common.config import Settings
from common.errors import ConfigError, NotFoundError, StorageError
from training.config import PRESETS as TRAINING_PRESETS
from training.config import run_lines
from tuning.config import StudyConfig
from tuning.space import resolve

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).parents[1]
FROZEN = "job.yaml"  # the resolved configuration, at the top of what travels
MAX_BYTES = 512 * 2**20  # Ray's own limit of a working_dir


class Command(NamedTuple):
    """A command as it was given, and its configuration if it is one of this project's that have one."""

    words: tuple[str, ...]
    config: Settings | None

    @property
    def frozen(self) -> tuple[str, ...]:
        """The command that runs on the cluster: with the configuration that was checked here, whatever changes."""
        return self.words if self.config is None else (*self.words[:3], FROZEN)


def check(words: Sequence[str], tracked: Sequence[str]) -> Command:
    """Refuse a command whose module, preset or configuration is wrong, or would not travel.

    Args:
        tracked: the files that travel, relative to the repository.

    Raises:
        ConfigError: in one sentence. A command that is none of this project's passes as it is.
    """
    plain = Command(tuple(words), None)
    if len(words) < 3 or not re.fullmatch(r"python[\d.]*", words[0]) or words[1] != "-m":
        return plain
    module, arguments = words[2], words[3:]
    modules = {path.removesuffix(".py").replace("/", "."): path for path in tracked if path.endswith(".py")}
    if module not in modules and any(name.startswith(module.split(".")[0] + ".") for name in modules):
        close = difflib.get_close_matches(module, modules, n=1)
        raise ConfigError(
            f"there is no module {module!r} among the git-tracked files"
            + (f", did you mean {close[0]!r}?" if close else ": git add it, or correct its name")
        )
    if module in OF_A_RUN or module in OF_URLS:
        _check_words(module, arguments)
    if module not in COMMANDS:
        return plain
    if FROZEN in tracked:
        raise ConfigError(f"{FROZEN} at the top of the repository is the name of what is submitted: rename that file")
    if not arguments:
        raise ConfigError(f"no preset given: python -m {module} PRESET [key.path=value ...]")
    schema, presets, paths = COMMANDS[module]
    config = configs.load(schema, arguments[0], arguments[1:], presets)
    if isinstance(config, StudyConfig):
        resolve(config)
        _check_travels(config.base, tracked)
    configs.refuse_relative(config, *paths)
    return Command(tuple(words), config)


def _check_words(module: str, arguments: Sequence[str]) -> None:
    """Refuse relative paths, and keys that the configuration of the run does not have."""
    given = [word.removeprefix("output=") for word in arguments]
    for word in given:
        if "=" not in word and not word.startswith("-") and "://" not in word and not Path(word).is_absolute():
            raise ConfigError(f"{word} is relative, but a job runs in a temporary folder: give a full path or a URL")
    if module not in OF_A_RUN:
        return
    schema, paths = OF_A_RUN[module]
    for line in run_lines(arguments):
        if not line or line[0].startswith("-"):
            raise ConfigError(f"no run given: python -m {module} RUN [key.path=value ...]")
        try:
            config = configs.load(schema, line[0], line[1:])
        except NotFoundError:
            raise
        except StorageError as error:  # the nodes may have a role that this machine has not
            log.warning("not checked here: %s", error)
            continue
        configs.refuse_relative(config, *paths)


def _check_travels(base: str, tracked: Sequence[str]) -> None:
    """A study reads its base preset on the cluster."""
    if "://" in base or Path(base).is_absolute():  # the user's word that the cluster can read it
        return
    is_path = "/" in base or base.endswith((".yaml", ".yml"))
    path = Path(base).absolute() if is_path else TRAINING_PRESETS / f"{base}.yaml"
    if str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path) not in tracked:
        raise ConfigError(f"preset {path.name} is not tracked by git, so it would not reach the cluster: git add it")


def tracked_files() -> list[str]:
    """The repository's git-tracked files that exist, relative to it. Raises ConfigError outside a git checkout."""
    files = [name for name in _git("ls-files", "-z", "--cached") if (REPOSITORY / name).is_file()]
    if not files:
        raise ConfigError(f"git tracks no file in {REPOSITORY}: git add the files that the job needs")
    return files


def untracked_files() -> list[str]:
    return _git("ls-files", "-z", "--others", "--exclude-standard")


def named_files(paths: Sequence[str]) -> list[str]:
    """The files of `paths`, which are files and folders of the repository, relative to it. Raises ConfigError."""
    files = []
    for path in paths:
        place = (REPOSITORY / path).resolve()
        if not place.is_relative_to(REPOSITORY) or not place.exists():
            raise ConfigError(f"--with {path}: there is no such file or folder in {REPOSITORY}")
        found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        files += [str(p.relative_to(REPOSITORY)) for p in found]
    return files


def pack(command: Command, files: Sequence[str], folder: Path) -> int:
    """Copy `files` and the frozen configuration into an empty folder; returns their bytes.

    Raises:
        ConfigError: they are more than a cluster takes; names the largest.
    """
    sizes = {name: (REPOSITORY / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        shown = ", ".join(f"{name} ({sizes[name]:,} bytes)" for name in largest)
        raise ConfigError(
            f"{len(files)} files of {total:,} bytes would travel, the limit is {MAX_BYTES:,}: put data into storage, "
            f"and take it out of git or of --with; the largest: {shown}"
        )
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, target)
    if command.config is not None:
        (folder / FROZEN).write_text(configs.dump(command.config))
    return total


def _git(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise ConfigError(
            f"cannot list the repository's files ({reason.splitlines()[0]}): submit from a git checkout, "
            "or use ray job submit --working-dir ."
        ) from None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
