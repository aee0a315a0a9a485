"""The commands of README and docs, run as they are printed, on small synthetic data.

The blocks of README.md run one after the other in one folder, which holds the data that `_make_inputs` makes. A block
of another page runs in a copy of that folder, without what the block writes itself. Commands that cannot run here are
listed in `NOT_RUN`.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from processes import ROOT
from tiny_models import write_speech_model

from vaemo import scores
from vaemo.demo import corpus

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
STARTS = re.compile(r"(vaemo|python (-m vaemo[\w.]*|jobs/\w+\.py|without_torch\.py))\s")

NOT_RUN = {
    "make ": "sets up an environment of its own, or runs these tests",
    ". .venv/": "activates that environment",
    "git clone ": "fetches from a repository",
    "cd ": "enters what was fetched",
    "pip install ": "installs from an index",
    "PIP_EXTRA_INDEX_URL=": "installs from an index",
    "uv pip install ": "installs from an index",
    "ray ": "starts or addresses a cluster",
    "export ": "sets what a cluster or a key needs; the test sets the key",
}
"""How commands begin that are not run here, and why."""

SMALLER = {
    "--trials 40": "--trials 2",
    "--seeds 5": "--seeds 2",
    "--seeds 3": "--seeds 1",
    "--suggest 100": "--suggest 3",
}
"""The same with fewer trainings and calls."""

PLACES = {"s3://calls/2026": "calls"}
"""Where the data of an address is here."""

PLACES_ON = {"mono.md": {"calls": "mono-calls", "calls.csv": "mono-calls.csv"}}
"""The same for one page."""

SHORT = {
    "train": ["--set", "train.epochs=2"],
    "tune": ["--set", "train.epochs=2"],
    "ablate": ["--set", "train.epochs=2", "--only", "no-state,mean"],
}
"""Options that shorten a command."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, line, and commands without comments."""

    page: str
    line: int
    commands: tuple[str, ...]

    @property
    def runs(self):
        """The commands that run here, as arguments."""
        return [self._arguments(command) for command in self.commands if reason(command) is None]

    def _arguments(self, command):
        for text, smaller in SMALLER.items():
            command = command.replace(text, smaller)
        places = {**PLACES, **PLACES_ON.get(self.page, {})}
        words = [places.get(word, word) for word in shlex.split(command)]
        name = words[1].removeprefix("jobs/").removesuffix(".py")
        return words + SHORT.get(name, [])


def reason(command):
    """Why a command is not run here; None for one that is."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def blocks(page, text):
    """The blocks of a page that hold commands, in order."""
    for found in FENCE.finditer(text):
        if found[1] not in ("console", "bash", ""):
            continue
        joined = re.sub(r"\s*\\\n\s*", " ", found[2]).splitlines()
        uncommented = [re.sub(r"(^|\s)#.*", "", line) for line in joined]
        commands = [part.strip() for line in uncommented for part in line.split(" && ") if part.strip()]
        if commands:
            yield Block(page, text.count("\n", 0, found.start()) + 1, tuple(commands))


def all_blocks():
    return [block for page in PAGES for block in blocks(page.name, page.read_text())]


def outputs(arguments):
    return [value for option, value in itertools.pairwise(arguments) if option == "--out"]


def test_every_command_of_a_page_is_run_or_listed():
    commands = [(block, command) for block in all_blocks() for command in block.commands]
    unknown = [
        f"{block.page}:{block.line}: {command}"
        for block, command in commands
        if reason(command) is None and not STARTS.match(command)
    ]
    assert not unknown, "run them, or list them in NOT_RUN"
    assert [start for start in NOT_RUN if not any(command.startswith(start) for _, command in commands)] == []
    assert sum(len(block.runs) for block in all_blocks()) > 20


def test_blocks_are_read_with_continuations_comments_and_chains():
    text = "a\n```console\nmake venv && vaemo a \\\n    --out b  # once\n# all\n```\n```json\n{}\n```\n"
    assert list(blocks("p.md", text)) == [Block("p.md", 2, ("make venv", "vaemo a --out b"))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in all_blocks() if block.runs))
def test_the_commands_of_a_page_run(page, local_ray, tmp_path, tmp_path_factory):
    base, failed = _after_readme(tmp_path_factory.getbasetemp() / "pages")
    if page != "README.md":
        if failed:
            pytest.skip("the commands of README.md failed")
        for block in all_blocks():
            if block.page == page and block.runs:
                folder = tmp_path / str(block.line)
                _copy(base, folder, {out for arguments in block.runs for out in outputs(arguments)})
                failed += _run_block(block, folder)
                shutil.rmtree(folder)
    assert not failed, "\n".join(failed)


@functools.cache
def _after_readme(root):
    """The folder in which README.md has been followed, with labels of the scored calls, and what failed."""
    _make_inputs(root)
    failed = [each for block in all_blocks() if block.page == "README.md" for each in _run_block(block, root)]
    if not failed:
        # On the other pages `scores` are those of calls.
        shutil.rmtree(root / "scores")
        (root / "call-scores").rename(root / "scores")
        _label_calls(root)
    return root, failed


def _run_block(block, folder):
    """Run a block to its first failure: a list of it, or an empty one."""
    for arguments in block.runs:
        begun = time.monotonic()
        complaint = _run(arguments, folder)
        print(f"{block.page}:{block.line} {time.monotonic() - begun:5.1f} s {shlex.join(arguments)}", flush=True)
        missing = [out for out in outputs(arguments) if not (folder / out).exists()]
        if complaint is not None or missing:
            return [f"{block.page}:{block.line}: {shlex.join(arguments)}: {complaint}; not written: {missing}"]
    return []


def _run(arguments, folder):
    """Run a command in a folder; what it says if it fails, else None."""
    arguments = [word.replace("$PWD", str(folder)) for word in arguments]
    if arguments[0] == "vaemo":
        start, argv = (lambda: runpy.run_module("vaemo", run_name="__main__")), arguments
    elif arguments[1] == "-m":
        start, argv = (lambda: runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)), arguments[2:]
    else:
        script = ROOT / (arguments[1] if "/" in arguments[1] else f"docs/{arguments[1]}")
        start, argv = (lambda: runpy.run_path(str(script), run_name="__main__")), [str(script), *arguments[2:]]
    said, code = io.StringIO(), 0
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"VAEMO_ID_KEY": "0123456789abcdef" * 4}),
    ):
        try:
            start()
        except SystemExit as ended:
            code = ended.code
    return None if code in (0, None) else f"exit code {code}: {said.getvalue()[-2000:]}"


def _copy(base, folder, written):
    """A copy of what the base holds, less what a block writes itself; recordings are linked."""

    def copy(source, target):
        (os.link if source.endswith(".wav") else shutil.copy2)(source, target)

    shutil.copytree(base, folder, copy_function=copy)
    for out in written:
        path = folder / out
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _make_inputs(base):
    """The files that pages name: a corpus, calls of two channels and of one, an encoder, agents, utterances."""
    manifest = corpus.make_corpus(base, n_sessions=24)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line |= {name: 1 + 6 * line[name] for name in ("valence", "arousal")}
        line["dominance"] = line["arousal"]
    _write_lines(base / "corpus.jsonl", lines)
    corpus.make_recordings(base, n_recordings=4)
    (base / "recordings").rename(base / "calls")
    names = sorted(path.name for path in (base / "calls").iterdir())
    for table, columns, row in (
        ("calls.csv", "path,role_ch0,role_ch1,date", "{},customer,agent,2026-11-23"),
        ("mono-calls.csv", "path,agent_id", "{},agent-1"),
    ):
        (base / table).write_text("\n".join([columns, *(row.format(name) for name in names), ""]))
    _make_mono_calls(base)
    (base / "emodb").mkdir()
    for name in ("03a01Fa.wav", "03a01Nc.wav", "16b10Td.wav"):
        (base / "emodb" / name).touch()
    shutil.copytree(ROOT / "tune_spaces", base / "tune_spaces")
    encoder = write_speech_model(base / "microsoft" / "wavlm-base-plus", "wavlm")
    from safetensors.torch import load_file

    torch.save(load_file(encoder / "model.safetensors"), encoder / "pytorch_model.bin")
    (encoder / "model.safetensors").unlink()
    samples, rate = soundfile.read(base / lines[0]["audio_path"])
    for name, line in (("caller/one.wav", lines[0]), ("agent/two.wav", lines[1])):
        (base / name).parent.mkdir()
        part = samples[int(line["start_s"] * rate) : int(line["end_s"] * rate)]
        soundfile.write(base / name, part, rate, subtype="PCM_16")


def _make_mono_calls(base):
    """The calls with both channels summed, who speaks when as RTTM, and the agent alone for enrolment."""
    turns = [json.loads(line) for line in (base / "truth.jsonl").read_text().splitlines()]
    (base / "mono-calls").mkdir()
    (base / "turns").mkdir()
    (base / "agents").mkdir()
    for path in sorted((base / "calls").glob("*.wav")):
        samples, rate = soundfile.read(path)
        soundfile.write(base / "mono-calls" / path.name, samples.sum(axis=1), rate, subtype="ULAW")
        soundfile.write(base / "agents" / "agent-1.wav", samples[:, 1], rate, subtype="ULAW")
        lines = [
            f"SPEAKER {path.stem} 1 {turn['start_s']} {turn['end_s'] - turn['start_s']:.4f} <NA> <NA> "
            f"{('customer', 'agent')[turn['channel']]} <NA> <NA>\n"
            for turn in turns
            if turn["session_id"] == path.name
        ]
        (base / "turns" / f"{path.stem}.rttm").write_text("".join(lines))


def _label_calls(base):
    """Labels of the scored calls: their scores with errors, and a group for each call."""
    rows = scores.read_utterances(str(base / "scores")).to_pylist()
    rng = np.random.default_rng(0)
    lines = []
    for row in rows:
        if row["valence"] is None:
            continue
        number = int(re.search(r"\d+", row["session_id"])[0])
        lines.append(
            {
                **{name: row[name] for name in ("utt_id", "session_id", "speaker_id", "start_s", "end_s")},
                "audio_path": f"calls/{row['session_id']}",
                "gender": "fm"[number % 2],
                "age": ("young", "old")[number // 2 % 2],
                **{name: float(np.clip(row[name] + rng.normal(0, 0.1), 0, 1)) for name in ("valence", "arousal")},
            }
        )
    for name in ("my-labels.jsonl", "labels.jsonl"):
        _write_lines(base / name, lines)


def _write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
