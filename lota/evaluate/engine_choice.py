"""Which engine a command's flags ask for, and what each of them cannot honour."""

from __future__ import annotations

import argparse
import importlib.util

from lota.distributed.processes import processes
from lota.evaluate.engine_openai import server_address
from lota.utils import Problems

CONCURRENCY = 64  # sequences in flight at a server or in vLLM
TIMEOUT = 600.0  # seconds
OPENAI, TRANSFORMERS, VLLM = ENGINES = ("openai", "transformers", "vllm")
# engine -> flag that it cannot honour -> why, and what to do instead
_LOADS = "the server holds the weights; "
_NO_SERVER = "talks to no server; add --engine openai, or leave it out"
UNUSED = {
    TRANSFORMERS: {
        "base_url": _NO_SERVER,
        "served_model": _NO_SERVER,
        "timeout": _NO_SERVER,
        "concurrency": "works on batches; give --bs (evaluation) or --chunk_size (samples)",
    },
    OPENAI: {
        "delta": _LOADS + "attach the delta there (docs/SERVING.md), or use --engine vllm or transformers",
        "archive": _LOADS + "serve a converted folder (convert_policy_to_hf_resize.py)",
        "dtype": _LOADS + "give the server its dtype (vllm serve --dtype)",
        "device": _LOADS + "choose the device where it is started",
        "bs": "has no batches of its own; give --concurrency",
    },
    VLLM: {
        "base_url": "runs in this process; add --engine openai to talk to a server",
        "served_model": "runs in this process; add --engine openai to talk to a server",
        "timeout": "runs in this process; add --engine openai to talk to a server",
        "archive": "loads whole folders; convert the checkpoint (convert_policy_to_hf_resize.py)",
        "device": "chooses its devices itself; set CUDA_VISIBLE_DEVICES",
        "bs": "makes its own batches; give --concurrency",
    },
}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what runs the model."""
    add = parser.add_argument
    add(
        "--engine",
        choices=ENGINES,
        default=TRANSFORMERS,
        help="what runs the model: transformers (default) or vllm in this process, or a server that speaks "
        "OpenAI's protocol (`vllm serve MODEL`); docs/SERVING.md",
    )
    add("--base_url", help="openai: the server, such as http://localhost:8000; its key is in OPENAI_API_KEY")
    add("--served_model", help="openai: the server's name of the model; default: the model as named here")
    add("--concurrency", type=int, help=f"openai, vllm: sequences in flight ({CONCURRENCY})")
    add("--timeout", type=float, help=f"openai: seconds that one request may take ({TIMEOUT:g})")


def check_engine(args: argparse.Namespace) -> None:
    """Raise ValueError with all that the engine asked for cannot honour, before anything is loaded."""
    problems = Problems()
    for flag, reason in UNUSED[args.engine].items():
        if getattr(args, flag, None):
            problems.found.append(f"--{flag}: --engine {args.engine} {reason}")
    if args.engine == OPENAI and not args.base_url:
        problems.found.append(
            "--engine openai: give --base_url, the server's address, such as http://localhost:8000"
        )
    elif args.engine == OPENAI:
        problems.attempt(server_address, args.base_url)
    for flag in ("concurrency", "timeout"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            problems.found.append(f"--{flag} {value}: must be above 0")
    if processes().count > 1:
        if args.engine != TRANSFORMERS:
            problems.found.append(
                f"--engine {args.engine}: one process asks for --concurrency sequences at a time; start it "
                "without torchrun"
            )
        if (args.device or "").startswith("cuda:"):
            problems.found.append(f"--device {args.device}: each process has a GPU of its own; leave it out")
    _check_installed(args.engine, problems)
    problems.refuse()


def _check_installed(engine: str, problems: Problems) -> None:
    if engine == OPENAI and importlib.util.find_spec("openai") is None:
        problems.found.append("--engine openai: openai is not installed: pip install openai")
    if engine == VLLM and importlib.util.find_spec("vllm") is None:
        problems.found.append(
            "--engine vllm: vllm is not installed here (it needs an environment of its own). Start "
            "`vllm serve MODEL` in that environment and use --engine openai --base_url http://HOST:8000, or "
            "install lota there (docs/SERVING.md)"
        )
