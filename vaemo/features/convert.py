"""`python -m vaemo.features.convert NAME --out FOLDER`: convert weights from pickle files to safetensors, once.

PyTorch's own files (`pytorch_model.bin`, `.pt`, `.ckpt`) are pickles, which can run arbitrary code when they are
loaded. They are read in a process of its own, with `weights_only`, which loads tensors only; a file that holds anything
else is refused. Everything else of vaemo reads safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vaemo
from vaemo import cli, files
from vaemo.errors import ExtractorError, OtherRunError, UsageError
from vaemo.features.base import first_line, needed_version
from vaemo.progress import say

PROG = "python -m vaemo.features.convert"

CONVERSION = "_converted.json"
"""The record of a conversion in the folder; `finished` once it is complete."""

COPIED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "hyperparams.yaml",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
)
"""Files that are copied unchanged."""

_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_KNOWN = ("pytorch_model.bin", "embedding_model.ckpt")
_OF_TRAINING = re.compile(r"(training_args|optimizer|scheduler|rng_state\w*|scaler|classifier|mean_var_norm\w*)\.\w+")
_NESTED = ("state_dict", "model_state_dict", "model")
_SAID = 300
_BLOCK = 1 << 20


def convert(name: str, out: str, *, revision: str = "main") -> dict[str, Any]:
    """Turn the weights of an encoder into safetensors, and return what `CONVERSION` says.

    Args:
        name: Hub name, or folder, of an encoder of transformers or SpeechBrain.
        out: The folder to write; a conversion of the same encoder that was begun there is continued.
        revision: Of a hub model.

    Raises:
        UsageError: if the encoder has safetensors weights already.
        ExtractorError: if it has no weights, lacks some, or they hold more than tensors.
        OtherRunError: if the folder holds something else.
        StorageError: if it cannot be written.
    """
    folder = _folder(name, revision)
    if any(folder.glob("*.safetensors")):
        raise UsageError(f"{name} holds safetensors already; give it itself, there is nothing to convert.")
    sources = {source: _name_of(source) for source in _weights(folder, name)}
    digests = {source: _digest(folder / source) for source in sources}
    record: dict[str, Any] = {"source": name, "vaemo": vaemo.__version__, "read": digests}
    before = _record(out)
    if before is None and files.exists(out) and files.list_files(out):
        raise OtherRunError(f"{out} holds other files; give a new folder.")
    if before is not None and before["finished"]:
        if before["read"] != digests:
            raise OtherRunError(f"{out} was made of other weights ({before['source']}); give a new folder.")
        return before
    files.write_json(files.join(out, CONVERSION), {**record, "finished": False})
    written, places = dict[str, str](), dict[str, str]()
    for source, target in sources.items():
        say(f"{source}: {(folder / source).stat().st_size / 1e6:,.0f} MB")
        content = b"".join(read_tensors(folder / source, f"{name}/{source}"))
        files.write_whole(files.join(out, target), content)
        written[target] = hashlib.sha256(content).hexdigest()
        places |= dict.fromkeys(files.safetensors_header(content).keys() - {"__metadata__"}, target)
    if len(sources) > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
        files.write_json(files.join(out, "model.safetensors.index.json"), index)
    for copied in COPIED:
        if (folder / copied).is_file():
            files.write_whole(files.join(out, copied), (folder / copied).read_bytes())
    record |= {"written": written, "finished": True}
    files.write_json(files.join(out, CONVERSION), record)
    return record


def read_tensors(path: str | Path, name: str) -> Iterator[bytes]:
    """The tensors of a file of PyTorch as safetensors, in pieces; it is loaded in a process of its own.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        ExtractorError: after the last piece, if it holds more than tensors, is damaged, or ended that process.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "vaemo.features.convert", "--read", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdout
        assert child.stderr
        try:
            while piece := child.stdout.read(_BLOCK):
                yield piece
            said = child.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            child.wait()
        finally:
            child.kill()
    if child.returncode:
        why = (
            said[:_SAID]
            if child.returncode > 0
            else f"reading it ends the process that does, by signal {-child.returncode}"
        )
        raise ExtractorError(
            f"{name} is not converted: {why}. Take the weights from where they are safetensors, or whole."
        )


def write_tensors(path: str, out: Any) -> None:
    """Write the tensors of a file as safetensors; run by `read_tensors` in another process.

    Raises:
        ValueError: if there are none, or something else beside them, or the file is damaged.
    """
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # a foreign file may raise anything
        # PyTorch's own message advises to load it anyway.
        wanted = re.search(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL) ([\w.]+)", str(error))
        if wanted:
            raise ValueError(f"it holds more than tensors ({wanted.group(1)}), which might be a program") from None
        if "TorchScript" in str(error):
            raise ValueError("it is a program (TorchScript), not weights") from None
        raise ValueError(f"it is damaged, or no file of PyTorch ({type(error).__name__})") from None
    if isinstance(loaded, Mapping):
        nested = next((loaded[key] for key in _NESTED if isinstance(loaded.get(key), Mapping)), None)
        loaded = loaded if nested is None else nested
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"it holds {type(loaded).__name__}, no named tensors")
    for key, tensor in loaded.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"'{key}' in it is {type(tensor).__name__}, no tensor")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise ValueError(f"'{key}' in it is no plain tensor ({tensor.layout}, {tensor.dtype})")
    for piece in files.safetensors_pieces(dict(loaded), {"format": "pt"}):
        out.write(piece)


def _folder(name: str, revision: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    needed_version("huggingface-hub", f"'{name}' is no folder, and is looked for on the hub", "a folder")
    from huggingface_hub import snapshot_download

    patterns = [*_KNOWN, _INDEX, "pytorch_model-*.bin", "*.safetensors.index.json", "model.safetensors", *COPIED]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ExtractorError(
            f"'{name}' is no folder, and nothing can be loaded from the hub under that name ({first_line(error)}). "
            "Give a folder, or the name of a model that this machine can reach."
        ) from None


def _weights(folder: Path, name: str) -> list[str]:
    """The files of a folder that hold its weights, all of them there."""
    if (folder / _INDEX).is_file():
        try:
            parts = sorted(set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ExtractorError(f"{name}/{_INDEX} does not say which files hold the weights; copy it again.") from None
        if missing := [part for part in parts if os.path.basename(part) != part or not (folder / part).is_file()]:
            raise ExtractorError(
                f"{name} has no {missing[0]}, which its {_INDEX} names. Copy the folder again, all of it."
            )
        return parts
    for known in _KNOWN:
        if (folder / known).is_file():
            return [known]
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES)
    found = [path for path in found if not _OF_TRAINING.fullmatch(path)]
    if len(found) != 1:
        there = f"several files that may be its weights ({', '.join(found)})" if found else "no weights"
        raise ExtractorError(
            f"{name} has {there}; give a folder with {', '.join(_KNOWN)}, or with one file that ends in "
            f"{', '.join(_SUFFIXES)}."
        )
    return found


def _name_of(source: str) -> str:
    """The safetensors name of a file of weights, as `vaemo.features` looks for it."""
    stem = Path(source).stem
    return f"{stem if stem == 'embedding_model' else stem.replace('pytorch_model', 'model')}.safetensors"


def _record(out: str) -> dict[str, Any] | None:
    path = files.join(out, CONVERSION)
    return files.read_json(path) if files.exists(path) else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """The command."""
    parser = cli.Parser(prog=prog or PROG, description=__doc__)
    parser.add_argument("name", metavar="NAME", help="hub name, or folder, of an encoder")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="FOLDER", help="what is written")
    parser.add_argument("--revision", default="main", help="of a hub model; pin a commit (default: main)")
    args = parser.parse_args(argv)
    record = convert(args.name, args.out, revision=args.revision)
    say(f"{', '.join(record['written'])} in {args.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        warnings.simplefilter("ignore")
        try:
            write_tensors(sys.argv[2], sys.stdout.buffer)
        except (ValueError, RuntimeError, MemoryError) as error:
            print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
            sys.exit(1)
    else:
        cli.run(main, PROG)
