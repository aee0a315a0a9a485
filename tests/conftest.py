"""Settings that hold for every test: offline, no usage reports, a Ray that meets no other."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A local Ray would otherwise leave ~/.ray/auth_token, which later clients of the machine trip over.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray notes the address of its newest cluster in its temporary folder, and `ray.init` attaches to that: test processes
# side by side would share a cluster that one of them kills. The path is short, for sockets lie below it (107 bytes).
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
# Small tensors: two threads that wait for each other on a busy machine cost many times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def local_ray():
    """Ray with two logical CPUs, shared by the tests of a run; started anew where another test has ended it."""
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


@pytest.fixture
def bucket(monkeypatch):
    """The URI of an empty bucket, on an S3 of this process that its children reach too."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    # moto keeps what it holds as long as the process lives.
    boto3.client("s3").create_bucket(Bucket=f"bucket-{port}")
    yield f"s3://bucket-{port}"
    server.stop()


@pytest.fixture
def ray_that_knows_the_bucket(bucket):
    """The address of a Ray begun after the bucket: its workers have the way there from the environment."""
    import ray

    ray.shutdown()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
