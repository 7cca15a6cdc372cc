"""Readers of files that anybody may have made: an error that names the file, or what the file holds.

Never a hang, and never more than 64 MiB beyond what the file itself has.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crafted
import memory
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lota.delta import Delta, extract
from lota.masks import Mask
from lota.models.policy import read_policy
from lota.models.provenance import recorded_base, recorded_prompts
from lota.models.tensor_files import checkpoint_files, read_header
from lota.models.torch_files import map_tensors, read_torch_file
from lota.share.hf_folder import _listed
from lota.storage import parse_json

pytestmark = [memory.needs_proc, pytest.mark.usefixtures("bounded")]
MIB = 1 << 20
MOST = 64 * MIB
fuzzed = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def bounded() -> Iterator[None]:
    """Ends a test that hangs."""

    def late(*_: object) -> None:
        raise TimeoutError("a reader hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(150)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Address space for 64 MiB more: what takes more raises MemoryError, which is no ValueError."""
    now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What a reader makes of a file; None if it refuses it and says which."""
    try:
        with little_memory():
            return read(path)
    except ValueError as error:
        assert path.name in str(error) or path.parent.name in str(error)
        return None


def read_delta(path: Path) -> list[Any]:
    """Everything that it holds, or, of a file that claims a large model, the begin of each parameter."""
    delta = Delta.open(path)
    found = [delta.meta["base"], delta.names]
    for name in delta.parameters:
        positions, xors = delta.changes(name, 0, min(delta.parameters[name].numel, MIB))
        found += [name, delta.parameters[name].shape, positions.tolist(), xors.tolist()]
    return found


def read_mask(path: Path) -> list[Any]:
    mask = Mask.load(path)
    return [mask.meta, mask.shapes, {name: bits.tolist() for name, bits in mask.bits.items()}]


def read_checkpoint(path: Path) -> list[Any]:
    policy = read_policy(path)
    state = {name: (value.dtype, value.tolist()) for name, value in policy.state.items()}
    return [policy.step_idx, state, policy.metrics]


@pytest.fixture
def small(tmp_path) -> dict[str, Path]:
    """The smallest files of each kind."""
    base = {"w": torch.arange(24.0).reshape(4, 6).bfloat16(), "b": torch.ones(3)}
    tuned = {"w": base["w"].clone(), "b": base["b"] * 2}
    tuned["w"][1:3] *= 3
    for name, state in (("base", base), ("tuned", tuned)):
        torch.save({"step_idx": 1, "state": state, "metrics": {"loss": 0.5}}, tmp_path / f"{name}.pt")
    extract(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "delta.safetensors")
    kept = {name: base[name] != tuned[name] for name in base}
    mask = Mask.from_dense(kept, {"sparsity": 0.5, "scope": "w"})
    mask.save(tmp_path / "mask.pt")
    mask.save(tmp_path / "dense.pt", format="dense", all_shapes={n: v.shape for n, v in base.items()})
    return {path.stem: path for path in tmp_path.iterdir() if path.is_file()}


READERS = {"delta": read_delta, "mask": read_mask, "dense": read_mask, "base": read_checkpoint}


@pytest.mark.parametrize("kind", READERS)
def test_a_changed_byte_is_an_error_or_changes_nothing(small, tmp_path, kind):
    read, whole = READERS[kind], small[kind].read_bytes()
    expected, path = read(small[kind]), tmp_path / f"changed{small[kind].suffix}"
    same = 0
    for i, byte in enumerate(whole):
        path.write_bytes(whole[:i] + bytes([byte ^ (1 << i % 8)]) + whole[i + 1 :])
        found = outcome(read, path)
        assert found in (None, expected)
        same += found == expected
    assert not same if kind == "delta" else same < len(whole)  # of an archive, padding and copies of names


def test_a_changed_byte_of_a_delta_under_its_right_checksum(small, tmp_path):
    """Then anything may be in it, but nothing else than ValueError comes of it."""
    whole = small["delta"].read_bytes()
    for i, byte in enumerate(whole):
        content = whole[:i] + bytes([byte ^ (1 << i % 8)]) + whole[i + 1 :]
        if i >= 8 and b'"checksum":"' in content:  # the first 8 bytes say where the header ends
            outcome(read_delta, crafted.sealed(tmp_path / "changed.safetensors", content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NUMBERS = st.integers(-3, 70) | st.integers(-(1 << 65), 1 << 65) | st.sampled_from([1 << 20, 1 << 31, 10**15])
DTYPES = st.sampled_from(["bfloat16", "float32", "int8", "nn", "Tensor", "complex128", "quint8", ""]) | JSON
PARAMETERS = st.lists(
    st.tuples(st.text(max_size=4) | JSON, DTYPES, st.lists(NUMBERS, max_size=3) | JSON, NUMBERS | JSON),
    max_size=3,
)
CODINGS = st.lists(st.lists(NUMBERS, min_size=5, max_size=8) | JSON, max_size=3)


@fuzzed
@given(PARAMETERS, CODINGS, st.binary(max_size=40), NUMBERS, NUMBERS)
def test_deltas_of_any_numbers(tmp_path, parameters, codings, data, changed, entries):
    index = json.dumps({"parameters": parameters, "segments": codings}, separators=(",", ":")).encode()
    path = crafted.delta_file(tmp_path / "d.safetensors", zstandard.compress(index), data, changed, entries)
    outcome(read_delta, path)


@fuzzed
@given(st.integers(1, 3000), st.lists(NUMBERS, min_size=4, max_size=4), st.binary(max_size=60))
def test_segments_of_any_numbers(tmp_path, n, numbers, data):
    """One coding that its index lets through: parts of these lengths, compressed or not."""
    count, k, low, unary = numbers
    rest = len(data) - abs(low) - abs(unary)
    index = {"parameters": [["w", "int8", [n], min(count, n)]], "segments": [[count, k, low, unary, rest]]}
    text = json.dumps(index, separators=(",", ":")).encode()
    path = crafted.delta_file(tmp_path / "d.safetensors", zstandard.compress(text), data, count, n)
    outcome(read_delta, path)


@fuzzed
@given(st.binary(max_size=300))
def test_bytes_that_are_no_file(tmp_path, content):
    for name, read in (
        ("d.safetensors", read_delta), ("m.pt", read_mask), ("p.pt", read_checkpoint), ("h", read_header),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert outcome(read, tmp_path / name) is None


INSTRUCTIONS = [
    b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"u", b"s", b"e", b"a", b"R", b"b", b"Q", b"N",
    b"\x88", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"K\x01", b"K\x08", b"X\x01\x00\x00\x00w", b"0", b"2",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nByteStorage\n",
    b"ctorch\nSize\n", b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_parameter\n",
    crafted.tensor_program(b"K\x02K\x04\x86", b"K\x04K\x01\x86"), crafted.long(1 << 40),
    crafted.tensor_program(b"K\x08\x85", b"K\x02\x85"),
]  # fmt: skip


@fuzzed
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=30), st.booleans())
def test_structures_of_any_instructions(tmp_path, instructions, as_value):
    program = b"".join(instructions)
    path = crafted.pickled(
        tmp_path / "p.pt", crafted.named(program) if as_value else program + b".", _0=bytes(range(8))
    )
    for read in (read_checkpoint, read_mask):
        outcome(read, path)


@fuzzed
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
        | st.text(max_size=5)
        | st.lists(st.integers(0, 4), max_size=3).map(
            lambda shape: torch.arange(64.0)[: torch.Size(shape).numel()].view(shape)
        )
        | st.sampled_from(["bfloat16", "float8_e4m3fn", "uint16", "bool", "int64"]).map(
            lambda dtype: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype)).t()
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.tuples(inner, inner),
        max_leaves=8,
    )
)  # fmt: skip
def test_what_torch_saves_is_read_as_torch_loads_it(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    found, expected = map_tensors(path, read_torch_file(path)), torch.load(path, weights_only=True)

    def plain(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return (
                part.dtype,
                part.shape,
                part.stride(),
                part.contiguous().view(-1).view(torch.uint8).tolist(),
            )
        if isinstance(part, dict):
            return {key: plain(value) for key, value in part.items()}
        return type(part)(map(plain, part)) if isinstance(part, list | tuple) else part

    assert plain(found) == plain(expected)


@pytest.mark.parametrize(
    "value", [torch.float32, torch.device("cpu"), {1, 2}, b"x", bytearray(2), torch.zeros(2).to_sparse(), 1j]
)
def test_what_is_neither_tensor_nor_plain_is_refused(tmp_path, value):
    for metrics in ({"m": value}, {"m": [value]}):
        torch.save({"step_idx": 1, "state": {"w": torch.zeros(2)}, "metrics": metrics}, tmp_path / "p.pt")
        with pytest.raises(ValueError, match=r"p\.pt was not read: it holds Python objects"):
            read_policy(tmp_path / "p.pt")


def test_attributes_of_parameters_are_left_out(tmp_path):
    path, weight = tmp_path / "p.pt", torch.nn.Parameter(torch.rand(2, 3))
    weight.tensor_parallel, weight.split, weight.about = True, (2, 1), {"from": ["a", None]}
    torch.save({"step_idx": 1, "state": {"w": weight}, "metrics": {}}, path)
    assert torch.load(path, weights_only=True)["state"]["w"].split == (2, 1)
    assert torch.equal(read_policy(path).state["w"], weight.data)
    weight.loader = Path("x")
    torch.save({"step_idx": 1, "state": {"w": weight}, "metrics": {}}, path)
    with pytest.raises(ValueError, match="it holds Python objects"):
        read_policy(path)


def levels(n: int) -> Any:
    return 1 if n == 0 else ([levels(n - 1)] if n % 2 else (levels(n - 1),))


SHARED = {"a": 1}
WHOLE = {
    "one place for all": ({"w": torch.zeros(1).expand(9)}, {}, r"save a clone\(\) of it$"),
    "one storage often": (
        dict(zip("abc", torch.rand(5000).as_strided((3, 4990), (1, 1)), strict=True)), {},
        r"save a clone\(\) of each$",
    ),
    "two places": ({"w": torch.zeros(2)}, {"a": SHARED, "b": SHARED}, "save a copy of it in each$"),
    "much beside": ({"w": torch.zeros(2)}, {"a": list(range(300_000))}, "its structure takes"),
    "deep": ({"w": torch.zeros(2)}, {"a": levels(19)}, "more than 20 deep: save it with fewer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_that_is_not_read_is_not_called_damaged(tmp_path, kind):
    state, metrics, remedy = WHOLE[kind]
    path = tmp_path / "p.pt"
    torch.save({"step_idx": 1, "state": state, "metrics": metrics}, path)
    torch.load(path, weights_only=True)
    for read in (read_policy, Mask.load):
        with pytest.raises(ValueError, match=remedy) as caught:
            read(path)
        assert f"{path} was not read: " in str(caught.value)
        assert "damaged" not in str(caught.value) and "opy it again" not in str(caught.value)


def test_the_deepest_structure_that_is_read(tmp_path):
    torch.save({"step_idx": 1, "state": {"w": torch.zeros(2)}, "metrics": {"a": levels(18)}}, tmp_path / "p")
    assert read_policy(tmp_path / "p").metrics == {"a": levels(18)}


@fuzzed
@given(JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=4), JSON, max_size=3)}))
def test_indices_of_shards(tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "a").touch()
    found = outcome(lambda path: checkpoint_files(path.parent), folder / "model.safetensors.index.json")
    assert found is None or all(file.parent == folder for file in found[0])


RECORD = st.dictionaries(st.sampled_from(["files", "base", "chat_template", "max_length"]), JSON)


@fuzzed
@given(JSON | RECORD)
def test_records_of_conversions(tmp_path, content):
    record = tmp_path / "conversion.json"
    record.write_text(json.dumps(content))
    recorded_base(tmp_path)
    outcome(lambda path: recorded_prompts(path.parent), record)
    for name in outcome(_listed, record) or []:
        assert Path(name).name == name and name not in ("", ".", "..")


def test_changed_bytes_of_json(tmp_path):
    (tmp_path / "a").touch()
    index, record = tmp_path / "model.safetensors.index.json", tmp_path / "conversion.json"
    texts = {
        index: b'{"weight_map":{"w":"a"}}',
        record: b'{"base":"x","files":["config.json"],"max_length":3}',
    }
    for path, whole in texts.items():
        for i, byte in enumerate(whole):
            for bit in range(8):
                path.write_bytes(whole[:i] + bytes([byte ^ (1 << bit)]) + whole[i + 1 :])
                if path == index:
                    assert outcome(lambda p: checkpoint_files(p.parent)[0], path) in (None, [tmp_path / "a"])
                else:
                    assert outcome(_listed, path) in (None, [], ["config.json"])
                    outcome(lambda p: recorded_prompts(p.parent), path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"[]," * 9999 + b"1]", b"[" + b"{}," * 9999 + b"1]", b"[" + b'{"":0},' * 9999 + b"1]",
        b"[" + b"999," * 9999 + b"1]", b"[" + b'"ab",' * 9999 + b"1]", b"[" * 900 + b"]" * 900,
        b"{" + b",".join(b'"%d":[]' % i for i in range(20_000)) + b"}", '["😀'.encode() + b"a" * 9999 + b'"]',
    ],
)  # fmt: skip
def test_the_memory_of_json_is_bounded_before_it_is_parsed(text, monkeypatch):
    """The bound holds for what it was computed for: what it lets through takes no more."""
    tracemalloc.start()
    json.loads(text)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    monkeypatch.setattr("lota.storage._JSON_SLACK", int(0.9 * taken) - len(text))
    with pytest.raises(ValueError, match="bytes of JSON could take far more memory"):
        parse_json(text)


MEASURE = """
import resource, signal
from pathlib import Path
from lota.delta import Delta
from lota.masks import Mask
from lota.models.policy import index_torch_file, read_policy

readers = {
    "delta": [lambda path: Delta.open(path).changes("w", 0, 1 << 20)],
    "torch": [read_policy, index_torch_file, Mask.load],
}
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
bytearray(100 << 20)
print(memory("VmHWM") - before)
for reader in readers[sys.argv[1]]:
    for path in map(Path, sys.argv[2:]):
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        signal.alarm(60)
        try:
            reader(path)
            refused = 0
        except ValueError as error:
            assert path.name in str(error), error
            refused = 1
        signal.alarm(0)
        print(refused, max(0, memory("VmHWM") - before - path.stat().st_size))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "files"), [("delta", crafted.DELTAS), ("torch", crafted.TORCH_FILES)])
def test_crafted_files_are_refused_in_little_memory(tmp_path, kind, files):
    suffix = ".safetensors" if kind == "delta" else ".pt"
    paths = [make(tmp_path / f"{name}{suffix}") for name, make in files.items()]
    control, *found = memory.printed(MEASURE, kind, *paths)
    assert 99 * MIB < control < 110 * MIB  # 100 MiB that were taken are seen
    for i, (refused, taken) in enumerate(zip(found[::2], found[1::2], strict=True)):
        name = list(files)[i % len(files)]
        most = MOST * 3 // 4 if name in ("tuples in tuples", "dicts") else MOST  # as large as they may be
        assert taken <= most, f"{name}: {taken / MIB:.0f} MiB"
        assert refused or name == "segments of a real size"
