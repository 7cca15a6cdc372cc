"""Our samples in the hands of the alpaca_eval package: its loader, its pairing, its evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import generate_samples
from tests.chars import save_pair

alpaca_eval = pytest.importorskip("alpaca_eval", reason="alpaca_eval is in requirements-dev.txt")
from alpaca_eval import annotators, utils  # noqa: E402

TEMPLATE = "{instruction}\n<A>{output_1}</A>\n<B>{output_2}</B>\n"
CONFIG = """
longer_wins:
  prompt_template: {folder}/template.txt
  completion_parser_kwargs:
    outputs_to_match: {{1: 'Output \\(a\\)', 2: 'Output \\(b\\)'}}
"""


def judge(prompts, **settings) -> dict:
    """In place of a model that is asked over the network: the longer output, then the later word."""
    answers = []
    for prompt in prompts:
        a, b = (prompt.split(f"<{x}>")[-1].split(f"</{x}>")[0] for x in "AB")
        answers.append("Output (a)" if (len(a), a) > (len(b), b) else "Output (b)")
    zeros = [0.0] * len(answers)
    return {"completions": answers, "price_per_example": zeros, "time_per_example": zeros}


class OfflineSingle(annotators.SinglePairwiseAnnotator):
    def __init__(self, **settings) -> None:
        super().__init__(**{**settings, "fn_completions": judge})


class OfflineAnnotator(annotators.PairwiseAnnotator):
    """alpaca_eval's annotator with our judge; prompts, order of outputs, parsing are the package's own."""

    SingleAnnotator = OfflineSingle


@pytest.fixture(autouse=True)
def quiet():
    """The package sets the root logger's level and pandas' options when it is imported and used."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def references(shared: Path) -> Path:
    return shared / "data/tasks/alpaca_eval/eval.json"


@pytest.fixture
def samples(shared: Path, tmp_path: Path) -> Path:
    """Answers to all 805 instructions by a tiny random model, as the command writes them."""
    arguments = ["--prompt_set", "alpaca_eval", "--data_dir", str(shared / "data"), "--temperatures", "0.7"]
    arguments += ["--model_name", "tiny", "--model_path", str(save_pair(tmp_path / "model"))]
    arguments += ["--max_length", "46", "--max_prompt_length", "40", "--chunk_size", "128"]
    assert generate_samples.main([*arguments, "--out", str(tmp_path)]) == 0
    return tmp_path / "alpaca_eval_temp0.7.json"


def config(folder: Path) -> Path:
    """An annotator's configuration as the package wants it: a folder with configs.yaml."""
    (folder / "longer_wins").mkdir()
    (folder / "longer_wins/template.txt").write_text(TEMPLATE)
    (folder / "longer_wins/configs.yaml").write_text(CONFIG.format(folder=folder / "longer_wins"))
    return folder / "longer_wins"


@pytest.mark.slow
def test_a_win_rate_over_the_805_references(samples: Path, references: Path, tmp_path: Path):
    ours, theirs = (json.loads(path.read_text()) for path in (samples, references))
    loaded = utils.load_or_convert_to_dataframe(samples)
    assert loaded.to_dict("records") == ours
    assert utils.get_generator_name(None, loaded) == "tiny"
    assert list(loaded["instruction"]) == [row["instruction"] for row in theirs]

    # one reference shortened, so that some samples win, and one equal
    theirs[0]["output"], theirs[1]["output"] = "x", ours[1]["output"]
    board, annotations = alpaca_eval.evaluate(
        model_outputs=samples,
        reference_outputs=theirs,
        annotators_config=config(tmp_path),
        Annotator=OfflineAnnotator,
        fn_metric="get_winrate",
        sort_by="win_rate",
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        output_path=tmp_path / "results",
        caching_path=None,
    )
    points = []
    for mine, other in zip((s["output"] for s in ours), (r["output"] for r in theirs), strict=True):
        points.append(0.5 if mine == other else float((len(mine), mine) > (len(other), other)))
    assert 0 < sum(points) < 805
    assert len(annotations) == 805
    assert board.loc["tiny", "n_total"] == 805
    assert board.loc["tiny", "win_rate"] == pytest.approx(100 * sum(points) / 805)
    assert (tmp_path / "results/leaderboard.csv").is_file()
