"""What `ray job submit --working-dir .` takes along is the code, whatever else lies in the repository."""

import shutil
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LIMIT_BYTES = 5 << 20
"""Ray refuses 100 MiB; the code is far below, and a submission should take a moment."""

CLUTTER = [
    ".venv/lib/big.so",
    ".git/objects/aa",
    ".mypy_cache/3.11/x.json",
    "demo/store/part-0.parquet",
    "store/part-0.parquet",
    "run/best/model.safetensors",
    "recordings/a.wav",
    "corpus.jsonl",
    "core.1234",
    "vaemo/__pycache__/x.pyc",
    "vaemo.egg-info/PKG-INFO",
]


@pytest.fixture
def upload(tmp_path):
    """What Ray would send for a folder: the names in its archive, and the archive's size."""

    def pack(folder):
        from ray._private.ray_constants import get_runtime_env_default_excludes
        from ray._private.runtime_env.packaging import create_package

        archive = tmp_path / "package.zip"
        create_package(str(folder), archive, include_gitignore=True, excludes=get_runtime_env_default_excludes())
        with zipfile.ZipFile(archive) as content:
            return set(content.namelist()), archive.stat().st_size

    return pack


def test_this_repository_is_small_to_send(upload):
    names, size = upload(ROOT)
    assert size < LIMIT_BYTES
    code = {str(path.relative_to(ROOT)) for room in ("jobs", "vaemo") for path in (ROOT / room).rglob("*.py")}
    assert code <= names
    tops = {name.split("/")[0] for name in names}
    assert tops <= {"jobs", "vaemo", "tune_spaces", *(path.name for path in ROOT.glob("*.yaml"))}


def test_what_users_leave_there_stays_there(upload, tmp_path):
    folder = tmp_path / "checkout"
    wanted = {"jobs/train.py", "vaemo/presets/default.yaml", "tune_spaces/lr.yaml", "mine.yaml"}
    for name in [*CLUTTER, *wanted]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert wanted < upload(folder)[0], "without the rules everything goes along"
    (tmp_path / "package.zip").unlink()
    shutil.copy(ROOT / ".rayignore", folder)
    shutil.copy(ROOT / ".gitignore", folder)
    assert upload(folder)[0] == wanted
