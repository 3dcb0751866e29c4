"""The files that others' schedulers read: valid by the real schemas, and closed to strangers."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.entry import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
POD = {"ray.io/cluster": "text-video-retrieval"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for path in KUBERAY for document in documents(path) if document["kind"] == kind]


def closed(schema: Any) -> Any:
    """The schema without room for keys that it does not know: an API server drops them without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(part) for key, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not is_open:
        found["additionalProperties"] = False
    return found


def crd(shared: Path, kind: str) -> Any:
    path = shared / "kuberay" / f"ray.io_{kind.lower()}s.yaml.gz"
    versions = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object"}
    return closed(schema)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberays_own_schemas_take_the_manifests(shared: Path, kind: str):
    schema, manifests = crd(shared, kind), of_kind(kind)
    assert manifests
    for manifest in manifests:
        jsonschema.validate(manifest, schema)


def test_a_key_that_kuberay_does_not_know_is_found(shared: Path):
    (cluster,) = of_kind("RayCluster")
    cluster["spec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(cluster, crd(shared, "RayCluster"))


def test_a_kubernetes_cluster_is_closed_and_ends_gracefully():
    (cluster,) = of_kind("RayCluster")
    spec = cluster["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pods = [spec["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in spec["workerGroupSpecs"])]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"]
    for pod in pods[1:]:
        (variables,) = ({e["name"]: e["value"] for e in c["env"]} for c in pod["containers"])
        drain = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain < pod["terminationGracePeriodSeconds"]  # else the pod is killed while training saves
    (policy,) = of_kind("NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == POD
    assert all("from" in rule for rule in policy["spec"]["ingress"])  # a rule without one lets everybody in
    budgets = of_kind("PodDisruptionBudget")
    assert {b["spec"]["selector"]["matchLabels"]["ray.io/node-type"] for b in budgets} == {"head", "worker"}


def test_rays_own_schema_takes_the_launchers_file():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    (config,) = documents(CLUSTER / "aws.yaml")
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**config, "max_worker": 1}, schema)


def test_the_launchers_cluster_is_closed():
    (config,) = documents(CLUSTER / "aws.yaml")
    assert config["provider"]["use_internal_ips"] is True
    assert "RAY_AUTH_MODE=token" in " ".join(config["docker"]["run_options"])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    for node in config["available_node_types"].values():
        # With groups of its own, Ray does not make one that is open at port 22 to the world.
        assert node["node_config"]["SecurityGroupIds"] and node["node_config"]["IamInstanceProfile"]
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    spot = [n for n in config["available_node_types"].values() if n.get("labels") == {"market": "spot"}]
    assert spot and all(n["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for n in spot)
    assert any("cluster.spot_notice" in command for command in config["worker_start_ray_commands"])


def test_no_file_of_the_cluster_holds_a_key():
    found = [path for path in CLUSTER.rglob("*") if path.suffix in (".yaml", ".sh") or path.name == "Dockerfile"]
    assert len(found) > 5
    for path in found:
        assert not re.search(
            r"AKIA[A-Z0-9]{16}|PRIVATE KEY|(secret|password|token)\s*[:=]\s*[\w/+]{20,}", path.read_text()
        )


def test_image_and_make_install_by_the_same_script():
    for file in ("Makefile", "cluster/Dockerfile"):
        assert "sh cluster/install.sh" in (REPOSITORY / file).read_text(), file
