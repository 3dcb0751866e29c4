"""Drains this Ray node when EC2 gives notice that its spot instance ends: training saves before it does.

    python -m cluster.spot_notice        # on every spot worker, in the background; cluster/aws.yaml starts it

EC2 tells an instance two minutes ahead, through its metadata service (IMDSv2), and nothing in Ray asks there. It ends
once the node is being drained.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from common import logs
from common.errors import RunError, exit_with

METADATA = "http://169.254.169.254"
PERIOD_S = 5.0
DEADLINE_S = 110  # of the two minutes, those that are left after a look

log = logging.getLogger(__name__)


def has_notice(metadata: str = METADATA) -> bool:
    """True once the instance's end is decided. Raises OSError if the metadata service does not answer."""
    ask = urllib.request.Request(f"{metadata}/latest/api/token", method="PUT")
    ask.add_header("X-aws-ec2-metadata-token-ttl-seconds", "60")
    with urllib.request.urlopen(ask, timeout=2) as answer:
        token = answer.read().decode()
    look = urllib.request.Request(f"{metadata}/latest/meta-data/spot/instance-action")
    look.add_header("X-aws-ec2-metadata-token", token)
    try:
        with urllib.request.urlopen(look, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is decided
            return False
        raise


def drain(node_id: str | None, deadline_s: int = DEADLINE_S, env: Mapping[str, str] | None = None) -> None:
    """Tell the cluster that a node is taken away. Raises RunError if it does not accept that.

    Args:
        node_id: None = the node of this machine.
        env: variables that name the cluster, if those of this process do not.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its machine is taken away"]
    command += ["--deadline-remaining-seconds", str(deadline_s), *(["--node-id", node_id] if node_id else [])]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RunError(f"the node was not drained: {lines[-1] if lines else 'no reason given'}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.spot_notice", description=__doc__)
    parser.add_argument("--metadata", default=METADATA, help="address of the metadata service")
    parser.add_argument("--node-id", help="drain this node; default: the one of this machine")
    options = parser.parse_args()
    logs.setup()
    while True:
        try:
            if has_notice(options.metadata):
                break
        except OSError as error:
            log.warning("the metadata service does not answer (%s); asking again", error)
        time.sleep(PERIOD_S)
    log.warning("this spot instance ends in two minutes: draining its node")
    drain(options.node_id)
    return 0


if __name__ == "__main__":
    exit_with(main)
