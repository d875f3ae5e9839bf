"""Hostile input and crashes, by the thousand: what came of each, and how many came out well.

    python tests/campaign                          every kind, 20 minutes in all
    python tests/campaign values --tries 500       one kind, so many tries
    python tests/campaign crashes --seed 7         others than those of seed 0
    python tests/campaign --again "NAME"           one try again, as the report calls it, in this process, with its whole error

Tries that the report has are not done again, so a campaign that was ended goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parent.parent))

import open_clip.tokenizer  # noqa: F401  what every try would import anew
import torch
from given import make_given
from transformers import AutoConfig, AutoTokenizer, BlipConfig, CLIPConfig, PreTrainedTokenizerFast  # noqa: F401
from tries import VERDICTS, WELL, run_tries

KINDS = ("values", "shards", "folders", "crashes", "resources")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="of " + ", ".join(KINDS))
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--tries", type=int, default=sys.maxsize, help="of each kind, at most")
    asked.add_argument("--minutes", type=float, default=20.0, help="for all kinds together")
    asked.add_argument("--out", type=Path, default=Path("runs/campaign"))
    asked.add_argument("--again", default="", help="name of a try")
    asked.add_argument("--save", type=Path, help="a JSON to which what came out is added, as the docs show it")
    words = asked.parse_args()
    torch.set_num_threads(1)
    out = words.out.resolve()
    given = make_given(out / "given")
    kinds = words.kinds or KINDS
    work = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else out) / f"campaign-{os.getpid()}"
    totals, bad = Counter(), []
    for kind in kinds:
        tries = __import__(kind).all_tries(given, words.seed)
        if words.again:
            for one in itertools.islice(tries, 100_000):
                if one.name == words.again:
                    work.mkdir(parents=True)
                    one.do(work)
                    print("right")
                    return 0
            continue
        end = time.monotonic() + 60 * words.minutes / len(kinds)
        report = out / f"seed-{words.seed}.jsonl"
        for line in run_tries(itertools.islice(tries, words.tries), work / "try", report):
            totals[kind, line["verdict"]] += 1
            if line["verdict"] not in WELL:
                bad.append(line)
                print(f"{line['verdict']}: {kind} {line['name']}\n    {line['seen'][:300]}", flush=True)
            if time.monotonic() > end:
                break
    for kind in kinds:
        count = {verdict: totals[kind, verdict] for verdict in VERDICTS if totals[kind, verdict]}
        print(f"{kind}: {sum(count.values())} tries;", ", ".join(f"{number} {verdict}" for verdict, number in count.items()))
    if words.save:
        save(words.save, {kind: {verdict: totals[kind, verdict] for verdict in VERDICTS} for kind in kinds}, words.seed)
    return bool(bad)


def save(path: Path, counts: dict[str, dict[str, int]], seed: int) -> None:
    """Add a campaign to those that the docs show, in the place of an earlier one of its seed and kind."""
    told = json.loads(path.read_text()) if path.exists() else []
    rest = [line for line in told if not (line["seed"] == seed and line["kind"] in counts)]
    about = dict(seed=seed, day=time.strftime("%Y-%m-%d"), torch=torch.__version__, python=sys.version.split()[0])
    new = [dict(kind=kind, **about, **found) for kind, found in counts.items() if sum(found.values())]
    path.write_text(json.dumps(rest + new, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
