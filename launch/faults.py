"""Commands that are killed, started twice, or run out of disk: nothing may be lost, and nobody misled.

    python launch/faults.py --kills=20 --json=faults.json     # hours on two cores; `study` takes most of it
    python launch/faults.py --commands=quantize,calibrate --kills=3 --no-study

kill: a command is killed (SIGKILL, with all processes it has started) at a random moment, and started again, until it
was killed so often. What it leaves in the end equals what an uninterrupted one leaves, bit for bit, and there is
nothing else.

twice: two are started on one directory at once. One ends well, the other says in one line who holds it.

interrupt: Ctrl-C at a random moment of every command of `fuzz.py`. It ends with status 130, or as it would have
without, prints no traceback, and leaves nothing half-written.

full: the disk is full from some byte on (a small file system of its own, where the superuser runs this). The command
says so in one line with status 2. With room again it goes on, and ends as an undisturbed one does.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz  # noqa: E402  (it also finds the library, and keeps accelerators out of this)

Line = list[str]
CONFIG = ["--config=quickstart:smoke", "--config.validation.data="]
NOTES = ("starts.json", "summary.json", "report.html", "steps.json")
"""Files that tell times: they are compared by what else they hold, or not at all."""


def commands(base: Path) -> dict[str, Callable[[Path], Line]]:
    """Every command that is disturbed, by name: the command line for a directory to write into."""
    stages = [f"--stage={bits}:{base}/e{bits}.npz" for bits in (2, 4)]
    steps = ["--config.epochs=6.0", "--config.checkpoint_epochs=0.5", "--config.average_last=0"]
    quantized = ["--config.quant.bits=2", f"--config.init_from={base}/run", "--config.quant.fit_crops=8"]
    return {
        "train": lambda out: ["train", *CONFIG, *steps, f"--workdir={out}"],
        "train quantized": lambda out: ["train", *CONFIG, *steps, *quantized, f"--workdir={out}"],
        "prepare_data": lambda out: ["prepare_data", f"--source={base}/many", f"--out={out}/set", "--workers=1"],
        "quantize": lambda out: [
            "quantize",
            f"--model={base}/model.kmq",
            "--bits=2",
            "--unfitted",
            f"--out={out}/q.kmq",
        ],
        "calibrate": lambda out: [
            *("calibrate", *stages, f"--reference={base}/e4.npz", f"--trials={base}/trials", f"--out={out}/p.json")
        ],
        "study": lambda out: ["study", "--config=quickstart:smoke", f"--workdir={out}"],
    }


def left_by(folder: Path) -> dict[str, object]:
    """What a command has left, by file, in a form that is equal where results are."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "/checkpoints/" in f"/{name}":
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: line.get(key) for key in ("step", "loss", "gradient_norm")} for line in lines]
        elif path.name == "summary.json":
            kept = ("finished", "steps", "loss", "validation_eer", "utterances", "speakers", "hours", "rejected")
            summary = json.loads(path.read_text())
            found[name] = {key: summary[key] for key in kept if key in summary}
        elif path.suffix in (".png", ".html") or path.name in NOTES:
            found[name] = True
        else:
            found[name] = path.read_bytes()
    for place in sorted(folder.rglob("checkpoints")):
        if place.is_dir():
            found[str(place.relative_to(folder))] = _weights(place.parent)
    return found


def _weights(workdir: Path) -> str:
    """A fingerprint of the weights of a run, made in another process: this one must not start JAX."""
    code = "import sys; from kmq_jax.models.speaker_model import *; print(fingerprint(load_model(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, workdir], capture_output=True, text=True, cwd=_root(), check=False
    )
    return done.stdout.strip() or done.stderr[-300:]


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


def run(line: Line, log: Path, limit: float = 900) -> tuple[int | None, str]:
    """Runs a command to its end, or kills it after `limit` seconds (status None)."""
    status = fuzz.forked(lambda: fuzz.command(line), log, limit, log.parent)
    return status, log.read_text(errors="replace")


def difference(found: dict[str, object], expected: dict[str, object]) -> str:
    """The first file that differs; empty where none does."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} was left"
        if found[name] != expected[name]:
            return f"{name} differs"
    return ""


def kill(name: str, line_of: Callable[[Path], Line], place: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """Kills a command so often; see above."""
    log, whole = place / "log", place / "whole"
    whole.mkdir()
    begin = time.monotonic()
    status, said = run(line_of(whole), log)
    if status != 0:
        return {"fault": "kill", "command": name, "kills": 0, "violations": [said[-300:]]}
    took, expected = time.monotonic() - begin, left_by(whole)
    done = rounds = 0
    wrong: list[str] = []
    while done < kills:
        folder = place / f"killed{rounds}"
        folder.mkdir()
        rounds += 1
        for _ in range(min(4, kills - done)):
            status, said = run(line_of(folder), log, took * rng.random())
            if status is not None:  # it was faster
                break
            done += 1
        status, said = run(line_of(folder), log)
        if status != 0 or (changed := difference(left_by(folder), expected)):
            wrong.append(f"round {rounds}: {said[-300:] if status != 0 else changed}")
        shutil.rmtree(folder)
    return {"fault": "kill", "command": name, "kills": done, "rounds": rounds, "violations": wrong}


def twice(name: str, line_of: Callable[[Path], Line], place: Path) -> dict[str, object]:
    """Starts a command twice on one directory."""
    folder = place / "twice"
    folder.mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "kmq_jax", *line_of(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_root(),
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in started]
    states = sorted(process.returncode for process in started)
    refused = [text for process, text in zip(started, said) if process.returncode == 2]
    wrong = []
    # Where the first is done before the second looks, the second finds all done.
    if states not in ([0, 2], [0, 0]):
        wrong.append(f"states {states}: {said[0][-200:]} {said[1][-200:]}")
    if refused and "is being written to by process" not in refused[0]:
        wrong.append(refused[0][-300:])
    status, text = run(line_of(folder), place / "log")
    if status != 0:
        wrong.append(text[-300:])
    return {"fault": "twice", "command": name, "states": states, "violations": wrong}


def interrupt(base: Path, place: Path, times: int, rng: random.Random) -> list[dict[str, object]]:
    """Presses Ctrl-C so often in each command; see above."""
    rows: dict[str, dict] = {}
    for i, line in enumerate(fuzz.good_lines(base, place / "interrupted" / "out")):
        row = rows.setdefault(line[0], {"fault": "interrupt", "command": line[0], "interrupted": 0, "violations": []})
        took = 0.0
        for number in range(-1, times):  # the first runs to its end, and tells how long that takes
            shutil.rmtree(place / "interrupted", ignore_errors=True)
            make = fuzz.Maker(str(i), base, place / "interrupted")
            at, began = None if number < 0 else 1.1 * took * rng.random(), time.monotonic()
            status = fuzz.forked(lambda line=line: fuzz.command(line), place / "log", 120, make.folder, at)
            took = time.monotonic() - began if number < 0 else took
            said = (place / "log").read_text(errors="replace")
            row["interrupted"] += status == 130
            wrong = fuzz.problems(0 if status == 130 else status, said, make)
            if wrong:
                row["violations"].append(f"{' '.join(line)[:200]} after {at} s: {', '.join(wrong)}: {said[-600:]}")
    return list(rows.values())


def full(name: str, line_of: Callable[[Path], Line], place: Path, sizes: int) -> dict[str, object]:
    """Runs a command on disks of several sizes that are too small for it."""
    whole = place / "roomy"
    whole.mkdir()
    run(line_of(whole), place / "log")
    expected = left_by(whole)
    needs = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    tried, wrong = 0, []
    for i in range(sizes):
        disk = place / f"disk{i}"
        disk.mkdir()
        size = max(4096, 4096 * ((i + 1) * needs // (sizes + 1) // 4096))
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            return {"fault": "full", "command": name, "tried": 0, "violations": [], "skipped": "no right to mount"}
        try:
            status, said = run(line_of(disk / "w"), place / "log")
            told = [line for line in said.splitlines() if line.startswith("kmq-jax")]
            tried += status != 0
            if status not in (0, 2) or "Traceback" in said or status == 2 and len(told) != 1:
                wrong.append(f"{size} bytes: status {status}: {said[-400:]}")
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            status, said = run(line_of(disk / "w"), place / "log")
            (place / "roomy2").mkdir(exist_ok=True)
            if status != 0 or (changed := difference(left_by(disk / "w"), expected)):
                wrong.append(f"{size} bytes, with room again: {said[-400:] if status != 0 else changed}")
        finally:
            subprocess.run(["umount", disk], check=False)
    return {"fault": "full", "command": name, "tried": tried, "violations": wrong}


def main() -> None:
    """Disturbs the commands and prints the table; the status is 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sizes", type=int, default=8, help="of the full disk")
    parser.add_argument("--commands", help="names separated by commas; left out: all")
    parser.add_argument("--faults", default="kill,twice,full,interrupt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-study", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, rng, rows = time.monotonic(), random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        base.mkdir()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{place}/cache"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        fuzz._import_all()
        if fuzz.forked(lambda: fuzz.base_files(base), Path(place) / "log", 600, base) != 0:
            sys.exit((Path(place) / "log").read_text())
        for i in range(200):
            (base / "many" / f"s{i % 10}").mkdir(parents=True, exist_ok=True)
            shutil.copy(base / "audio" / "a.wav", base / "many" / f"s{i % 10}" / f"{i}.wav")
        known = commands(base)
        names = args.commands.split(",") if args.commands else [n for n in known if n != "study" or not args.no_study]
        if "train quantized" in names:
            run(["train", *CONFIG, "--config.average_last=0", f"--workdir={base}/run"], Path(place) / "log")
        faults = args.faults.split(",")
        if "interrupt" in faults:
            rows += interrupt(base, Path(place), max(args.kills // 4, 1), rng)
            print(*map(json.dumps, rows), sep="\n", flush=True)
        for name in names:
            for fault in (one for one in faults if one != "interrupt"):
                own = Path(place) / f"{name} {fault}"
                own.mkdir()
                if fault == "kill":
                    row = kill(name, known[name], own, args.kills, rng)
                elif fault == "twice":
                    if name in ("quantize", "calibrate"):
                        continue  # one file each, under its final name when it is whole: the last one stays
                    row = twice(name, known[name], own)
                else:
                    row = full(name, known[name], own, args.sizes)
                print(json.dumps(row), flush=True)
                rows.append(row)
                shutil.rmtree(own, ignore_errors=True)
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s")
    if args.json:
        summary = {"kind": "faults", "command": f"python launch/faults.py --kills={args.kills}", "rows": rows}
        args.json.write_text(json.dumps(summary | {"seconds": round(seconds, 1)}, indent=2) + "\n")
    sys.exit(1 if any(row["violations"] for row in rows) else 0)


if __name__ == "__main__":
    main()
