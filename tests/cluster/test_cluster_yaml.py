"""The cluster files: Ray takes them, they open nothing, and the recipes in their comments fit them."""

from __future__ import annotations

import copy
import functools
import json
import operator
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.recipe import load_config

ROOT = Path(__file__).parents[2]
LAUNCHER = ["cluster.yaml", "cluster.local.yaml"]
KUBERAY = ["deploy/kuberay.yaml", "deploy/kuberay_job.yaml"]
Config = dict[str, Any]


def read(name: str) -> Config:
    return yaml.safe_load((ROOT / name).read_text())


def cluster_of(name: str) -> Config:
    """The RayCluster of a KubeRay manifest, with what the API server adds."""
    manifest = read(name)
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return {"metadata": {"name": manifest["metadata"]["name"], "namespace": "default"}, "spec": spec}


def launch(config: Config) -> Config:
    """What Ray's launcher makes of a file before it calls a provider."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def autoscale(cluster: Config) -> Config:
    """What KubeRay's autoscaler makes of a RayCluster; validates it by the same schema."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    return _derive_autoscaling_config_from_ray_cr(copy.deepcopy(cluster))


@pytest.mark.ray
@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_takes_it(name: str) -> None:
    launch(read(name))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("idle_timeout_minuts", 10),
        ("available_node_types.trainer.resources.trainer", 0.5),
        ("head_node_type", "boss"),
        ("available_node_types.rollouts.min_workers", 99),
    ],
)
def test_rays_launcher_refuses_a_broken_copy(where: str, value: Any) -> None:
    from jsonschema import ValidationError

    config = read("cluster.yaml")
    *path, key = where.split(".")
    functools.reduce(operator.getitem, path, config)[key] = value
    with pytest.raises((ValidationError, ValueError)):
        launch(config)


@pytest.mark.ray
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberays_autoscaler_takes_it(name: str) -> None:
    types = autoscale(cluster_of(name))["available_node_types"]
    assert types["headgroup"]["resources"] == {"CPU": 0, "head": 100, "memory": 8 * 2**30}
    assert types["trainer"]["resources"] == {"CPU": 4, "GPU": 1, "trainer": 100, "memory": 14 * 2**30}
    assert types["rollouts"]["resources"] == {"CPU": 4, "GPU": 1, "rollouts": 100, "memory": 14 * 2**30}
    assert (types["rollouts"]["min_workers"], types["rollouts"]["max_workers"]) == (0, 4)


@pytest.mark.ray
@pytest.mark.parametrize(("key", "value"), [("resources", "trainer: 1"), ("minReplicas", 99)])
def test_kuberays_autoscaler_refuses_a_broken_copy(key: str, value: Any) -> None:
    cluster = cluster_of("deploy/kuberay.yaml")
    trainer = cluster["spec"]["workerGroupSpecs"][0]
    (trainer["rayStartParams"] if key == "resources" else trainer)[key] = value
    with pytest.raises((KeyError, ValueError)):
        autoscale(cluster)


def dangers(config: Config) -> list[str]:
    """What a launcher's file would open, or leave to chance."""
    opened = []
    starts = [command for where in ("head", "worker") for command in config[f"{where}_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    if len(starts) != 2 or any("RAY_AUTH_MODE=token ray start" not in command for command in starts):
        opened.append("no token")
    if "--dashboard-host=127.0.0.1" not in starts[0].split():
        opened.append("dashboard")
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        opened.append("no token mounted")
    nodes = [each["node_config"] for each in config.get("available_node_types", {}).values()]
    if "security_group" in config["provider"] or any(not node.get("SecurityGroupIds") for node in nodes):
        opened.append("ssh from anywhere")  # which Ray admits to a group that it makes
    pip = [command for command in config["setup_commands"] if "pip install" in command]
    pip += [command for command in config.get("head_setup_commands", []) if "pip" in command]
    if not pip or any("-c ~/rlr_ray_project/constraints.txt" not in command for command in pip):
        opened.append("versions")
    return opened


@pytest.mark.parametrize("name", LAUNCHER)
def test_it_opens_nothing_and_pins_versions(name: str) -> None:
    assert dangers(read(name)) == []


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_file_that_opens_something_is_noticed(name: str) -> None:
    text = (ROOT / name).read_text()
    for old, new, danger in [
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard"),
        ("--dashboard-host=127.0.0.1", "", "dashboard"),
        ("RAY_AUTH_MODE=token ray start --address", "ray start --address", "no token"),
        ("RAY_AUTH_MODE=token ray start --head", "ray start --head", "no token"),
        ("  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "no token mounted"),
        ("pip install -c ~/rlr_ray_project/constraints.txt torch", "pip install torch", "versions"),
    ]:
        broken = text.replace(old, new)
        assert broken != text
        assert dangers(yaml.safe_load(broken)) == [danger]
    config = read(name)
    config["provider"]["security_group"] = {"GroupName": "rlr-ray"}
    assert dangers(config) == ["ssh from anywhere"]


def test_on_aws_the_group_that_opens_ssh_is_the_users_to_set() -> None:
    """No node has one of Ray's making, and what stands there is no group: AWS refuses it before a node starts."""
    config = read("cluster.yaml")
    groups = [each["node_config"]["SecurityGroupIds"] for each in config["available_node_types"].values()]
    assert groups == [["sg-00000000000000000"]] * 3
    del config["available_node_types"]["rollouts"]["node_config"]["SecurityGroupIds"]
    assert dangers(config) == ["ssh from anywhere"]


@pytest.mark.ray
def test_rays_defaults_are_as_open_as_we_say() -> None:
    """Why the files name these flags: without them Ray 2.60 opens the dashboard on AWS, and always Ray's client."""
    from ray._private.parameter import RayParams
    from ray.autoscaler._private.providers import _get_default_config

    assert "--dashboard-host=0.0.0.0" in _get_default_config({"type": "aws"})["head_start_ray_commands"][1]
    with pytest.raises(ValueError, match="between 1024 and 65535"):
        RayParams(ray_client_server_port=0)  # there is no port that means none


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_it_mounts_is_there_and_is_the_package(name: str) -> None:
    mounts = read(name)["file_mounts"]
    files = {remote: local for remote, local in mounts.items() if remote != "~/.ray/auth_token"}
    assert all((ROOT / local).exists() for local in files.values())
    package = {remote.removeprefix("~/rlr_ray_project/") for remote in files} - {"~/configs"}
    assert package == {"rlr_ray", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert (ROOT / mounts["~/configs"] / "digits.yaml").is_file()
    assert (ROOT / "train.py").is_file()


def test_both_launcher_files_set_nodes_up_alike() -> None:
    cloud, local = map(read, LAUNCHER)
    assert cloud["file_mounts"] == local["file_mounts"]
    assert [command for command in cloud["setup_commands"] if "apt-get" not in command] == local["setup_commands"]


def test_all_nodes_of_aws_start_from_one_image_and_only_rollouts_on_spot() -> None:
    types = read("cluster.yaml")["available_node_types"]
    assert len({each["node_config"]["ImageId"] for each in types.values()}) == 1
    assert [name for name, each in types.items() if "InstanceMarketOptions" in each["node_config"]] == ["rollouts"]
    assert {name: (each.get("min_workers", 0), each["max_workers"]) for name, each in types.items()} == {
        "head": (0, 0),
        "trainer": (0, 2),
        "rollouts": (0, 4),
    }


def resources_of(name: str) -> set[str]:
    """The resources that its nodes have, by Ray's names."""
    if name in KUBERAY:
        return set().union(
            *(each["resources"] for each in autoscale(cluster_of(name))["available_node_types"].values())
        )
    config = read(name)
    if "available_node_types" in config:
        return set().union(*(each["resources"] for each in config["available_node_types"].values()))
    starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    return {"CPU", "GPU"}.union(*(json.loads(text) for text in re.findall(r"--resources='(\{.*?\})'", starts)))


def recipes_in(name: str) -> list[Config]:
    """The keys of a recipe that a file's comment shows."""
    text = (ROOT / name).read_text()
    return [
        yaml.safe_load(re.sub(r"(?m)^#     ", "", block))
        for block in re.findall(r"(?m)(?:^#     output_dir: .*\n)?^#     cluster:\n(?:#       .*\n)+", text)
    ]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "count"), [("cluster.yaml", 2), ("cluster.local.yaml", 1), ("deploy/kuberay.yaml", 1)]
)
def test_its_recipes_ask_for_resources_that_its_nodes_have(name: str, count: int) -> None:
    recipes = recipes_in(name)
    assert len(recipes) == count
    for recipe in recipes:
        cluster = ClusterConfig.model_validate(recipe["cluster"])
        assert cluster.worker.resources and cluster.rollouts.resources
        assert {*cluster.worker.demand, *cluster.rollouts.demand} <= resources_of(name)
        if cluster.worker.resources.keys() != {"head"}:  # then the driver and the workers need one disk
            assert recipe["output_dir"].startswith("/mnt/")


@pytest.mark.ray
def test_the_jobs_command_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(read("deploy/kuberay_job.yaml")["spec"]["entrypoint"])
    assert words[:7] == ["cd", "~/rlr_ray", "&&", "python", "train.py", "--config", "configs/digits.yaml"]
    assert "--resume-or-start" in words
    config = load_config(words[6], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    assert config.cluster != "none"
    assert {*config.cluster.worker.demand, *config.cluster.rollouts.demand} <= resources_of("deploy/kuberay.yaml")


def test_the_job_has_the_cluster_of_the_other_manifest() -> None:
    cluster, job = (cluster_of(name)["spec"] for name in KUBERAY)
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert job["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"
    assert cluster == job


def test_kuberay_asks_for_a_token_one_image_and_spot_nodes_for_rollouts_alone() -> None:
    spec = cluster_of("deploy/kuberay.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"  # not one that the world reaches
    trainer, rollouts = spec["workerGroupSpecs"]
    assert trainer["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert rollouts["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert any(each.get("value") == "spot" for each in rollouts["template"]["spec"]["tolerations"])
    groups = [spec["headGroupSpec"], trainer, rollouts]
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    mounted = [group["template"]["spec"]["containers"][0].get("volumeMounts", []) for group in groups]
    assert [bool(mounts) for mounts in mounted] == [True, True, False]  # rollouts write no files
    claim = spec["headGroupSpec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == read("deploy/volume.yaml")["metadata"]["name"]


def test_every_node_has_the_pinned_ray() -> None:
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text()))
    assert {"torch", "ray", "diffusers", "boto3", "botocore", "s3transfer", "jmespath", "aiohttp"} <= pins.keys()
    assert cluster_of("deploy/kuberay.yaml")["spec"]["rayVersion"] == pins["ray"]
    assert f"FROM rayproject/ray:{pins['ray']}-py311-gpu" in (ROOT / "deploy" / "Dockerfile").read_text()
