"""Which Ray a job takes: what RAY_ADDRESS may be, and what becomes of addresses at which nothing answers."""

import socket
from concurrent import futures

import grpc
import pytest

from vaemo.cluster import address
from vaemo.errors import ClusterError, UsageError


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    """A temporary folder for Ray of which nothing is known, and no other cluster on the machine."""
    folder = tmp_path_factory.mktemp("ray")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr(address, "find_gcs_addresses", lambda: frozenset())
    monkeypatch.setattr(address, "ANSWER_S", 1.0)
    return folder


@pytest.fixture
def noted(alone):
    """Notes an address as that of Ray's newest cluster, as Ray does."""
    (alone / "ray").mkdir()
    return (alone / "ray" / "ray_current_cluster").write_text


@pytest.fixture
def head():
    """The address of something that speaks as a head does."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def dead():
    """Addresses at which no head is: nothing listens, or another program does, or one that hangs."""
    with socket.socket() as unused, socket.socket() as silent:
        unused.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield [f"127.0.0.1:{one.getsockname()[1]}" for one in (unused, silent)]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("http://127.0.0.1:8265", "the address of a dashboard, which is for `ray job submit`.*or unset RAY_ADDRESS"),
        ("https://ray.example.com", "the address of a dashboard"),
        ("ray://127.0.0.1:10001", "jobs do not run through a Ray Client"),
        ("anyscale://mine", "jobs do not run through a Ray Client"),
        *[(text, "which is no address; give host:port, auto, local, or unset it") for text in
          ("foo", "127.0.0.1", "127.0.0.1:", ":6379", "a:b", "a:0", "a:65536", "a:999999", "a b:1", "Auto", "a:1,b:2")],
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_cluster_is_refused(monkeypatch, asked, says):
    monkeypatch.setenv("RAY_ADDRESS", asked)
    with pytest.raises(UsageError, match=rf"^RAY_ADDRESS is '{asked}'.*{says}"):
        address.find_cluster()


def test_a_head_that_was_asked_for_must_answer(monkeypatch, head, dead):
    for asked in (head, head.replace("127.0.0.1", "localhost"), f" {head} "):
        monkeypatch.setenv("RAY_ADDRESS", asked)
        assert address.find_cluster() == asked.strip()
    for asked in (*dead, "no.such.host.invalid:6379"):
        monkeypatch.setenv("RAY_ADDRESS", asked)
        with pytest.raises(ClusterError, match=rf"RAY_ADDRESS is '{asked}', and no Ray cluster answers there"):
            address.find_cluster()


def test_a_head_that_was_not_asked_for_is_taken_if_it_answers(noted, head, dead, capsys):
    noted(head + "\n")
    assert address.find_cluster() is None
    assert capsys.readouterr().out == ""
    for gone in (*dead, "not an address"):
        noted(gone)
        assert address.find_cluster() == "local"
        assert capsys.readouterr().out.startswith(f"the Ray cluster at {gone}, which ")
    noted("")
    assert address.find_cluster() == "local"
    assert capsys.readouterr().out == ""


def test_a_ray_of_ones_own(monkeypatch, noted, head):
    noted(head)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert address.find_cluster() == "local"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert address.find_cluster() is None


def test_auto_takes_what_runs_on_this_machine(monkeypatch, noted, head, dead):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS is 'auto', and no Ray cluster answers on this machine\. S"):
        address.find_cluster()
    noted(dead[0])
    with pytest.raises(ClusterError, match=rf"no Ray cluster answers at {dead[0]}, which .*ray_current_cluster names"):
        address.find_cluster()
    monkeypatch.setattr(address, "find_gcs_addresses", lambda: {head, dead[1]})
    assert address.find_cluster() == head
    noted(head)
    assert address.find_cluster() == "auto"


def test_a_temporary_folder_that_is_too_long(monkeypatch, capsys):
    long = "/tmp/" + "x" * 120
    for most in (30, 36):
        monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (most - 1))
        assert address.temporary_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", long)
    with pytest.raises(
        UsageError, match=rf"RAY_TMPDIR is '{long}', which is too long for Ray's sockets: it has 125 by"
    ):
        address.temporary_folder()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", long)
    assert address.temporary_folder() == "/tmp/ray"
    assert "TMPDIR is too long for Ray's sockets" in capsys.readouterr().out
