"""Settings that hold for every test: offline, no usage reports, a Ray that meets no other."""

import atexit
import os
import shutil
import socket
import tempfile
import uuid

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
# The way to the S3 of `bucket`, known before any Ray or job of this process begins: a socket that does not listen holds
# the port from the start, and lets a server beside it.
S3_DOOR = socket.socket()
S3_DOOR.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
S3_DOOR.bind(("127.0.0.1", 0))
os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*S3_DOOR.getsockname())
os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
os.environ |= dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-east-1")


@pytest.fixture(scope="module")
def decoder():
    """One process that decodes, for all tests of a module."""
    from vaemo.audio.recording import Decoder

    with Decoder(30.0) as shared:
        yield shared


@pytest.fixture
def local_ray():
    """Ray with two logical CPUs, shared by the tests of a run; started again where another test has ended it."""
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


@pytest.fixture
def bucket():
    """The URI of an empty bucket, on an S3 of this process that its Ray and its children reach too."""
    import boto3
    from moto.server import ThreadedMotoServer

    host, port = S3_DOOR.getsockname()
    server = ThreadedMotoServer(ip_address=host, port=port, verbose=False)
    server.start()
    # moto keeps what it holds as long as the process lives.
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    server.stop()
