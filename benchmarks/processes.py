"""Training in several processes: tokens per second, bytes sent and peak memory of replicas and of shards.

    python -m benchmarks.processes                    # CPU, 124M-parameter Llama shape, 1, 2 and 4 processes
    python -m benchmarks.processes --processes 1 2 --contestants replicated --rounds 9

Each contestant is the training loop itself, on a model with random weights and a random mask, in processes
of one thread (on GPUs: one GPU each). Contestants take turns, a few steps each, and wait meanwhile, so that
drift of the machine hits all alike; the ratios are of medians. The global batch is the same for all. Bytes
are those that the connections of a process have brought to the other side (on GPUs: those counted by
lota/distributed/replicated.py).
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import ROOT, SHAPES, build_model, random_mask
from lota.config import Config, LossConfig, ModelConfig
from lota.data.batches import ScheduledBatch
from lota.data.task import Task
from lota.distributed.processes import join, leave, processes
from lota.system import peak_memory_bytes
from lota.train.runlog import RunLog
from lota.train.trainer import Trainer
from tasks.base import Task as BaseTask

CONTESTANTS = {
    "replicated": "lota.train.trainer.Trainer",
    "sharded": "lota.train.sharded_trainer.ShardedTrainer",
}
TOKENIZER = ROOT / "assets" / "tiny-llama"


class Long(BaseTask):
    """Rows of more than `length` tokens, which a run cuts to that."""

    name = "long"
    fields = ("number",)
    length = 128
    rows = 4096

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
        return [{"number": i} for i in range(self.rows)]

    def prompt(self, row: dict[str, Any]) -> str:
        return f"{row['number']}:"

    def target(self, row: dict[str, Any]) -> str:
        return " " + " ".join(chr(97 + (7 * row["number"] + 3 * k) % 26) for k in range(2 * self.length))


def tcp_bytes() -> int:
    """That have left this process through its TCP connections and have arrived."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:  # no connection of TCP, or closed meanwhile
            continue
    return total


# A process of a contestant


def paced(name: str, steps: int) -> type[Trainer]:
    """A trainer that waits for a line of its standard input before each `steps` steps, and reports them."""

    kind: type[Trainer] = pkgutil.resolve_name(CONTESTANTS[name])

    class Paced(kind):  # type: ignore[misc, valid-type]
        def batches(self) -> Iterator[ScheduledBatch]:
            for at, batch in enumerate(super().batches()):
                if at % steps == 0:
                    if at:
                        self.report()
                    if not sys.stdin.readline():
                        return
                    self.began, self.sent = time.perf_counter(), tcp_bytes()
                yield batch

        def report(self) -> None:
            seconds = time.perf_counter() - self.began
            sent, tokens = tcp_bytes() - self.sent, steps * self.config.batch_size * self.config.max_length
            counted = getattr(self.optimizer.peers, "sent_bytes", 0) / self.progress.step
            own = {"sent": sent / steps, "counted": counted, "peak": peak_memory_bytes(self.device)}
            found = self.processes.gather(own)
            if self.processes.first:
                largest = {key: max(each[key] for each in found) for key in own}
                kept = self.n_trained
                print(json.dumps({"speed": tokens / seconds, "kept": kept, **largest}), flush=True)

    return Paced


def work(folder: Path, args: argparse.Namespace) -> None:
    """What each process of a contestant does."""
    torch.set_num_threads(args.threads)
    join()
    config = Config(
        exp_name=f"{args.contestant}-{processes().count}",
        model=ModelConfig(name_or_path=str(folder / "model")),
        loss=LossConfig("sft"),
        datasets=["long"],
        mask_path=str(folder / "mask.pt"),
        local_dirs=[str(folder)],
        batch_size=args.batch,
        max_length=args.length,
        max_prompt_length=args.length // 2,
        n_epochs=None,
        n_examples=1 << 20,
        do_first_eval=False,
        eval_every=1 << 30,
        debug=True,
        mask_of_other_base=True,
    )
    task = Long()
    task.length = args.length

    def find_task(name: str) -> Task:
        return task

    RunLog.advance = lambda *_: None  # type: ignore[method-assign]  # no bar
    paced(args.contestant, args.steps)(config, find_task).train()
    leave()


# All contestants


@dataclass
class Contestant:
    """Processes that train together when they are told to."""

    name: str
    running: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, name: str, count: int, folder: Path, arguments: list[str]) -> Contestant:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        running = []
        for rank in range(count):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            variables = {**os.environ, **{key: str(value) for key, value in given.items()}}
            command = [sys.executable, "-m", "benchmarks.processes", *arguments]
            process = subprocess.Popen(
                [*command, "--folder", str(folder), "--contestant", name],
                env={**variables, "MASTER_ADDR": "127.0.0.1"}, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            )  # fmt: skip
            running.append(process)
        return cls(f"{name}, {count}", running)

    def turn(self) -> dict[str, float]:
        """Let it train for some steps; returns what it reports."""
        for process in self.running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        stdout = self.running[0].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended")
        return dict(json.loads(line))

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the model and the mask."""
    from lota.models.loading import load_tokenizer

    args.dtype, args.device, args.checkpointing = "float32", "cpu", False
    model, tokenizer = build_model(args), load_tokenizer(str(TOKENIZER))
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    random_mask(model, args.sparsity).save(folder / "mask.pt")


def table(found: dict[str, list[dict[str, float]]], base: str) -> str:
    """A row per contestant, in Markdown."""
    columns = ("trainer, processes", "tokens/s", "to one process", "bytes sent per step",
               "to 4 x kept x 2(n-1)/n", "peak per process")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    speeds = {name: statistics.median(each["speed"] for each in turns) for name, turns in found.items()}
    for name, turns in found.items():
        count = int(name.partition(", ")[2])
        least = 4 * turns[-1]["kept"] * 2 * (count - 1) / count
        sent = statistics.median(each["sent"] or each["counted"] for each in turns)
        lines.append(
            f"| {name} | {speeds[name]:.0f} | {speeds[name] / speeds[base]:.2f} | {sent:,.0f} | "
            f"{sent / least if least else 0:.3f} | {turns[-1]['peak'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="124m")
    add("--sparsity", type=float, default=0.99)
    add("--batch", type=int, default=8, help="examples per step, of all processes together")
    add("--length", type=int, default=128, help="tokens per example")
    add("--processes", type=int, nargs="+", default=[1, 2, 4])
    add("--contestants", nargs="+", choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    add("--threads", type=int, default=1, help="per process")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=1, help="of a contestant's turn")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        return work(args.folder, args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args)
        chosen = [(name, n) for n in args.processes for name in args.contestants]
        alone = {(args.contestants[0], 1)}  # in one process all are the same
        chosen = [(name, n) for name, n in chosen if n > 1 or (name, n) in alone]
        started = [Contestant.start(name, n, folder, sys.argv[1:]) for name, n in chosen]
        found: dict[str, list[dict[str, float]]] = {each.name: [] for each in started}
        try:
            for number in range(args.rounds + 1):  # the first turn of each warms up
                for each in started:
                    turn = each.turn()
                    if number:
                        found[each.name].append(turn)
                        print(json.dumps({"contestant": each.name, **turn}), file=sys.stderr, flush=True)
        finally:
            for each in started:
                each.end()
    print(table(found, started[0].name))


if __name__ == "__main__":
    main()
