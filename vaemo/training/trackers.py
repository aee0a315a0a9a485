"""Where metrics go beside the run folder: TensorBoard, MLflow, Weights & Biases, each through its own client."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vaemo import files
from vaemo.errors import UsageError
from vaemo.extras import offers, remedy

AUTO = "auto"


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """What `train.trackers` means here: `auto` is TensorBoard, or nothing and one line where it is not installed."""
    if AUTO not in names:
        return tuple(names)
    found = ("tensorboard",) if "tensorboard" not in names and offers("tensorboard", "TensorBoard files") else ()
    return (*(name for name in names if name != AUTO), *found)


class Trackers:
    """The trackers of one run, opened; each epoch's metrics are logged to all of them.

    Args:
        names: Of `tensorboard`, `mlflow`, `wandb`, as `chosen` gives them. MLflow and W&B take their addresses and
            keys from their own environment variables.
        out: The run folder; TensorBoard's files lie in it.
        run: Name of the run.
        settings: The resolved config, shown beside the metrics.
        first_epoch: Where the run goes on; TensorBoard drops what an interrupted run wrote from there on.

    Raises:
        UsageError: for an unknown tracker, or one whose package is not installed.
    """

    def __init__(
        self, names: Sequence[str], out: str, run: str, settings: Mapping[str, Any], first_epoch: int = 0
    ) -> None:
        openers = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
        unknown = [name for name in names if name not in openers]
        if unknown:
            raise UsageError(f"train.trackers names '{unknown[0]}'; allowed are {', '.join(openers)} and {AUTO}.")
        opened = [openers[name](out, run, settings, first_epoch) for name in names]
        self._log = [log for log, _ in opened]
        self._close = [close for _, close in opened]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of one epoch; `epoch` is where they stand."""
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        for log in self._log:
            log(numbers, metrics["epoch"])

    def close(self) -> None:
        """Write what is still held back."""
        for close in self._close:
            close()


_Opened = tuple[Callable[[Mapping[str, float], int], Any], Callable[[], Any]]


def _tensorboard(out: str, run: str, settings: Mapping[str, Any], first_epoch: int) -> _Opened:
    target = files.join(out, "tensorboard")
    # An event file grows with the run. An object store takes whole files alone, so there it grows beside, and is sent
    # after every epoch.
    beside = tempfile.TemporaryDirectory(prefix="vaemo-tensorboard-") if files.is_uri(out) else None
    with files.storage_at(target):
        writer = _client("torch.utils.tensorboard", "tensorboard").SummaryWriter(
            beside.name if beside else target, purge_step=first_epoch + 1
        )

    def log(numbers: Mapping[str, float], epoch: int) -> None:
        with files.storage_at(target):
            for name, value in numbers.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()
        for path in Path(beside.name).iterdir() if beside else ():
            files.write_whole(files.join(target, path.name), path.read_bytes())

    def close() -> None:
        writer.close()
        if beside:
            beside.cleanup()

    return log, close


def _mlflow(out: str, run: str, settings: Mapping[str, Any], first_epoch: int) -> _Opened:
    mlflow = _client("mlflow", "mlflow")
    mlflow.start_run(run_name=run)
    mlflow.log_params(
        {f"{section}.{key}": value for section, fields in settings.items() for key, value in fields.items()}
    )
    return lambda numbers, epoch: mlflow.log_metrics(dict(numbers), step=epoch), mlflow.end_run


def _wandb(out: str, run: str, settings: Mapping[str, Any], first_epoch: int) -> _Opened:
    opened = _client("wandb", "wandb").init(name=run, id=run, resume="allow", config=dict(settings))
    return lambda numbers, epoch: opened.log(dict(numbers), step=epoch), opened.finish


def _client(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"train.trackers names '{package}', which is not installed: {remedy(package)}, or leave it out with "
            "--set train.trackers=[]."
        ) from None
