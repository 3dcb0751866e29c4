"""Write a run's best weights where others read them: plain safetensors and a configuration, loadable without Ray.

    python -m training.export RUN OUTPUT

OUTPUT/config.yaml and OUTPUT/best/model.safetensors are all that `retrieval` needs of a run (run=OUTPUT).
OUTPUT/open_clip_model.safetensors is for open_clip.create_model(BACKBONE, pretrained=FILE); only of a model whose
frames go through CLIP as it is.
"""

import logging
import sys
import tempfile
from pathlib import Path

import safetensors.torch

from common import config as configs
from common import logs, storage
from common.errors import ConfigError, exit_with
from training import weights

log = logging.getLogger(__name__)
USAGE = "python -m training.export RUN OUTPUT"
OPEN_CLIP = "open_clip_model.safetensors"


def export(run: str, output: str) -> list[str]:
    """The URLs that were written. Raises RunError, StorageError."""
    run = storage.absolute(run.removesuffix("/config.yaml").rstrip("/"))
    output = storage.absolute(output)
    config, model = weights.load_run(run)
    written = [storage.join(output, "config.yaml"), weights.best_url(output)]
    with tempfile.TemporaryDirectory() as folder:
        best = Path(folder) / "model.safetensors"
        storage.download(weights.best_url(run), best)
        storage.publish(best, written[1])
        if config.model.image_size is not None:
            log.info("no %s: model.image_size is not the size that open_clip would build", OPEN_CLIP)
        elif model.is_plain_clip:
            path = Path(folder) / OPEN_CLIP
            safetensors.torch.save_file({k: v.contiguous() for k, v in model.clip.state_dict().items()}, path)
            written.append(storage.join(output, OPEN_CLIP))
            storage.publish(path, written[-1])
        else:
            log.info("no %s: %s changes what goes through CLIP's image tower", OPEN_CLIP, config.model.name)
    # Last, as it makes the folder a run's.
    storage.publish_bytes(configs.dump(config).encode(), written[0])
    return written


def main() -> int:
    arguments = [a.removeprefix("output=") for a in sys.argv[1:]]
    if "--help" in arguments or "-h" in arguments:
        print((__doc__ or "").strip())
        return 0
    if len(arguments) != 2:
        raise ConfigError(f"expected a run and an output, got {len(arguments)} arguments: {USAGE}")
    logs.setup()
    print("\n".join(export(*arguments)))
    return 0


if __name__ == "__main__":
    exit_with(main)
