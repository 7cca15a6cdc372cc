"""Deltas on models as vLLM holds them: every weight is what vLLM would have loaded of the tuned folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_stand_in
from delta_models import bits, change, disjoint_deltas, save_model
from launched import Launched

from examples import vllm_switch
from lota.delta import extract
from lota.share.vllm import DeltaWorker

WAYS = [{}, {"rank": 0, "size": 2}, {"rank": 1, "size": 2}, {"dtype": torch.float32}]


@pytest.fixture(autouse=True)
def vllm(monkeypatch, tmp_path):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))  # of remembered hashes
    vllm_stand_in.install(monkeypatch)


@pytest.fixture
def three(tmp_path):
    """A folder with base/, t0/ to t2/ and the deltas between them."""
    disjoint_deltas(tmp_path)
    return tmp_path


def make(folder, **sizes):
    return vllm_stand_in.worker_class(DeltaWorker)(folder, **sizes)


def same(worker, folder, **sizes) -> bool:
    loaded = dict(vllm_stand_in.PackedModel(folder, **sizes).named_parameters())
    return all(torch.equal(bits(p), bits(loaded[name])) for name, p in worker.model.named_parameters())


@pytest.mark.parametrize("sizes", WAYS, ids=str)
def test_the_weights_are_those_of_the_tuned_folder(three, sizes):
    worker = make(three / "base", **sizes)
    files = [str(three / f"{i}.safetensors") for i in range(3)]
    assert worker.attach_delta(files[0]) == files[:1] and same(worker, three / "t0", **sizes)
    assert not same(worker, three / "base", **sizes)
    assert worker.switch_delta(files[1]) == files[1:2] and same(worker, three / "t1", **sizes)
    assert worker.attach_delta(files[2]) == files[1:] == worker.attached_deltas()
    assert worker.detach_delta(files[1]) == files[2:] and same(worker, three / "t2", **sizes)
    assert worker.detach_delta() == [] and same(worker, three / "base", **sizes)


def test_several_deltas_add_up(three):
    worker = make(three / "base")
    for i in range(2):
        worker.attach_delta(str(three / f"{i}.safetensors"))
    base, state = (vllm_stand_in.tensors_of(three / "base") for _ in range(2))
    for i in range(2):
        for name, value in vllm_stand_in.tensors_of(three / f"t{i}").items():
            changed = value.view(torch.int16) != base[name].view(torch.int16)
            state[name][changed] = value[changed]
    both = make(three / "base")
    both.model.load_weights(state.items())
    for a, b in zip(worker.model.parameters(), both.model.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_a_wrong_base_an_overlap_and_a_damaged_file_change_nothing(three, tmp_path):
    change(save_model(tmp_path / "base2"), seed=9).save_pretrained(tmp_path / "base2")
    extract(tmp_path / "base2", three / "t0", tmp_path / "other.safetensors")
    extract(three / "base", three / "t0", tmp_path / "same.safetensors", mask=None, task="again")
    (tmp_path / "cut.safetensors").write_bytes((three / "0.safetensors").read_bytes()[:-1])
    worker = make(three / "base")
    worker.attach_delta(str(three / "0.safetensors"))
    for call, file, message in (
        ("attach_delta", "other", r"is of another base than .*base: that has the hash"),
        ("switch_delta", "other", "is of another base"),
        ("attach_delta", "same", r"same.safetensors changes [\d,]+ entries of .*0.safetensors"),
        ("attach_delta", "0", "is attached already"),
        ("attach_delta", "cut", "truncated or changed"),
        ("attach_delta", "nowhere", "does not exist"),
        ("detach_delta", "1", "is not attached; attached: "),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(worker, call)(str(tmp_path / f"{file}.safetensors"))
        assert same(worker, three / "t0") and worker.execute_model("a request") == "answered a request"


def test_a_failure_halfway_stops_the_worker_until_it_is_restored(three):
    worker = make(three / "base")
    worker.attach_delta(str(three / "0.safetensors"))
    worker.model.failing = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(RuntimeError, match=r"failed halfway .*the device was lost.*restore_base"):
        worker.switch_delta(str(three / "1.safetensors"))
    assert not same(worker, three / "t0") and not same(worker, three / "t1")
    for call in (
        lambda: worker.execute_model("a request"),
        lambda: worker.attach_delta(str(three / "1.safetensors")),
        worker.attached_deltas,
        lambda: worker.detach_delta(str(three / "0.safetensors")),
    ):
        with pytest.raises(RuntimeError, match="failed halfway"):
            call()
    with pytest.raises(RuntimeError, match="start the server again"):
        worker.restore_base()  # still failing
    worker.model.failing = None
    worker.restore_base()
    assert same(worker, three / "base") and worker.attached_deltas() == []
    assert worker.execute_model("a request") == "answered a request"
    worker.attach_delta(str(three / "1.safetensors"))
    assert same(worker, three / "t1")


def test_what_vllm_cannot_patch_is_refused_before_the_first_write(three):
    """Though it is noticed when the tensor is written, and this is not the first tensor."""
    worker = make(three / "base")
    worker.attach_delta(str(three / "0.safetensors"))
    worker.lota_deltas.tried.clear()
    worker.model.refused = "model.layers.1.mlp.down_proj.weight"
    for call in (
        lambda: worker.switch_delta(str(three / "1.safetensors")),
        lambda: worker.attach_delta(str(three / "1.safetensors")),
        worker.detach_delta,
    ):
        with pytest.raises(NotImplementedError, match="is quantized"):
            call()
        assert same(worker, three / "t0") and worker.execute_model("a request") == "answered a request"
        assert worker.attached_deltas() == [str(three / "0.safetensors")]
    worker.model.refused = None
    worker.switch_delta(str(three / "1.safetensors"))
    assert same(worker, three / "t1")


def test_workers_change_together_or_not_at_all(three):
    """A file that one machine lacks, other files, a model that one cannot patch, a failure halfway."""
    with Launched([str(Path(__file__).parent / "vllm_workers.py"), str(three)], 2, three) as workers:
        ended = workers.ended(120)
    assert ended.codes == [0, 0], ended.output
    first, second = (json.loads((three / f"answers{rank}.json").read_text()) for rank in range(2))
    t0, served = ("t0", "answered it"), "answered it"
    for steps, node in ((first, "node0"), (second, "node1")):
        assert [tuple(step[1:]) for step in steps[:4]] == [t0] * 4
        for step in steps[4:6]:
            assert (
                "failed halfway (RuntimeError: the device was lost)" in step[0] == f"RuntimeError: {step[2]}"
            )
        assert steps[4][1] is None or node == "node0"
        assert steps[6] == ["None", "base", served]
        assert steps[7] == [f"['{three / node / '1.safetensors'}']", "t1", served]
    told = "RuntimeError: worker {} cannot make this change, so none has made it: "
    assert second[1][0].startswith("ValueError: ") and "does not exist" in second[1][0]
    assert first[1][0] == told.format(1) + second[1][0]
    assert first[2][0].startswith("ValueError: worker 1 has read other deltas")
    assert second[2][0].startswith("ValueError: worker 0 has read other deltas")
    assert first[3][0].startswith("NotImplementedError: ") and second[3][0] == told.format(0) + first[3][0]
    assert first[4][1] == "t1"  # it has written all, and yet serves no request


def test_a_served_revision_of_the_hub_is_the_base(three, monkeypatch):
    """Not the newest one, which is another model here."""
    name, cache = "org/name", three / "hub/models--org--name"
    shutil.copytree(three / "base", cache / "snapshots/c0ffee")
    shutil.copytree(three / "t2", cache / "snapshots/newest")
    (cache / "refs").mkdir()
    for branch, commit in (("main", "newest"), ("v1", "c0ffee")):
        (cache / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(three / "hub"))
    worker = make(three / "base")
    worker.model_config.model, worker.model_config.revision = name, "v2"
    with pytest.raises(ValueError, match="served at the revision v2, which the hub's cache lacks"):
        worker.attach_delta(str(three / "0.safetensors"))
    worker.model_config.revision = "v1"
    worker.attach_delta(str(three / "0.safetensors"))
    assert same(worker, three / "t0")


def test_the_base_is_what_the_cache_had_at_the_first_call(three, monkeypatch):
    """Of a hub id without a revision, and the hub is not asked: there, and later here, main has moved."""
    cache = three / "hub/models--org--name"
    shutil.copytree(three / "base", cache / "snapshots/loaded")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("loaded")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(three / "hub"))
    monkeypatch.setattr("lota.models.tensor_files._fetch", lambda _: three / "t2")
    monkeypatch.setattr("lota.models.tensor_files.refuse_absent", lambda _: None)
    worker = make(three / "base")
    worker.model_config.model, worker.model_config.revision = "org/name", None
    assert worker.attached_deltas() == []
    shutil.copytree(three / "t2", cache / "snapshots/newest")
    (cache / "refs/main").write_text("newest")
    worker.attach_delta(str(three / "0.safetensors"))
    assert same(worker, three / "t0")


def test_weights_that_were_replaced_on_disk_are_another_base(three):
    worker = make(three / "base")
    model = save_model(three / "base")
    change(model, seed=4).save_pretrained(three / "base")
    with pytest.raises(ValueError, match="is of another base"):
        worker.attach_delta(str(three / "0.safetensors"))


def test_the_example_asks_under_each_delta(three, monkeypatch, capsys):
    worker = make(three / "base")

    class LLM:
        """Answers with the number of a model whose weights it has."""

        def __init__(self, model, worker_extension_cls):
            assert model == str(three / "base")
            assert worker_extension_cls == f"{DeltaWorker.__module__}.{DeltaWorker.__name__}"
            self.fresh = True

        def collective_rpc(self, method, args=()):
            self.fresh = False
            return [getattr(worker, method)(*args)]

        def reset_prefix_cache(self):
            self.fresh = True

        def generate(self, prompts, sampling):
            assert self.fresh and sampling == {"temperature": 0.0, "max_tokens": 64}
            name = next(name for name in ("base", "t0", "t1", "t2") if same(worker, three / name))
            return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {name} ")])]

    monkeypatch.setattr(sys.modules["vllm"], "LLM", LLM, raising=False)
    monkeypatch.setattr(sys.modules["vllm"], "SamplingParams", dict, raising=False)
    deltas = [str(three / f"{i}.safetensors") for i in (1, 2)]
    answers = vllm_switch.main([str(three / "base"), *deltas])
    assert [text.strip() for text in answers.values()] == ["base", "t1", "t2", "base"]
    assert "switched to" in capsys.readouterr().out
