"""What is built from this tree holds all that runs, and nothing else; what it installs works without a checkout."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive as `python -m build` does."""
    out = tmp_path_factory.mktemp("dist")
    copy = out / "copy"
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():  # not one that has been deleted since
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=copy)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(out / "source", filter="data")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out)
    run(*pip, next((out / "source").iterdir()))
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data_alone(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    data = f"{wheel.name.removesuffix('-py3-none-any.whl')}.data/data/share/vaemo/"
    spaces = {name.removeprefix(data) for name in names if name.startswith(data)}
    assert spaces == {f"tune_spaces/{path.name}" for path in (ROOT / "tune_spaces").glob("*.yaml")}
    package = {name for name in names if not name.startswith(data)}
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "vaemo", cwd=ROOT).split()
    # The pictures are those of README.md.
    assert package == {name for name in tracked if (ROOT / name).is_file() and not name.endswith(".png")}
    assert wheel.stat().st_size < 3 << 20


@pytest.mark.slow
def test_what_the_wheel_installs_runs_without_a_checkout(wheel, tmp_path):
    """The dependencies are those of this environment: what is shown is that nothing of the checkout is needed."""
    venv.create(tmp_path / "env", with_pip=False)
    site = run(tmp_path / "env/bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    pip = (sys.executable, "-m", "pip", "--python", tmp_path / "env/bin/python", "install", "--no-deps", "--quiet")
    run(*pip, wheel)
    here = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    (Path(site) / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    def vaemo(*arguments):
        return run(tmp_path / "env/bin/vaemo", *arguments, cwd=tmp_path, env=here)

    where = "import vaemo; print(vaemo.__file__)"
    assert run(tmp_path / "env/bin/python", "-c", where, cwd=tmp_path, env=here).startswith(site)
    assert "personalize" in vaemo("--help")
    assert "model:" in vaemo("config", "--config", "seed")
    check = """
from vaemo.audio.vad import speech_detector
from vaemo.config import Config
from vaemo.report.page import build_page
from vaemo.tuning.space import read_space, shipped_spaces

for name in shipped_spaces():
    read_space(name, Config())
read_space("default", Config())
assert b"</html>" in build_page("title", "body")
assert speech_detector().basis.shape == (258, 1, 256)
"""
    run(tmp_path / "env/bin/python", "-c", check, cwd=tmp_path, env=here)
