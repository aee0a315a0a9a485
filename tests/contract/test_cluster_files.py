"""cluster.yaml, jobs/kuberay.yaml and Dockerfile are what their readers take, let nobody in, and name what is there."""

import copy
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import vaemo

ROOT = Path(__file__).parents[2]
LAUNCHER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
KUBERAY = yaml.safe_load((ROOT / "jobs" / "kuberay.yaml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "jobs" / "constraints.txt").read_text(), re.M))

SECRET = re.compile(r"AKIA\w{16}|\b[0-9a-fA-F]{32,}\b|(?i:secret|password|access_key)[\w-]*\s*[:=]\s*\S")


DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def of_workers(types):
    return {name: kind for name, kind in types.items() if name != "head"}


def launcher_faults(config):
    """What is wrong with a file for Ray's cluster launcher, beyond what Ray itself refuses with an exception."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))
    faults, types = [], config["available_node_types"]
    if types[config["head_node_type"]]["resources"].get("CPU") != 0:
        faults.append("work may run on the head")
    for name, kind in of_workers(types).items():
        if kind["min_workers"] != 0:
            faults.append(f"{name} workers stay when there is no work")
        if kind["node_config"].get("InstanceMarketOptions") != {"MarketType": "spot"}:
            faults.append(f"{name} workers are no spot instances")
    for side in ("head", "worker"):
        start = " ".join(config[f"{side}_start_ray_commands"])
        if "RAY_AUTH_MODE=token" not in start:
            faults.append(f"the {side} starts without a token")
    if "--dashboard-host=127.0.0.1" not in " ".join(config["head_start_ray_commands"]):
        faults.append("the dashboard listens to everyone")
    ports = [rule.get("ToPort") for rule in config["provider"]["security_group"].get("IpPermissions", [])]
    if any(port != 22 for port in ports):
        faults.append("more than SSH is let in")
    if "~/.ray/auth_token" not in config["file_mounts"].values():
        faults.append("the token does not come to the nodes")
    setup = " ".join(config["setup_commands"] + config["head_setup_commands"])
    if setup.count("pip install") != setup.count("-c ~/vaemo/jobs/constraints.txt"):
        faults.append("something is installed without its pin")
    if not {".venv", ".git"} <= set(config["rsync_exclude"]):
        faults.append("the virtual environment travels to every node")
    return faults + [f"a secret: {found.group()}" for found in SECRET.finditer(yaml.safe_dump(config))]


def kuberay_faults(job):
    """What is wrong with a RayJob: keys that its CRD requires, and what we promise of it."""
    faults = []
    if (job.get("apiVersion"), job.get("kind")) != ("ray.io/v1", "RayJob") or not job.get("metadata", {}).get("name"):
        faults.append("not a RayJob with a name")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    script = re.match(r"python /home/ray/vaemo/(jobs/\w+\.py) ", spec["entrypoint"])
    if not script or not (ROOT / script.group(1)).exists():
        faults.append("the entrypoint is no job of ours")
    if not spec.get("shutdownAfterJobFinishes"):
        faults.append("the cluster stays when the job has ended")
    if cluster.get("rayVersion") != PINS["ray"]:
        faults.append("rayVersion is not the pinned one")
    if cluster.get("authOptions") != {"mode": "token"}:
        faults.append("no token is asked for")
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        faults.append("the autoscaler does not tell what it may add")
    head = cluster["headGroupSpec"]
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        faults.append("the head can be reached from outside")
    if head["rayStartParams"].get("num-cpus") != "0":
        faults.append("work may run on the head")
    for group in cluster["workerGroupSpecs"]:
        if {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} - group.keys():
            faults.append("a worker group lacks what its CRD requires")
        elif group["minReplicas"] != 0 or group["maxReplicas"] < 1:
            faults.append(f"{group['groupName']} does not scale from 0")
    for group in (head, *cluster["workerGroupSpecs"]):
        for container in group.get("template", {}).get("spec", {}).get("containers", [{}]):
            if {"name", "image", "resources"} - container.keys():
                faults.append("a container lacks name, image or resources")
            elif f" --tag {container['image']} " not in DOCKERFILE:
                faults.append(f"the Dockerfile builds no {container['image']}")
    return faults + [f"a secret: {found.group()}" for found in SECRET.finditer(yaml.safe_dump(job))]


def broken(config, path, value):
    """A copy in which what stands at a path is another value, or gone where that is None."""
    changed = copy.deepcopy(config)
    *parents, last = path
    place = changed
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


def test_the_launchers_file_is_sound():
    assert launcher_faults(LAUNCHER) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("available_node_types", "head", "resources"), {"CPU": 4}, "work may run on the head"),
        (("available_node_types", "cpu", "min_workers"), 1, "cpu workers stay"),
        (("available_node_types", "gpu", "node_config", "InstanceMarketOptions"), None, "gpu workers are no spot"),
        (("worker_start_ray_commands",), ["ray start --address=$RAY_HEAD_IP:6379"], "worker starts without a token"),
        (("head_start_ray_commands",), ["RAY_AUTH_MODE=token ray start --dashboard-host=0.0.0.0"], "listens to every"),
        (("provider", "security_group", "IpPermissions"), [{"ToPort": 8265}], "more than SSH"),
        (("file_mounts", "/home/ubuntu/.ray/auth_token"), None, "token does not come"),
        (("setup_commands",), ["pip install ray"], "without its pin"),
        (("rsync_exclude",), [".git"], "virtual environment"),
        (("provider", "secret_key"), "x7", "a secret: secret_key"),
        (("cluster_name",), "AKIAIOSFODNN7EXAMPLE", "a secret: AKIA"),
    ],
)
def test_a_launchers_file_with_a_fault_is_found_out(path, value, fault):
    assert any(fault in found for found in launcher_faults(broken(LAUNCHER, path, value)))


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("head_node_type",), "nobody", ValueError),
        (("colour",), "blue", Exception),
        (("available_node_types", "gpu", "resources"), {"GPU": 0.5}, Exception),
    ],
)
def test_ray_itself_refuses_a_broken_file(path, value, error):
    with pytest.raises(error):
        launcher_faults(broken(LAUNCHER, path, value))


def test_the_rayjob_is_sound():
    assert kuberay_faults(KUBERAY) == []


CLUSTER = ("spec", "rayClusterSpec")


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("apiVersion",), "ray.io/v1alpha1", "not a RayJob"),
        (("spec", "entrypoint"), "python /home/ray/vaemo/jobs/nothing.py --out x", "no job of ours"),
        (("spec", "shutdownAfterJobFinishes"), False, "the cluster stays"),
        ((*CLUSTER, "rayVersion"), "2.59.0", "not the pinned one"),
        ((*CLUSTER, "authOptions"), None, "no token"),
        ((*CLUSTER, "autoscalerOptions"), {"version": "v1"}, "does not tell"),
        ((*CLUSTER, "headGroupSpec", "serviceType"), "LoadBalancer", "from outside"),
        ((*CLUSTER, "headGroupSpec", "rayStartParams"), {}, "work may run on the head"),
        ((*CLUSTER, "workerGroupSpecs", 0, "minReplicas"), 2, "cpu does not scale from 0"),
        ((*CLUSTER, "workerGroupSpecs", 1, "template"), None, "lacks what its CRD requires"),
        ((*CLUSTER, "workerGroupSpecs", 1, "template", "spec", "containers", 0, "image"), None, "lacks name, image"),
        (
            (*CLUSTER, "workerGroupSpecs", 1, "template", "spec", "containers", 0, "image"),
            "vaemo:7",
            "builds no vaemo:7",
        ),
    ],
)
def test_a_rayjob_with_a_fault_is_found_out(path, value, fault):
    assert any(fault in found for found in kuberay_faults(broken(KUBERAY, path, value)))


def image_faults(text):
    """What is wrong with a Dockerfile, beyond what a linter finds."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.split(maxsplit=1) for line in joined.splitlines() if line and not line.startswith("#")]
    said = {word: [rest for first, rest in lines if first == word] for word in ("ARG", "FROM", "COPY", "RUN", "USER")}
    faults = []
    base = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-\$\{DEVICE\}", said["FROM"][-1])
    if not base or base.group(1) != PINS["ray"]:
        faults.append("the base is not Ray's image of the pinned version")
    elif f"Programming Language :: Python :: {base.group(2)}.{base.group(3)}" not in PROJECT["classifiers"]:
        faults.append("the base has a Python that vaemo does not declare")
    if not said["USER"] or said["USER"][-1].split(":")[0] in ("0", "root"):
        faults.append("it runs as root")
    copied = [word for rest in said["COPY"] for word in rest.split()[:-1] if not word.startswith("--")]
    faults += [f"{name} is copied and not there" for name in copied if not (ROOT / name).exists()]
    sent = (ROOT / ".dockerignore").read_text().split()
    faults += [f"{name} is copied and not sent (.dockerignore)" for name in copied if f"!{name}" not in sent]
    installs = re.findall(r"pip install (.*?)(?:&&|$)", " ".join(said["RUN"]))
    for options in installs:
        pinned = "--constraint jobs/constraints.txt" in options or re.search(r"\w==[\d.]+", options)
        faults += [] if pinned else ["something is installed without its pin"]
    extras = next((rest.partition("=")[2].split(",") for rest in said["ARG"] if rest.startswith("EXTRAS=")), [])
    faults += [f"there is no extra {name}" for name in extras if name not in PROJECT["optional-dependencies"]]
    for name in extras:
        licensed = {"opensmile", "praat-parselmouth", "espeakng-loader"}
        if any(
            re.match(r"[\w-]+", line).group() in licensed for line in PROJECT["optional-dependencies"].get(name, [])
        ):
            faults.append(f"the extra {name} has a licence that users are to accept themselves")
    tags = re.findall(r"--tag \S+:([\d.]+)", text)
    faults += ["a tag is not the version"] if set(tags) != {vaemo.__version__} else []
    return faults + [f"a secret: {found.group()}" for found in SECRET.finditer(text)]


def test_the_image_is_sound():
    assert image_faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ray:2.60.0", "ray:2.59.0", "pinned version"),
        ("ray:2.60.0-py311-${DEVICE}", "ray:latest", "pinned version"),
        ("-py311-", "-py310-", "does not declare"),
        ("USER 1000", "USER root", "runs as root"),
        ("USER 1000\n", "", "runs as root"),
        ("vaemo vaemo", "nothing vaemo", "nothing is copied and not there"),
        ("jobs jobs", "tests jobs", "tests is copied and not sent"),
        ("uv==0.13.9", "uv", "without its pin"),
        (" --constraint jobs/constraints.txt", "", "without its pin"),
        ("EXTRAS=encoders", "EXTRAS=encoder", "there is no extra encoder"),
        ("EXTRAS=encoders", "EXTRAS=opensmile", "the extra opensmile has a licence"),
        ("EXTRAS=encoders", "EXTRAS=demo", "the extra demo has a licence"),
        ("vaemo:0.1.0 .", "vaemo:0.0.9 .", "a tag is not the version"),
        ("ENV ", "ENV SECRET_KEY=x7 ", "a secret"),
    ],
)
def test_an_image_with_a_fault_is_found_out(old, new, fault):
    assert old in DOCKERFILE
    assert any(fault in found for found in image_faults(DOCKERFILE.replace(old, new)))


def test_a_linter_has_nothing_to_say_of_the_image():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
