"""How movie_snippets.csv was made, once, from the vaderSentiment 3.3.2 source distribution (MIT; licence beside).

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python demo/make_data.py vaderSentiment-3.3.2.tar.gz demo/movie_snippets.csv

Each row is a snippet of a movie review and the sign of its mean human rating; the few rated exactly 0 are left out.
"""

from __future__ import annotations

import csv
import io
import sys
import tarfile


def main(sdist: str, target: str) -> None:
    """Writes the CSV: columns text, label (positive or negative)."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as archive:
            raw = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    with open(target, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["text", "label"])
        for line in io.StringIO(raw.decode("utf-8")):
            _, rating, text = line.rstrip("\n").split("\t", 2)
            if float(rating) != 0.0:
                writer.writerow([text.strip(), "positive" if float(rating) > 0 else "negative"])


if __name__ == "__main__":
    main(*sys.argv[1:])
