"""`kmq-jax demo`: a page on which a model or a cascade is tried in a browser."""

import dataclasses
from pathlib import Path

from kmq_jax.cli.command import Command
from kmq_jax.cli.flags import options_of, way_of
from kmq_jax.core.options import Options, option, refuse_given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Options):
    """What the command reads and writes."""

    model: str | None = option("MODEL, or an .onnx file of `export --features=inside`", None, metavar="MODEL")
    cascade: Path | None = option("directory of a policy and its models", None, metavar="DIR")
    threshold: str | None = option("of --model: a number, or a file of `threshold`", None, metavar="X|FILE")
    bits: int | None = option("bits at which a nested --model is read; left out: the most", None, at_least=1)
    out: Path | None = option(
        "write the page here and serve nothing: any static host can serve it", None, metavar="DIR", writes="directory"
    )
    port: int = option("of this machine that the page is served at; 0: a free one", 0, at_least=0, at_most=65535)
    runtime: Path | None = option(
        "onnxruntime-web as a .tgz file of `npm pack` or its directory; left out: downloaded from npm's registry once",
        None,
        metavar="TGZ|DIR",
    )


COMMAND = Command(
    "demo",
    "Serves a page on this machine alone, on which a model is tried in a browser: record or drop recordings, enrol,\n"
    "verify. The model runs in the page, by onnxruntime-web; recordings do not leave it.",
    "kmq-jax demo --model=runs/r34-4bit.kmq --threshold=threshold.json",
    (Files,),
)
# By way: what it needs, what else it may take.
_WAYS = {"cascade": ((), ()), "model": ((), ("threshold", "bits"))}


def main() -> None:
    """Runs the command."""
    files = options_of(Files, COMMAND.parse())
    way = way_of((files,), _WAYS, ("out", "port", "runtime"))
    if files.out:
        refuse_given(files, ("port",), "does not go with `out`: nothing is served")
    from kmq_jax.demo.page import demo_of_cascade, demo_of_model, write_demo
    from kmq_jax.demo.runtime import runtime_files
    from kmq_jax.demo.serve import serve
    from kmq_jax.scoring.threshold import read_threshold

    if way == "cascade":
        demo = demo_of_cascade(files.cascade or "")
    else:
        demo = demo_of_model(
            files.model or "", read_threshold(files.threshold) if files.threshold else None, files.bits
        )
    runtime = runtime_files(files.runtime)
    if files.out:
        write_demo(files.out, demo, runtime)
        print(f"{files.out}: a page for any static host, such as python -m http.server --directory={files.out}")
        return
    serve(lambda place: write_demo(place, demo, runtime), files.port, lambda address: print(address, flush=True))
