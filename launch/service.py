"""The verifier as a service runs it: thousands of calls of new lengths, from threads, forked and spawned processes.

    python launch/service.py --calls=10000 --json=faults.json      # minutes
    python launch/service.py --calls=200 --parts=forked

No two recordings are of one length. Memory is looked at after each tenth of the calls; once the first half is over it
may grow no more than by `--grow` MB, nor may open files. What threads and processes answer is what one process answers
that asks one call after another.

A row of the table is one verifier: how many calls, and what was wrong. The file is that of faults.py, beside it.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import faults  # noqa: E402
import fuzz  # noqa: E402  (it also finds the library, and keeps accelerators out of this)
import numpy as np  # noqa: E402

RATE, SHORTEST, STEP, LENGTHS = 16000, 2400, 7, 18000
"""Hz, and the lengths that recordings have in samples: 0.15 s to 8 s, each once."""
LONG_EVERY = 1000
"""Calls between recordings of over a minute, which are embedded in chunks."""
PARTS = ("cascade, onnxruntime", "cascade, jax", "store", "threads", "forked", "spawned")
Ask = Callable[[int], float]


def recording(number: int) -> tuple[np.ndarray, int]:
    """Noise of a length that no other number has, of the first `LENGTHS`."""
    length = SHORTEST + STEP * (number * 7919 % LENGTHS)
    if number % LONG_EVERY == LONG_EVERY - 1:
        length = 61 * RATE + STEP * number
    rng = np.random.default_rng(number)
    return (0.1 * rng.standard_normal(length)).astype(np.float32), RATE


def cascade(base: Path, engine: str) -> Ask:
    """Asks a cascade whether two new recordings are of one speaker: the score."""
    from kmq_jax.cascade.verifier import load_cascade

    verifier = load_cascade(base, engine=engine)
    return lambda call: verifier.verify(recording(2 * call), recording(2 * call + 1)).score


def store(base: Path) -> Ask:
    """Asks a store of speakers whether a new recording is of one of them: the score."""
    from kmq_jax.speakers.store import SpeakerStore

    people = SpeakerStore(base / "people")
    return lambda call: people.verify("a", recording(call)).score


def held() -> tuple[float, int]:
    """The memory of this process in MB, and its open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def long_run(make: Callable[[], Ask], calls: int, grow: float) -> faults.Row:
    """Asks one call after another, and looks at memory and open files."""
    ask, seen, wrong = make(), [], []
    for call in range(calls):
        if not np.isfinite(ask(call)):
            wrong.append(f"call {call}: no finite score")
        if (call + 1) % max(calls // 10, 1) == 0:
            seen.append(held())
    middle, last = seen[len(seen) // 2 - 1], seen[-1]
    if last[0] > middle[0] + grow:
        wrong.append(f"memory grew from {middle[0]:.0f} to {last[0]:.0f} MB")
    if last[1] > middle[1]:
        wrong.append(f"open files grew from {middle[1]} to {last[1]}")
    return {"times": calls, "violations": wrong, "megabytes": [round(one[0], 1) for one in seen]}


def answers(make: Callable[[], Ask], calls: range) -> dict[int, float]:
    """The scores of some calls."""
    ask = make()
    return {call: ask(call) for call in calls}


def told(make: Callable[[], Ask], calls: range, queue: "multiprocessing.Queue[object]") -> None:
    """Puts the answers into a queue, for another process."""
    queue.put(answers(make, calls))


class Made:
    """Opens a cascade where it is called; can be sent to another process."""

    def __init__(self, base: Path, engine: str):
        """Remembers what to open."""
        self.base, self.engine = base, engine

    def __call__(self) -> Ask:
        """Opens it."""
        return cascade(self.base, self.engine)


def wrong_answers(found: dict[int, float], expected: dict[int, float]) -> list[str]:
    """The calls that were answered otherwise."""
    return [
        f"call {call}: {found.get(call)}, not {score}"
        for call, score in expected.items()
        if call not in found or abs(found[call] - score) > 1e-5
    ]


def threads(make: Callable[[], Ask], calls: int, many: int = 8) -> faults.Row:
    """Asks one verifier from several threads at once, from the first call on."""
    ask = make()
    with ThreadPoolExecutor(many) as pool:
        found = dict(zip(range(calls), pool.map(ask, range(calls))))
    return {"times": calls, "violations": wrong_answers(found, answers(make, range(calls)))}


def processes(make: Callable[[], Ask], calls: int, kind: str, many: int = 4) -> faults.Row:
    """Asks from several processes; forked ones have what their parent opened, but has not used."""
    context = multiprocessing.get_context(kind)
    opened = make() if kind == "fork" else None
    queue = context.Queue()
    parts = [range(i, calls, many) for i in range(many)]
    asked: Callable[[], Ask] = make if opened is None else Opened(opened)
    children = [context.Process(target=told, args=(asked, part, queue)) for part in parts]
    for child in children:
        child.start()
    found: dict[int, float] = {}
    wrong = []
    for _ in children:
        try:
            found |= queue.get(timeout=300)
        except Exception as error:
            wrong.append(f"a process did not answer: {type(error).__name__}")
            break
    for child in children:
        child.join(timeout=10)
        if child.exitcode != 0:
            wrong.append(f"a process ended with {child.exitcode}")
            child.kill()
    if kind == "fork":
        answers(make, range(1))  # this process embeds: one that is forked now lacks its threads
        said = context.Process(target=refused, args=(opened,))
        said.start()
        said.join(timeout=60)
        if said.exitcode != 0:
            wrong.append(f"forked after the first call: {said.exitcode}, not a refusal in one line")
            said.kill()
    return {"times": calls, "violations": wrong + wrong_answers(found, answers(make, range(calls)))}


class Opened:
    """What the parent of a forked process has opened."""

    def __init__(self, ask: Ask):
        """Remembers it."""
        self.ask = ask

    def __call__(self) -> Ask:
        """Gives it."""
        return self.ask


def refused(ask: Ask) -> None:
    """Ends well where a call is refused with advice."""
    from kmq_jax.core.errors import UserError

    try:
        ask(0)
    except UserError as error:
        os._exit(0 if "spawn" in str(error) else 1)
    os._exit(2)


def run_part(part: str, base: Path, calls: int, grow: float) -> faults.Row:
    """One row."""
    if part == "threads":
        return threads(Made(base, "onnxruntime"), calls)
    if part in ("forked", "spawned"):
        return processes(Made(base, "auto"), calls, "fork" if part == "forked" else "spawn")
    return long_run(Opened(store(base)) if part == "store" else Made(base, part.rpartition(" ")[2]), calls, grow)


def main() -> None:
    """Runs every part in a process of its own and prints the table; the status is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--parts", default=";".join(PARTS), help="separated by semicolons")
    parser.add_argument("--grow", type=float, default=32.0, help="MB that memory may grow by in the second half")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    asked = " ".join(word for word in sys.argv[1:] if not word.startswith("--json"))
    own = []
    with tempfile.TemporaryDirectory() as directory:
        base, log = Path(directory) / "base", Path(directory) / "log"
        base.mkdir()
        fuzz._import_all()
        if fuzz.forked(lambda: fuzz.base_files(base), log, 600, base) != 0:
            sys.exit(log.read_text())
        for part in args.parts.split(";"):
            began = time.monotonic()
            status = fuzz.forked(
                lambda part=part: print(json.dumps(run_part(part, base, args.calls, args.grow))), log, 7200, base
            )
            said = log.read_text(errors="replace")
            found = json.loads(said.splitlines()[-1]) if status == 0 else {"times": 0, "violations": [said[-600:]]}
            about = {"seconds": round(time.monotonic() - began, 1), "made_by": f"launch/service.py {asked}".strip()}
            row = {"fault": "long service", "command": part, **found, **about}
            print(json.dumps(row), flush=True)
            faults.add_row(row, rows, args.json)
            own.append(row)
    print(faults.table(own))
    sys.exit(1 if any(row["violations"] for row in own) else 0)


if __name__ == "__main__":
    main()
