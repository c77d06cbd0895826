"""Crafted files and words through the command line's own entry: what comes out must be an answer or an error of ours.

    python benchmarks/fuzz.py [--minutes 20 | --examples 500] [--seed 0] [--target study ...] [--out DIR]
    python benchmarks/fuzz.py --replay FILE

Each example runs in a forked process of its own, in a copy of a small world (models, tasks, recipes, a finished run),
under limits of time and memory. It is clean when the command ends with a documented exit code, says why where that is
not 0, shows no traceback, sends no control character to the terminal, and stays within the limits. An example that is
not is written to a file, three at most of each kind of finding, and can be replayed. Exits 1 where there is one.
Needs no network, no Ray and no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from hostile import Case, Targets, build_world, lay_out  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis.strategies import SearchStrategy  # noqa: E402

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CI": "1",
    "COLUMNS": "100",
}
EXIT_CODES = (0, 1, 2, 3, 4, 130)
CPU_SECONDS, WALL_SECONDS = 10.0, 60.0
PEAK_BYTES = 2_000_000_000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
KEPT = 3  # files of one kind of finding
BATCH = 40


@dataclass(slots=True)
class Result:
    """How one example ended."""

    finding: str  # empty: clean
    detail: str
    seconds: float  # of the processor
    peak: int  # bytes, of the whole process


@dataclass(slots=True)
class Tally:
    """Of one target."""

    examples: int = 0
    unclean: int = 0
    slowest: float = 0.0
    peak: int = 0
    findings: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Running:
    """An example at work in a process of its own."""

    case: Case
    child: int
    descriptor: int  # readable when the process has ended
    slot: Path
    latest: float  # when it must have ended

    def result(self) -> Result:
        """How it ended; killed where it has not."""
        late = not select.select([self.descriptor], [], [], 0)[0]
        if late:
            os.kill(self.child, signal.SIGKILL)
        _, status, usage = os.wait4(self.child, 0)
        os.close(self.descriptor)
        seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        if late:
            return Result("hangs", f"no end after {WALL_SECONDS:.0f} s", seconds, peak)
        ended = self.slot / "ended"
        code, trace = json.loads(ended.read_text()) if ended.exists() else (None, "")
        return Result(*judged(code, trace, (self.slot / "said").read_bytes(), status, seconds, peak), seconds, peak)


class Runner:
    """Runs cases in copies of a world, one forked process each, so many at a time."""

    def __init__(self, world: Path, scratch: Path, jobs: int = 1) -> None:
        self.world, self.slots = world, [scratch / f"slot-{i}" for i in range(jobs)]

    def warm(self) -> None:
        """Import and compile once what every example would import and compile again."""
        for name in ("run_study", "study.from_evolve", "export.commands", "export.stack_folder"):
            import_module(f"optimizer.{name}")
        owned = packages_distributions()  # what is installed stays: asked for once
        import_module("optimizer.search.plan").require_own_names.__defaults__ = (lambda: owned,)
        for argv in (["check", "study.yaml"], ["merge", "merge.yaml", "warm"], ["front", "run"], ["status", "run"]):
            slot, there = self.slots[0], os.getcwd()
            code, trace = _call(argv, self._laid_out({"files": {}}, slot), slot / "said")
            os.chdir(there)
            finding, detail = judged(code, trace, (slot / "said").read_bytes(), 0, 0.0, 0)
            if finding or code:
                raise SystemExit(f"the sound world is not clean: {' '.join(argv)}: {finding}\n{detail}")
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Result]]:
        """Run cases; each with its result as it ends."""
        waiting, free = list(reversed(cases)), list(self.slots)
        running: list[Running] = []
        while waiting or running:
            while waiting and free:
                running.append(self._start(waiting.pop(), free.pop()))
            patience = max(0.0, min(example.latest for example in running) - time.monotonic())
            ready = select.select([example.descriptor for example in running], [], [], patience)[0]
            now = time.monotonic()
            over = [example for example in running if example.descriptor in ready or example.latest <= now]
            running = [example for example in running if example not in over]
            for example in over:
                yield example.case, example.result()
                free.append(example.slot)

    def _start(self, case: Case, slot: Path) -> Running:
        workspace = self._laid_out(case, slot)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _limit_memory()
            code, trace = _call(case["argv"], workspace, slot / "said")
            (slot / "ended").write_text(json.dumps([code, trace]))
            os._exit(0)
        return Running(case, child, os.pidfd_open(child), slot, time.monotonic() + WALL_SECONDS)

    def _laid_out(self, case: Case, slot: Path) -> Path:
        """A workspace with a home above it; nothing of the case before is left."""
        shutil.rmtree(slot, ignore_errors=True)
        workspace = slot / "home" / "work"
        workspace.parent.mkdir(parents=True)
        lay_out(self.world, workspace, case)
        return workspace


def _limit_memory() -> None:
    now = int(re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (now + PEAK_BYTES, now + PEAK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _call(argv: Sequence[str], workspace: Path, said: Path) -> tuple[int | None, str]:
    """Call the command line in the workspace: its exit code (None: it has none), and the traceback of what escaped."""
    from optimizer.cli import app

    os.chdir(workspace)
    os.environ["HOME"] = str(workspace.parent)
    os.environ["COLUMNS"] = "100"
    kept = [os.dup(1), os.dup(2)]
    target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    code: int | None = None
    trace = ""
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    try:
        app(args=list(argv), prog_name="mergefront")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        trace = "".join(traceback.format_exception(error)[-40:])
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(target)
    return code, trace


def judged(code: int | None, trace: str, output: bytes, status: int, seconds: float, peak: int) -> tuple[str, str]:
    """What is unclean about an ending, and the detail."""
    text = output.decode("utf-8", "surrogateescape")
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}", text[-2000:]
    if code is None:
        return f"traceback: {_signature(trace)}", trace[-6000:]
    if "Traceback (most recent call last)" in text:
        return "traceback in the output", text[-3000:]
    if code not in EXIT_CODES:
        return f"exit code {code}", text[-2000:]
    if code and not text.strip():
        return f"exit code {code} without a word", ""
    if found := CONTROL.search(text) or re.search("[\udc80-\udcff]", text):
        return f"control character {found.group()!a} on the output", ascii(
            text[max(0, found.start() - 200) : found.end() + 50]
        )
    if len(text) > 20_000:
        return "more than 20,000 characters on the output", text[:2000]
    if seconds > CPU_SECONDS:
        return f"more than {CPU_SECONDS:.0f} s", f"{seconds:.1f} s of the processor\n{text[-1000:]}"
    if peak > PEAK_BYTES:
        return f"more than {PEAK_BYTES / 1e9:.0f} GB", f"{peak / 1e9:.2f} GB\n{text[-1000:]}"
    return "", text


def _signature(trace: str) -> str:
    """The kind of error, and the innermost place in our code."""
    ours = re.findall(r'File "[^"]*/((?:optimizer|evals|search_spaces)/[^"]+)", line (\d+)', trace)
    kind = next((line for line in reversed(trace.splitlines()) if line and not line.startswith((" ", "\t"))), "?")
    return f"{kind.split(':')[0]} in {':'.join(ours[-1]) if ours else '?'}"


# --- many of them ----------------------------------------------------------------------------------------------------


class Session:
    """Counts, says how it goes, and keeps what is unclean."""

    def __init__(self, runner: Runner, out: Path) -> None:
        self.runner, self.out = runner, out
        self.tallies: dict[str, Tally] = {}
        self.begun = self.shown = time.monotonic()

    def take(self, cases: Sequence[Case]) -> None:
        """Run cases, and count them."""
        for case, result in self.runner.run(cases):
            self._count(case, result)

    def _count(self, case: Case, result: Result) -> None:
        tally = self.tallies.setdefault(case["target"], Tally())
        tally.examples += 1
        tally.slowest, tally.peak = max(tally.slowest, result.seconds), max(tally.peak, result.peak)
        if result.finding:
            tally.unclean += 1
            number = tally.findings[result.finding] = tally.findings.get(result.finding, 0) + 1
            if number <= KEPT:
                self._keep(case, result)
        self._show()

    def _keep(self, case: Case, result: Result) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{case['target']}-{result.finding}")[:100]
        count = len(list(self.out.glob(f"{name}-*.json")))
        content = {"finding": result.finding, "detail": result.detail, **case}
        (self.out / f"{name}-{count}.json").write_text(json.dumps(content, indent=1))

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.shown > (1 if sys.stderr.isatty() else 20):
            self.shown = now
            end = "\r" if sys.stderr.isatty() else "\n"
            line = f"{self.examples} examples, {self.unclean} unclean, {now - self.begun:.0f} s"
            print(line, end=end, file=sys.stderr, flush=True)

    @property
    def examples(self) -> int:
        return sum(tally.examples for tally in self.tallies.values())

    @property
    def unclean(self) -> int:
        return sum(tally.unclean for tally in self.tallies.values())

    def table(self) -> str:
        lines = [f"{'target':<10} {'examples':>8} {'clean':>7} {'unclean':>7} {'slowest':>8} {'peak':>8}"]
        for target, t in sorted(self.tallies.items()):
            clean, peak = t.examples - t.unclean, f"{t.peak / 1e6:.0f} MB"
            lines.append(f"{target:<10} {t.examples:>8} {clean:>7} {t.unclean:>7} {t.slowest:>6.1f} s {peak:>8}")
            lines += [f"    {count} x {finding}" for finding, count in sorted(t.findings.items(), key=lambda e: -e[1])]
        clean, slowest = self.examples - self.unclean, max((t.slowest for t in self.tallies.values()), default=0)
        peak = f"{max((t.peak for t in self.tallies.values()), default=0) / 1e6:.0f} MB"
        lines.append(f"{'all':<10} {self.examples:>8} {clean:>7} {self.unclean:>7} {slowest:>6.1f} s {peak:>8}")
        return "\n".join(lines)


def batches(targets: Targets, names: Sequence[str], first: int) -> Iterator[tuple[str, int]]:
    """(target, seed), round after round."""
    round_seed = first
    while True:
        yield from ((name, round_seed) for name in names)
        round_seed += 1


def drawn(strategy: SearchStrategy[Case], number: int, size: int) -> list[Case]:
    """So many cases, the same for the same seed."""
    cases: list[Case] = []

    @seed(number)
    @settings(
        max_examples=size,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def gather(case: Case) -> None:
        cases.append(case)

    gather()
    return cases


def explore(
    session: Session, targets: Targets, names: Sequence[str], first: int, *, examples: int, minutes: float
) -> None:
    """Batch by batch of each target, until there are enough examples or the time is over."""
    size = max(1, min(BATCH, examples // len(names))) if examples else BATCH
    for name, number in batches(targets, names, first):
        over = time.monotonic() - session.begun > 60 * minutes if minutes else session.examples >= examples
        if over:
            return

        session.take(drawn(targets.strategy(name), number, size))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after so long; 20 where no --examples is given"
    )
    parser.add_argument("--examples", type=int, default=0, help="stop after about so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("fuzz-unclean"), help="folder for unclean examples")
    parser.add_argument("--replay", type=Path, help="run one kept example, and show what it says")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="examples at a time")
    arguments = parser.parse_args(words)
    os.environ |= ENVIRONMENT  # before torch is imported
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        os.environ["HF_HOME"] = str(Path(scratch) / "hf")  # read once, at import; else the first slot's home, for all
        world = Path(scratch) / "world"
        build_world(world)
        runner = Runner(world, Path(scratch), arguments.jobs)
        runner.warm()
        if arguments.replay:
            return replay(runner, arguments.replay)
        targets = Targets(world)
        names = arguments.target or list(targets.cases)
        if unknown := [name for name in names if name not in targets.cases]:
            parser.error(f"the targets are {', '.join(targets.cases)}; given {', '.join(unknown)}")
        session = Session(runner, arguments.out.resolve())
        minutes = arguments.minutes or (0.0 if arguments.examples else 20.0)
        with suppress(KeyboardInterrupt):
            explore(session, targets, names, arguments.seed, examples=arguments.examples, minutes=minutes)
        print(session.table())
        if session.unclean:
            print(f"kept in {session.out}; run one again with --replay FILE")
        return 1 if session.unclean else 0


def replay(runner: Runner, file: Path) -> int:
    """Run a kept example again."""
    case: dict[str, Any] = json.loads(file.read_text())
    ((_, result),) = runner.run([case])
    print(f"mergefront {' '.join(map(ascii, case['argv']))}")
    print(f"{result.finding or 'clean'}, {result.seconds:.1f} s, {result.peak / 1e6:.0f} MB\n{result.detail}")
    return 1 if result.finding else 0


if __name__ == "__main__":
    sys.exit(main())
