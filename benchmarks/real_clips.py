"""Annotations of two small sets of real clips as JSONL for `datasets_prep.build custom`.

    python -m benchmarks.real_clips emoji|web_video DATA_FOLDER OUT.jsonl

DATA_FOLDER holds SET/captions.json, a list of records with `file` and texts.

emoji: animated emoji in two drawing styles; each gets one caption from its label, one from its keywords. The group is
the label's family: labels that differ only in person, skin, hair or family words share one, and so do the two drawing
styles of an emoji, so none crosses splits. web_video: web clips with one machine-made caption each; the group is
the video a clip was cut from.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from common.errors import ConfigError, exit_with

# Words that change who is shown, not what: "woman running" and "man running" are one family.
PEOPLE = {
    *("man", "men", "woman", "women", "person", "people", "boy", "girl", "boys", "girls", "adult", "older", "child"),
    *("mr", "mrs", "mx", "santa", "claus", "prince", "princess", "king", "queen", "male", "female"),
    *("merman", "mermaid", "merperson", "father", "mother", "old", "young", "with", "and", "s", "in", "a", "the"),
}


def family(label: str) -> str:
    """The words of a label that say what happens; a label of people alone is the family "people"."""
    if label.lower().startswith(("family", "couple", "kiss")):
        return "family"
    words = [w for w in re.findall(r"[a-z0-9]+", label.lower().split(":")[0]) if w not in PEOPLE]
    return " ".join(sorted(words)) or "people"


def emoji(record: dict[str, Any]) -> dict[str, Any]:
    keywords = [", ".join(record["keywords"])] if record["keywords"] else []
    return {"video": record["file"], "captions": [record["label"], *keywords], "group": family(record["label"])}


def web_video(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "video": record["file"],
        "captions": record["captions"],
        "group": Path(record["file"]).stem.rsplit("_", 1)[0],
    }


SETS = {"emoji": emoji, "web_video": web_video}


def main() -> int:
    if len(sys.argv) != 4 or sys.argv[1] not in SETS:
        raise ConfigError(f"three arguments wanted: {'|'.join(SETS)} DATA_FOLDER OUT.jsonl")
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    records = [SETS[name](r) for r in json.loads((folder / name / "captions.json").read_text())]
    out.write_text("".join(json.dumps(r) + "\n" for r in records))
    print(f"{len(records)} clips in {len({r['group'] for r in records})} groups: {out}")
    return 0


if __name__ == "__main__":
    exit_with(main)
