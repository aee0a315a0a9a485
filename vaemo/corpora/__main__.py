"""`python -m vaemo.corpora NAME ROOT --out M.jsonl`: a corpus as it is distributed becomes a manifest."""

from __future__ import annotations

from collections import Counter

from vaemo import cli
from vaemo.corpora.base import LABEL_LAG_S, NAMES, load_corpus
from vaemo.data.manifest import read_manifest, write_manifest
from vaemo.progress import say

PROG = "python -m vaemo.corpora"


def main(argv: list[str] | None, prog: str | None = None) -> None:
    """Write the manifest, read it again to check it, and print how to extract it."""
    parser = cli.Parser(prog=prog or PROG, description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("root", help="the corpus's folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="manifest to write, .jsonl or .parquet")
    parser.add_argument(
        "--label-lag-s", type=float, default=LABEL_LAG_S, help="delay of continuous annotations (default 2)"
    )
    args = parser.parse_args(argv)
    corpus = load_corpus(args.name, args.root, label_lag_s=args.label_lag_s)
    write_manifest(args.out, corpus.table())
    table = read_manifest(args.out, label_range=corpus.label_range)
    sessions, speakers = (len(set(table[name].to_pylist())) for name in ("session_id", "speaker_id"))
    labelled = table.num_rows - table["valence"].null_count
    say(f"{args.out}: {table.num_rows:,} utterances ({labelled:,} labelled), {sessions} sessions, {speakers} speakers")
    for name in ("split", "fold"):
        counts = Counter(value for value in table[name].to_pylist() if value is not None)
        if counts:
            say(f"  {name}: " + ", ".join(f"{value} {count:,}" for value, count in sorted(counts.items())))
    for note in corpus.notes:
        say(f"  {note}")
    low, high = corpus.label_range
    say(f"  extract it with --set labels.range=[{low:g},{high:g}]")


if __name__ == "__main__":
    cli.run(main, PROG)
