"""Serve several tasks from one base with vLLM: python examples/vllm_switch.py BASE sql.safetensors ...

Needs vLLM 0.33 and a GPU, in an environment of its own with lota beside it (docs/SERVING.md).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

PROMPT = "Question: Natalia sold 48 clips in April and half as many in May. How many did she sell?\nAnswer:"


def main(argv: Sequence[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="Hugging Face folder or hub id")
    parser.add_argument(
        "deltas", nargs="+", help="delta files of that base, or org/name[@revision] of the hub"
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args(argv)
    from vllm import LLM, SamplingParams  # slow to import

    llm = LLM(args.base, worker_extension_cls="lota.share.vllm.DeltaWorker")
    sampling = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)

    def answer() -> str:
        llm.reset_prefix_cache()  # it holds what the weights of before computed
        return llm.generate([args.prompt], sampling)[0].outputs[0].text

    answers = {"base": answer()}
    for delta in args.deltas:
        start = time.perf_counter()
        llm.collective_rpc("switch_delta", args=(delta,))
        print(f"switched to {delta} in {time.perf_counter() - start:.2f} s")
        answers[delta] = answer()
    llm.collective_rpc("detach_delta")
    answers["base again"] = answer()
    for name, text in answers.items():
        print(f"{name}: {text.strip()}")
    return answers


if __name__ == "__main__":
    main()
