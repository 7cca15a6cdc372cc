"""A program for torchrun: several commands one after the other, one of which may be made to fail.

    evaluating.py FILE    a JSON list of [name of the root script, its arguments, its exit code]

FAULT=error or kill lets the process FAULTY fail so in its second batch of completions.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import eval_model_all
import generate_samples
import lota.evaluate.engine as engine
from lota.distributed.processes import joined

SCRIPTS = {"eval_model_all": eval_model_all, "generate_samples": generate_samples}
generate, calls = engine.generate, []


def failing(*arguments, **settings):
    calls.append(1)
    if len(calls) == 2 and os.environ.get("FAULTY") == os.environ["RANK"]:
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("what went wrong")
    return generate(*arguments, **settings)


def main() -> None:
    engine.generate = failing
    with joined():
        for script, arguments, expected in json.loads(Path(sys.argv[1]).read_text()):
            code = SCRIPTS[script].main(arguments)
            if code != expected:
                sys.exit(code)


if __name__ == "__main__":
    main()
