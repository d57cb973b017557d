"""Commands that are killed, started twice, interrupted, or run out of disk: nothing may be lost, and nobody misled.

    python launch/faults.py --times=20 --json=faults.json       # hours on two cores; `study` takes most of it
    python launch/faults.py --faults=kill --commands=quantize,calibrate --times=3

What a disturbed command leaves in the end is compared, byte for byte where bytes are promised, with what an undisturbed
one leaves; nothing else may be there.

kill: a command is killed (SIGKILL, with all processes it has started) at a random moment, and started again, until it
was killed so often.

writes: the disk is full from the first write of a run on, from the second, and so on to the last: by a library that is
preloaded (full_disk.c, needs a C compiler). The command says so in one line with status 2, or does without what it
could not write. With room again it goes on.

kill at writes: the same, but that the command is killed at the write.

full: the disk is a small file system (where the superuser runs this), of several sizes that are too small.

twice: two are started on one directory at once. Both end well, or one does and the other says in one line why not.

interrupt: Ctrl-C at a random moment. The command ends with status 130, training that could save with 75, or as it
would have without; it prints no traceback, and leaves nothing half-written.

pipe: whoever reads the output has gone. The command ends quietly, with status 141 or as it would have without.

A row of the table is a command under one fault: how often it was disturbed, and how often that ended otherwise. With
`--json`, rows of a file that is there are kept unless they are run again.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz  # noqa: E402  (it also finds the library, and keeps accelerators out of this)

Line = list[str]
LineOf = Callable[[Path], Line]
Row = dict[str, object]
CONFIG = ["--config=quickstart:smoke", "--config.validation.data="]
RESUMED = ("train", "train quantized", "study", "prepare_data", "extract shards", "quantize", "calibrate", "enroll")
"""What is killed at random moments: what takes long, and what writes models, policies and stores."""
LONG = ("train", "train quantized", "study", "prepare_data")
"""What is disturbed at its work: the lines of `fuzz.good_lines` that begin so only look for data that are not there."""
NOTES = ("starts.json", "report.html", "steps.json")
"""Files that tell times: they are compared by what else they hold, or not at all."""
NOTE = re.compile(r"\..+\.kmq-([0-9a-f]{32}\.json|[0-9a-f]{20}-\d+\.onnx)")
"""Converted models and notes of them spare work: a disturbed command may leave more of these, or fewer."""
FAULTS = ("kill", "writes", "kill at writes", "full", "twice", "interrupt", "pipe")


def commands(base: Path) -> dict[str, LineOf]:
    """Every command that writes, by name: the command line for a directory to write into."""
    steps = ["--config.epochs=6.0", "--config.checkpoint_epochs=0.5", "--config.average_last=0"]
    quantized = ["--config.quant.bits=2", f"--config.init_from={base}/run", "--config.quant.fit_crops=8"]
    voices = [f"{base}/several/s{s}/{u}.wav" for s in range(4) for u in range(2)]
    made: dict[str, LineOf] = {
        "train": lambda out: ["train", *CONFIG, *steps, f"--workdir={out}"],
        "train quantized": lambda out: ["train", *CONFIG, *steps, *quantized, f"--workdir={out}"],
        "study": lambda out: ["study", "--config=quickstart:smoke", f"--workdir={out}"],
        "prepare_data": lambda out: ["prepare_data", f"--source={base}/many", f"--out={out}/set", "--workers=1"],
        "extract shards": lambda out: [
            *("extract", f"--model={base}/model.kmq", f"--data={base}/many", f"--out={out}/e.npz", "--shards=20")
        ],
        "enroll": lambda out: [
            *("enroll", f"--store={out}/people", f"--model={base}/model.kmq", "--speaker=a", "--replace"),
            *voices,
        ],
    }
    for line in fuzz.good_lines(base, Path("OUT")):
        writes = any("OUT" in word for word in line)
        if writes and line[0] not in made and line[0] not in ("train", "study"):
            made[line[0]] = lambda out, line=line: [word.replace("OUT", str(out)) for word in line]
    return made


def left_by(folder: Path) -> dict[str, object]:
    """What a command has left, by file, in a form that is equal where results are."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "/checkpoints/" in f"/{name}" or NOTE.fullmatch(path.name):
            continue
        found[name] = _content(path)
    for place in sorted(folder.rglob("checkpoints")):
        if place.is_dir():
            found[str(place.relative_to(folder))] = sorted(os.listdir(place)), _weights(place.parent)
    return found


def _content(path: Path) -> object:
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: line.get(key) for key in ("step", "loss", "gradient_norm")} for line in lines]
    if path.name == "summary.json":
        kept = ("finished", "steps", "loss", "validation_eer", "utterances", "speakers", "hours", "rejected")
        summary = json.loads(path.read_text())
        return {key: summary[key] for key in kept if key in summary}
    if path.suffix == ".sqlite":  # but for the moments at which speakers were enrolled
        with contextlib.closing(sqlite3.connect(path)) as store:
            rows = store.execute("SELECT speaker, path, hash, seconds, embedding FROM recording").fetchall()
            return rows + store.execute("SELECT * FROM model").fetchall()
    if path.suffix in (".png", ".html") or path.name in NOTES:
        return True
    return path.read_bytes()


def _weights(workdir: Path) -> str:
    """A fingerprint of the weights of a run, made in another process: this one must not start JAX."""

    def show() -> None:
        from kmq_jax.models.speaker_model import fingerprint, load_model

        print(fingerprint(load_model(workdir)))

    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        fuzz.forked(show, log, 120, Path(place))
        return log.read_text(errors="replace").strip()[-300:]


def run(line: Line, log: Path, limit: float = 900) -> tuple[int | None, str]:
    """Runs a command to its end, or kills it after `limit` seconds (status None)."""
    status = fuzz.forked(lambda: fuzz.command(line), log, limit, log.parent)
    return status, log.read_text(errors="replace")


def not_compared(expected: dict[str, object]) -> Row:
    """For a row: the files that differ between two undisturbed runs, if there are any."""
    differ = [name for name, value in expected.items() if value is ...]
    return {"not_compared": differ} if differ else {}


def difference(found: dict[str, object], expected: dict[str, object]) -> str:
    """The first file that differs; empty where none does."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} was left"
        if expected[name] is not ... and found[name] != expected[name]:
            return f"{name} differs"
    return ""


def undisturbed(line_of: LineOf, place: Path, name: str = "out") -> tuple[dict[str, object], float]:
    """What a command leaves, and the seconds that it takes. What differs between two runs is `...`."""
    runs = []
    for _ in range(2):
        (place / name).mkdir()
        began = time.monotonic()
        status, said = run(line_of(place / name), place / "log")
        took = time.monotonic() - began
        if status != 0:
            raise RuntimeError(said[-600:])
        runs.append(left_by(place / name))
        shutil.rmtree(place / name)
    first, second = runs
    return {key: value if value == second.get(key, ...) else ... for key, value in first.items()}, took


def refusal(status: int | None, said: str) -> str:
    """What is wrong with how a command ended that could not do its work; empty where it said so in one line."""
    told = [line for line in said.splitlines() if line.startswith("kmq-jax")]
    if status not in (0, 2) or "Traceback" in said or status == 2 and len(told) != 1:
        return f"status {status}: {said[-600:]}"
    return ""


def kill(line_of: LineOf, place: Path, times: int, rng: random.Random) -> Row:
    """Kills a command so often; see above."""
    expected, took = undisturbed(line_of, place)
    out, done, wrong = place / "out", 0, []
    while done < times:
        out.mkdir()
        for _ in range(min(4, times - done)):
            status, said = run(line_of(out), place / "log", took * rng.random())
            if status is not None:  # it was faster
                break
            done += 1
        status, said = run(line_of(out), place / "log")
        if status != 0 or (changed := difference(left_by(out), expected)):
            wrong.append(f"after {done} kills: {said[-600:] if status != 0 else changed}")
        shutil.rmtree(out)
    return {"times": done, "violations": wrong, **not_compared(expected)}


def writes(line_of: LineOf, place: Path, most: int, deadly: bool) -> Row:
    """Lets each write of a command fail, and all behind it, or kills it there: at most so many, evenly spread."""
    expected, _ = undisturbed(line_of, place)
    out, log, counted = place / "out", place / "log", place / "counted"

    def disturbed(allowed: int) -> None:
        disk = ctypes.CDLL(None)
        disk.full_disk.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
        disk.full_disk(os.fsencode(out), allowed, deadly)
        os.environ["FULL_DISK"] = f"{allowed} {int(deadly)} {out}"
        try:
            fuzz.command(line_of(out))
        finally:
            counted.write_text(str(disk.full_disk_seen()))

    out.mkdir()
    fuzz.forked(lambda: disturbed(-1), log, 900, place)
    shutil.rmtree(out)
    total = int(counted.read_text())
    chosen = sorted({i * total // min(most, total) for i in range(min(most, total))}) if total else []
    wrong = []
    for allowed in chosen:
        out.mkdir()
        status = fuzz.forked(lambda allowed=allowed: disturbed(allowed), log, 300, place)
        said, where = log.read_text(errors="replace"), f"write {allowed + 1} of {total}"
        if deadly:
            problem = "" if status in (0, -signal.SIGKILL) else f"status {status}: {said[-600:]}"
        else:
            problem = refusal(status, said) or (difference(left_by(out), expected) if status == 0 else "")
        if problem:
            wrong.append(f"{where}: {problem}")
        status, said = run(line_of(out), log)
        if status != 0 or (changed := difference(left_by(out), expected)):
            wrong.append(f"{where}, with room again: {said[-600:] if status != 0 else changed}")
        shutil.rmtree(out)
    return {"times": len(chosen), "writes": total, "violations": wrong, **not_compared(expected)}


def full(line_of: LineOf, place: Path, sizes: int) -> Row:
    """Runs a command on disks of several sizes that are too small for it."""
    whole = place / "whole"
    whole.mkdir()
    run(line_of(whole), place / "log")
    needs = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    shutil.rmtree(whole)
    expected, _ = undisturbed(lambda out: line_of(out / "w"), place, "disk")
    disk, tried, wrong = place / "disk", 0, []
    for i in range(sizes):
        disk.mkdir()
        size = max(4096, 4096 * ((i + 1) * needs // (sizes + 1) // 4096))
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            disk.rmdir()
            return {"times": 0, "violations": [], "skipped": "no right to mount"}
        try:
            status, said = run(line_of(disk / "w"), place / "log")
            tried += status != 0
            if problem := refusal(status, said):
                wrong.append(f"{size} bytes: {problem}")
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            status, said = run(line_of(disk / "w"), place / "log")
            if status != 0 or (changed := difference(left_by(disk), expected)):
                wrong.append(f"{size} bytes, with room again: {said[-600:] if status != 0 else changed}")
        finally:
            subprocess.run(["umount", disk], check=False)
            disk.rmdir()
    return {"times": tried, "violations": wrong, **not_compared(expected)}


def twice(lines: tuple[LineOf, LineOf], place: Path, times: int) -> Row:
    """Starts two commands on one directory."""
    expected = [undisturbed(line_of, place)[0] for line_of in dict.fromkeys(lines)]
    out, wrong, refused = place / "out", [], 0
    for _ in range(times):
        out.mkdir()
        logs = [place / f"log{i}" for i in range(2)]
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(log.open("wb")).fileno() for log in logs]
            children = [
                fuzz.started(lambda line_of=line_of: fuzz.command(line_of(out)), file, file, place)
                for line_of, file in zip(lines, files)
            ]
            states = [fuzz.ended(child, 900) for child in children]
        said = [log.read_text(errors="replace") for log in logs]
        refused += states.count(2)
        problems = [problem for state, text in zip(states, said) if (problem := refusal(state, text))]
        if 0 not in states:
            problems.append(f"both were refused: {said[0][-300:]} {said[1][-300:]}")
        left = left_by(out)
        ended = [expected[i * (len(expected) - 1)] for i, state in enumerate(states) if state == 0]
        changes = [difference(left, one) for one in ended]
        if changes and all(changes):
            problems.append(f"states {states}: {changes[0]}")
        wrong += problems
        shutil.rmtree(out)
    return {"times": times, "refused": refused, "violations": wrong, **not_compared(expected[0])}


def interrupt(line: Line, base: Path, place: Path, times: int, rng: random.Random) -> Row:
    """Presses Ctrl-C so often in a command."""
    out, log = place / "out", place / "log"
    row, took = {"times": 0, "violations": []}, 0.0
    for number in range(-2, times):  # two run to their ends: the first compiles, the second tells how long it takes
        shutil.rmtree(out, ignore_errors=True)
        make = fuzz.Maker("", base, out)
        at, began = None if number < 0 else 1.1 * took * rng.random(), time.monotonic()
        status = fuzz.forked(lambda: fuzz.command(line), log, 600, make.folder, at)
        took = time.monotonic() - began if number < 0 else took
        said = log.read_text(errors="replace")
        if number < 0 and status != 0:
            raise RuntimeError(said[-600:])
        stopped = number >= 0 and status in (75, 130)
        row["times"] += stopped
        if wrong := fuzz.problems(0 if stopped else status, said, make):
            row["violations"].append(f"{' '.join(line)[:200]} after {at} s: {', '.join(wrong)}: {said[-600:]}")
    return row


def pipe(line: Line, base: Path, place: Path) -> Row:
    """Runs a command whose output nobody reads: first the output, then the messages as well."""
    wrong, log, gone = [], place / "log", 0
    for messages in (False, True):
        shutil.rmtree(place / "out", ignore_errors=True)
        make = fuzz.Maker("", base, place / "out")
        reader, writer = os.pipe()
        os.close(reader)
        with log.open("wb") as file:
            error = writer if messages else file.fileno()
            status = fuzz.ended(fuzz.started(lambda: fuzz.command(line), writer, error, make.folder), 120)
        os.close(writer)
        said = log.read_text(errors="replace")
        gone += status == 141
        found = fuzz.problems(0 if status == 141 else status, "" if status == 2 and messages else said, make)
        found = [one for one in found if not (messages and one == "0 lines of error")]
        if found or "BrokenPipe" in said:
            wrong.append(f"{' '.join(line)[:200]}: {', '.join(found)}: {said[-600:]}")
    return {"times": 2, "gone": gone, "violations": wrong}


def rows_of(fault: str, names: list[str], args: argparse.Namespace, base: Path, place: Path) -> Iterator[Row]:
    """Disturbs commands by one fault; a row for each."""
    known, rng = commands(base), random.Random(args.seed)
    if fault in ("interrupt", "pipe"):
        out = place / "out" / "out"
        lines = {name: [known[name](out)] for name in LONG}
        for line in fuzz.good_lines(base, out):
            if line[0] not in LONG:
                lines.setdefault(line[0], []).append(line)
        for name in names:
            for line in lines.get(name, ()):
                own = interrupt(line, base, place, args.times, rng) if fault == "interrupt" else pipe(line, base, place)
                yield {"command": name, **own}
        return
    for name in (name for name in known if name in names):
        if fault == "kill":
            found = kill(known[name], place, args.times, rng)
        elif fault in ("writes", "kill at writes"):
            found = writes(known[name], place, args.writes, fault != "writes")
        elif fault == "full":
            found = full(known[name], place, args.sizes)
        else:
            found = twice((known[name], known[name]), place, args.times)
        yield {"command": name, **found}
    if fault == "twice" and "train" in names:
        seeds = tuple(lambda out, seed=seed: [*known["train"](out), f"--config.seed={seed}"] for seed in (0, 3))
        yield {"command": "train, two seeds", **twice(seeds, place, args.times)}


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'fault':16}{'command':18}{'disturbed':>10}{'violations':>12}"]
    for row in rows:
        lines.append(f"{row['fault']:16}{row['command']:18}{row['times']:10}{len(row['violations']):12}")
    return "\n".join(lines)


def add_row(row: Row, rows: list[Row], file: Path | None) -> None:
    """Adds a row in place of the one of the same fault and command, and writes all of them."""
    same = next((one for one in rows if (one["fault"], one["command"]) == (row["fault"], row["command"])), None)
    if same is not None:
        rows[rows.index(same)] = row
    else:
        rows.append(row)
    if file is not None:
        file.write_text(json.dumps({"kind": "faults", "rows": rows}, indent=2) + "\n")


def _merged(rows: list[Row]) -> list[Row]:
    """Rows of the same command as one: a command may have several command lines."""
    made: dict[object, Row] = {}
    for row in rows:
        one = made.setdefault(row["command"], {"command": row["command"], "times": 0, "violations": []})
        for key, value in row.items():
            if key != "command":
                one[key] = value + one.get(key, type(value)()) if key != "skipped" else value
    return list(made.values())


def _preload(place: Path) -> None:
    """Starts this script again with the library for `writes`, where it is not there."""
    if "full_disk" in os.environ.get("LD_PRELOAD", ""):
        return
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        sys.exit("`writes` needs a C compiler")
    library, source = place / "full_disk.so", Path(__file__).with_name("full_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    done = subprocess.run([sys.executable, *sys.argv], env={**os.environ, "LD_PRELOAD": str(library)}, check=False)
    sys.exit(done.returncode)


def _prepare(base: Path, place: Path, trained: bool) -> None:
    """Makes the files that commands read."""
    base.mkdir()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{place}/cache"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    fuzz._import_all()
    if fuzz.forked(lambda: fuzz.base_files(base), place / "log", 600, base) != 0:
        sys.exit((place / "log").read_text())
    for i in range(200):
        (base / "many" / f"s{i % 10}").mkdir(parents=True, exist_ok=True)
        shutil.copy(base / "audio" / "a.wav", base / "many" / f"s{i % 10}" / f"{i}.wav")
    if trained:
        run(["train", *CONFIG, "--config.average_last=0", f"--workdir={base}/run"], place / "log")


def main() -> None:
    """Disturbs the commands and prints the table; the status is 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--commands", help="names separated by commas; left out: all that a fault concerns")
    parser.add_argument("--times", type=int, default=20, help="that a command is killed, interrupted or started twice")
    parser.add_argument("--writes", type=int, default=10_000, help="of a run that are tried at most")
    parser.add_argument("--sizes", type=int, default=8, help="of the full disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.faults.split(",")) - set(FAULTS):
        sys.exit(f"--faults (={sorted(unknown)[0]}) must be among {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows: list[Row] = []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    asked = shlex.join(word for word in sys.argv[1:] if not word.startswith("--json"))
    own = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if "writes" in args.faults:
            _preload(place)
        base = place / "base"
        names = args.commands.split(",") if args.commands else []
        _prepare(base, place, not names or "train quantized" in names)
        every = [*commands(base), *(line[0] for line in fuzz.good_lines(base, base))]
        if unknown := set(names) - set(every):
            sys.exit(f"--commands (={sorted(unknown)[0]}) must be among {', '.join(dict.fromkeys(every))}")
        for fault in args.faults.split(","):
            (place / fault).mkdir()
            for name in names or (RESUMED if fault == "kill" else dict.fromkeys(every)):
                began = time.monotonic()
                for row in _merged(list(rows_of(fault, [name], args, base, place / fault))):
                    about = {"seconds": round(time.monotonic() - began, 1), "made_by": f"launch/faults.py {asked}"}
                    row = {"fault": fault, **row, **about}
                    print(json.dumps(row), flush=True)
                    add_row(row, rows, args.json)
                    own.append(row)
    print(table(own))
    sys.exit(1 if any(row["violations"] for row in own) else 0)


if __name__ == "__main__":
    main()
