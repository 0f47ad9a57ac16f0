"""All evidence, from nothing: python benchmarks/run_all.py --work DIR [--data DIR] [EXPERIMENT …]

Goes on where it was stopped: every finished cell is in evidence.json, every unfinished run in its directory. A cell is
measured again if its settings, prompts, recipe or decoder changed, not if only the code of OpenTAO or of the
experiments did: to do all of it anew, name another file with --results, and put it in the place of evidence.json for
pictures and pages. Decoders are trained under --work: in a new folder their weights may differ, and then all that is
of them is measured again. At the end RESULTS.md is written again. Alone on the machine; two processes that train at
once slow each other down manifold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "evidence")]
import compute  # noqa: E402
import labels  # noqa: E402
import multi  # noqa: E402
import objectives  # noqa: E402
import peer  # noqa: E402
import pictures  # noqa: E402
import recipes  # noqa: E402
import sizes  # noqa: E402
import unbroken  # noqa: E402
from lab import RESULTS, Lab  # noqa: E402
from run import write_page  # noqa: E402
from small import TRAIN  # noqa: E402

from opentao.allocator import use_large_pages  # noqa: E402

EXPERIMENTS: dict[str, Callable[[Lab], object]] = {
    "labels": lambda lab: labels.measure(lab, "1M", TRAIN, TRAIN),
    "compute": lambda lab: compute.measure(lab, "1M", TRAIN),
    "multi-task": lambda lab: multi.measure(lab, "1M", TRAIN),
    "sizes": lambda lab: sizes.measure(lab, TRAIN),
    "objectives": lambda lab: [objectives.measure(lab, task) for task in objectives.small_tasks(lab, "1M")],
    "recipes": lambda lab: recipes.measure(lab, [r.name for r in recipes.RECIPES]),
    "unbroken": lambda lab: unbroken.measure(lab, [r.name for r in recipes.RECIPES]),
    "peer": lambda lab: [peer.measure(lab, match) for match in peer.matches(lab)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS], help="default: all, in this order")
    parser.add_argument("--work", type=Path, required=True, help="where runs lie: about 10 GB")
    parser.add_argument("--data", type=Path, help="folder of the public data; without it, it is fetched")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of cells; default: %(default)s")
    given = parser.parse_args()
    use_large_pages()
    lab = Lab(work=given.work.resolve(), data=given.data and given.data.resolve(), results=given.results.resolve())
    for name in given.experiments or EXPERIMENTS:
        EXPERIMENTS[name](lab)
        if lab.results == RESULTS:
            pictures.draw_all(lab)
            write_page()


if __name__ == "__main__":
    main()
