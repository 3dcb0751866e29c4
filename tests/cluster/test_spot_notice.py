"""cluster.spot_notice against a stand-in for EC2's metadata service, which only an EC2 instance has."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import spot_notice
from cluster.local import start_ray
from tests import entry
from tests.conftest import RAY_FOLDER
from tests.faults import wait_until

TOKEN = "a-session-token"


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: a token by PUT, without which nothing else answers; the notice is 404 until there is one."""

    notice = False

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if wanted else 400, TOKEN)

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != TOKEN:
            self._answer(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and type(self).notice:
            self._answer(200, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
        else:
            self._answer(404)

    def _answer(self, code: int, body: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Metadata.notice = False
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_notice_is_seen_once_it_is_there(metadata: str):
    assert not spot_notice.has_notice(metadata)
    Metadata.notice = True
    assert spot_notice.has_notice(metadata)


def test_a_service_that_does_not_answer_is_no_notice():
    with pytest.raises(OSError):
        spot_notice.has_notice("http://127.0.0.1:9")


@pytest.mark.slow
def test_the_node_of_the_instance_leaves_the_cluster(metadata: str):
    """An idle node that is drained ends at once; what a busy one does is in tests/training/test_faults.py."""
    nodes = start_ray(RAY_FOLDER / "spot", num_nodes=2, cpus_per_node=1)
    try:
        Metadata.notice = True
        arguments = ("--metadata", metadata, "--node-id", nodes.nodes[1])
        done = entry.run("cluster.spot_notice", *arguments, env=nodes.env)
        assert done.code == 0, done.err
        assert "draining its node" in done.out + done.err
        wait_until(lambda: nodes.alive() == [nodes.nodes[0]], timeout_s=60)
    finally:
        nodes.stop()
