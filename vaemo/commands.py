"""What `vaemo NAME` and `jobs/NAME.py` do: each command parses its arguments and calls the library.

Each command imports its dependencies when it is called, so that `vaemo --help` is fast.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import vaemo
from vaemo import cli
from vaemo.config.suggest import question
from vaemo.errors import UsageError

Arguments = list[str] | None
"""Of a command; None are those of the process."""


def extract(argv: Arguments = None, prog: str | None = None) -> None:
    """Recordings to a feature store."""
    parser = cli.JobParser("Turn the utterances of a manifest, or of recordings, into a store of features.", prog)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=cli.data_path, metavar="FILE", help="JSON Lines or Parquet")
    source.add_argument("--input", type=cli.data_path, metavar="FOLDER", help="recordings; utterances are found")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="STORE", help="the store's folder")
    parser.add_argument(
        "--calls", type=cli.data_path, metavar="FILE", help="which recordings are one call, and may be processed"
    )
    parser.add_argument("--limit", type=cli.count, metavar="N", help="only the first N utterances or recordings")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and how long it would take")
    cli.add_rerun_options(parser)
    options = cli.keywords(parser.parse_args(argv))
    vaemo.extract(**options)


def train(argv: Arguments = None, prog: str | None = None) -> None:
    """Train a session model on a feature store."""
    parser = cli.JobParser(train.__doc__, prog)
    path, count = cli.data_path, cli.count
    parser.add_argument("--store", type=path, required=True, help="feature store of jobs/extract.py, or your own")
    parser.add_argument("--out", type=path, required=True, metavar="RUN", help="run folder; an existing run is resumed")
    parser.add_argument("--workers", type=count, default=1, help="processes that train one model; divides train.lanes")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: hold out one at a time")
    parser.add_argument("--seeds", type=count, default=1, help="trainings, from train.seed on: an ensemble")
    parser.add_argument("--manifest", type=path, metavar="FILE", help="manifest of the store, to train its encoder too")
    parser.add_argument("--speakers", type=path, metavar="FILE", help="enrolments: speaker_id, speaker")
    options = cli.keywords(parser.parse_args(argv))
    vaemo.train(**options)


def tune(argv: Arguments = None, prog: str | None = None) -> None:
    """Search over fields of the config: many short trainings on one feature store, side by side."""
    from vaemo.tuning.search import METHODS, SCHEDULERS

    parser = cli.JobParser(tune.__doc__, prog)
    path, count = cli.data_path, cli.count
    parser.add_argument("--store", type=path, required=True, help="feature store of jobs/extract.py, or your own")
    parser.add_argument(
        "--space",
        required=True,
        help="YAML file of fields and values, or a name such as default, of those in tune_spaces",
    )
    parser.add_argument("--out", type=path, required=True, metavar="SWEEP", help="folder; an existing sweep is resumed")
    parser.add_argument("--trials", type=count, help="in all, the config itself too (default: 20, or the whole grid)")
    parser.add_argument(
        "--search", choices=METHODS, help="how points are drawn (default: tpe, where Optuna is installed)"
    )
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="auto",
        help="end poor trials early (asha), none, or restart them from good ones (pbt); auto is asha, but none "
        "where the space searches the sampling schedule",
    )
    parser.add_argument("--workers", type=count, default=1, help="processes that train one trial; divides train.lanes")
    parser.add_argument("--gpus", type=float, help="share of a GPU for each process (default: 0.25 where there is any)")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: search for the best mean over folds")
    parser.add_argument("--seeds", type=count, default=1, help="trainings of each trial; their mean counts")
    options = cli.keywords(parser.parse_args(argv))

    from vaemo.cluster import tune as cluster

    with cli.summary(options["out"]):
        cluster.tune(**options)


def score(argv: Arguments = None, prog: str | None = None) -> None:
    """Recordings, a manifest or a feature store to scores: valence and arousal of every utterance and every call."""
    parser = cli.JobParser("Score whole sessions; finished ones are kept, and running again does the rest.", prog)
    parser.add_argument(
        "--input", type=cli.data_path, required=True, help="a feature store, a manifest, or a folder of recordings"
    )
    cli.add_checkpoint(parser, "several, or the option repeated, give the mean, and *_sd their deviation", several=True)
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="SCORES", help="the folder of scores")
    parser.add_argument("--calls", type=cli.data_path, metavar="FILE", help="who speaks on which channel, per call")
    parser.add_argument("--personal", type=cli.data_path, metavar="DIR", help="what jobs/personalize.py wrote")
    parser.add_argument("--speakers", type=cli.data_path, metavar="FILE", help="enrolments: speaker_id, speaker")
    parser.add_argument(
        "--roles-unknown", action="store_true", help="score all channels, possibly including employees; for evaluation"
    )
    parser.add_argument("--limit", type=cli.count, metavar="N", help="only the first N sessions or recordings")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    cli.add_rerun_options(parser)
    options = cli.keywords(parser.parse_args(argv))
    vaemo.score(**options)


def evaluate(argv: Arguments = None, prog: str | None = None) -> None:
    """Scores against labels."""
    parser = cli.JobParser("CCC, RMSE, Pearson's r and MAE with intervals over sessions, by group, and compared.", prog)
    path = cli.data_path
    parser.add_argument("--scores", type=path, required=True, metavar="SCORES", help="folder that jobs/score.py wrote")
    parser.add_argument("--labels", type=path, metavar="STORE|MANIFEST", help="where the labels are")
    parser.add_argument(
        "--rttm", type=path, metavar="PATH", help="who speaks when, to measure how well voices are separated"
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="metrics.json and pictures go here")
    parser.add_argument("--split", help="only this split; 'test' where any row has it, else all rows, with a warning")
    parser.add_argument("--exclude", type=path, metavar="PARQUET", help="leave out the utterances listed there")
    parser.add_argument("--compare", type=path, metavar="SCORES", help="other scores of the same utterances, paired")
    cli.add_checkpoint(parser, "replay it on the store with labels fed, too", required=False)
    parser.add_argument("--card", type=path, metavar="CHECKPOINT", help="put the result into its model card")
    parser.add_argument(
        "--by", type=cli.names, default=(), metavar="COLUMN[,COLUMN]", help="results by group, and the largest gap"
    )
    args = parser.parse_args(argv)

    if not args.labels and not args.rttm:
        raise UsageError("evaluate needs --labels, or --rttm: something to compare the scores with.")
    if args.rttm:
        from vaemo.evaluation import diarisation

        with cli.summary(args.out):
            voices = diarisation.evaluate_voices(args.scores, args.rttm, args.out)
        print(f"{diarisation.table_of(voices)}\n\nsee {args.out}/diarisation.json", flush=True)
    if not args.labels:
        return

    from vaemo.evaluation.evaluate import table_of

    options = cli.keywords(args)
    del options["rttm"]
    result = vaemo.evaluate(**options)
    print(f"{table_of(result)}\n\nsee {args.out}/metrics.json", flush=True)


def report(argv: Arguments = None, prog: str | None = None) -> None:
    """Scores to a page that opens from disk, and pictures."""
    parser = cli.JobParser(
        "Make index.html, which shows every call and the archive as a whole, and PNG pictures.", prog
    )
    path = cli.data_path
    parser.add_argument("--scores", type=path, required=True, metavar="SCORES", help="folder that jobs/score.py wrote")
    parser.add_argument("--labels", type=path, metavar="STORE|MANIFEST", help="draw these labels beside the scores")
    parser.add_argument("--audio", type=path, metavar="FOLDER", help="link the recordings: click a point to hear it")
    parser.add_argument("--top", type=cli.count, default=500, metavar="N", help="draw N calls where there are more")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="index.html and pictures/ go here")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.report.write import write_report

    with cli.summary(args.out):
        counts = write_report(args.scores, args.out, config, labels=args.labels, audio=args.audio, top=args.top)
        print(f"{counts['calls']:,} calls, {counts['drawn']:,} drawn: open {args.out}/index.html", flush=True)


def ablate(argv: Arguments = None, prog: str | None = None) -> None:
    """The value of each part of the model: results without it, or with another in its place."""
    parser = cli.JobParser(ablate.__doc__, prog)
    parser.add_argument("--store", type=cli.data_path, required=True, help="feature store with labels")
    parser.add_argument(
        "--out", type=cli.data_path, required=True, metavar="DIR", help="the tables; an existing ablation is resumed"
    )
    parser.add_argument("--seeds", type=cli.count, default=3, metavar="N", help="trainings of every variant")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: hold out one at a time, compare on all")
    parser.add_argument(
        "--only", type=cli.names, metavar="NAME[,NAME...]", help="compare only these, such as no-state,no-prosody"
    )
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.cluster.executor import OnRay
    from vaemo.pipeline import ablation

    with cli.summary(args.out):
        ablation.ablate(
            args.store, args.out, config, OnRay(), seeds=args.seeds, folds=args.folds, only=args.only or None
        )


def calibrate(argv: Arguments = None, prog: str | None = None) -> None:
    """Intervals, and corrections where they help, from labelled calls of your own."""
    parser = cli.JobParser(calibrate.__doc__, prog)
    path = cli.data_path
    parser.add_argument("--scores", type=path, required=True, metavar="SCORES", help="folder that jobs/score.py wrote")
    parser.add_argument("--labels", type=path, metavar="STORE|MANIFEST", help="labels of some of its calls")
    cli.add_checkpoint(parser, "what made the scores", required=False, several=True)
    parser.add_argument(
        "--out", type=path, metavar="CKPT", help="the calibrated checkpoint; of several 0, 1, ... in it"
    )
    parser.add_argument("--suggest", type=cli.count, metavar="N", help="print N calls to label, and stop")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.trust import own_calls

    if args.suggest:
        print("\n".join(own_calls.suggest_calls(args.scores, args.suggest)), flush=True)
        return
    if not (args.labels and args.checkpoint and args.out):
        raise UsageError("calibrate needs --labels, --checkpoint and --out; or --suggest N: which calls to label.")
    with cli.summary(args.out):
        found, folders = own_calls.calibrate_calls(args.scores, args.labels, args.checkpoint, args.out, config)
    print(f"{own_calls.table_of(found, config.score.coverage)}\nsee {', '.join(folders)}", flush=True)


def personalize(argv: Arguments = None, prog: str | None = None) -> None:
    """A small change of the model for every speaker, learned from the speaker's first labelled utterances."""
    parser = cli.JobParser(personalize.__doc__, prog)
    parser.add_argument("--store", type=cli.data_path, required=True, help="feature store with labels")
    cli.add_checkpoint(parser, "a trained model")
    parser.add_argument(
        "--out", type=cli.data_path, required=True, metavar="DIR", help="what score takes as --personal"
    )
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.personalize import personalize_store

    with cli.summary(args.out):
        speakers = personalize_store(args.store, args.checkpoint, args.out, config)
        kept = sum(speakers["kept"].to_pylist())
        print(f"{kept} of {len(speakers)} speakers changed; see {args.out}/speakers.parquet", flush=True)


def config(argv: Arguments = None, prog: str | None = None) -> None:
    """Every setting with its meaning, after --config and --set: a file to start from."""
    parser = cli.JobParser(config.__doc__, prog)
    print(cli.load_config(parser.parse_args(argv)).explained(), end="", flush=True)


def demo(argv: Arguments = None, prog: str | None = None) -> None:
    """All of vaemo on synthetic speech."""
    parser = cli.JobParser("Make speech, extract, train with and without memory, score, evaluate and report it.", prog)
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="DIR", help="the folder for all of it")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.demo.run import run_demo

    with cli.summary(args.out):
        run_demo(args.out, config)


def enrol(argv: Arguments = None, prog: str | None = None) -> None:
    """Recordings of agents to voiceprints, which identify the agent in mono calls."""
    importlib.import_module("vaemo.voices.enrol").main(argv, prog)


def export(argv: Arguments = None, prog: str | None = None) -> None:
    """A checkpoint as one ONNX step, which runs without PyTorch."""
    parser = cli.Parser(prog=prog, description="Write one step of a checkpoint's model as ONNX.")
    cli.add_checkpoint(parser, "a trained model")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="FILE", help="such as step.onnx")
    parser.add_argument("--film-delta", action="store_true", help="take a speaker's deltas (personalize) as inputs")
    args = parser.parse_args(argv)

    from vaemo.export import export_onnx

    export_onnx(args.checkpoint, args.out, film_delta=args.film_delta)


def corpora(argv: Arguments = None, prog: str | None = None) -> None:
    """A corpus, as distributed, to a manifest."""
    importlib.import_module("vaemo.corpora.__main__").main(argv, prog)


def convert(argv: Arguments = None, prog: str | None = None) -> None:
    """An encoder's weights to safetensors, once."""
    importlib.import_module("vaemo.features.convert").main(argv, prog)


def erase(argv: Arguments = None, prog: str | None = None) -> None:
    """Remove calls from every output that holds data of them, and leave tombstones."""
    given = sys.argv[1:] if argv is None else argv
    importlib.import_module("vaemo.scoring.tend").main(["erase", *given], "vaemo")


def compact(argv: Arguments = None, prog: str | None = None) -> None:
    """Join small parts of scores into few files."""
    given = sys.argv[1:] if argv is None else argv
    importlib.import_module("vaemo.scoring.tend").main(["compact", *given], "vaemo")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        *(extract, train, tune, score, evaluate, calibrate, report, ablate, personalize, config, demo),
        *(corpora, erase, compact, convert, enrol, export),
    )
}
"""By name; `vaemo --help` shows the docstring of each."""


def run(name: str, prog: str | None = None) -> NoReturn:
    """Run a command with the arguments of this process, to its end: see `vaemo.cli.run`."""
    cli.run(partial(COMMANDS[name], prog=prog), prog)


def main() -> NoReturn:
    """The command `vaemo`: the first argument is the name of a command, the others are its own."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        # As if jobs/NAME.py had been called: commands record their name in their output.
        sys.argv = [name, *sys.argv[2:]]
        run(name, f"vaemo {name}")
    cli.run(partial(_about, name), "vaemo")


def _about(name: str, argv: Arguments) -> None:
    if name == "--version":
        print(f"vaemo {vaemo.__version__}")
    elif name in ("-h", "--help"):
        print("usage: vaemo COMMAND [OPTIONS]; vaemo COMMAND --help explains its options\n")
        width = max(map(len, COMMANDS))
        print(*(f"  {name:<{width}}  {inspect.getdoc(command)}" for name, command in COMMANDS.items()), sep="\n")
    else:
        near = question(difflib.get_close_matches(name, COMMANDS, n=1))
        raise UsageError(f"there is no command '{name}'; allowed are {', '.join(COMMANDS)}.{near}")
