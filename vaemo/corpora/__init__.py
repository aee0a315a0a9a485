"""Corpora of the field, from their folders as distributed to manifests.

`python -m vaemo.corpora NAME ROOT --out M.jsonl`. Every reader gives rows of a manifest with labels on the corpus's
own scale, its official splits and its recording sessions as folds, where it has them.
"""

from vaemo.corpora.base import Corpus, load_corpus

__all__ = ["Corpus", "load_corpus"]
