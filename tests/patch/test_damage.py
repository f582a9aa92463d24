"""Whatever happens to a patch, a disk or a process: one PatchError that names the place, never a wrong checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from patch_fixtures import BF16, contents, moved, weights, write_folder

from deltalens.errors import PatchError
from deltalens.patch import apply, pack, verify
from deltalens.patch.format import END, MAGIC, TAIL, PatchFile, overall_hash, plain_name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, what it became, and the patch, which has every codec, carried files and one from the source."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    before = {
        "conditioned": (rng.standard_normal(600) * 0.02).astype(BF16),
        "sparse": rng.standard_normal(1000).astype(np.float32),
        "planes": rng.standard_normal(60).astype(np.float32),
        "raw": rng.integers(0, 256, 600).astype(np.uint8),
        "unchanged": np.ones(3, np.int64),
    }
    after = moved(before, 0.5)
    after["sparse"] = before["sparse"].copy()
    after["sparse"][rng.permutation(1000)[:40]] += rng.standard_normal(40).astype(np.float32)
    after["raw"] = np.zeros(600, np.uint8)
    after["new"] = np.arange(4, dtype=np.int32)
    source, trained = write_folder(folder / "source", before), write_folder(folder / "trained", after)
    (trained / "config.json").write_text('{"changed": 1}')
    pack(source, trained, folder / "run.patch")
    with PatchFile(folder / "run.patch") as opened:
        codecs = {entry.codec for entry in opened.tensors.values()}
    assert codecs == {"conditioned", "sparse", "planes", "raw", "unchanged"}
    return source, trained, folder / "run.patch"


def refused(source: Path, patch: Path, output: Path) -> None:
    """Neither verify nor apply takes it, both say which file it is, and nothing appears under the final name.

    What apply kept is dropped: a later apply would take the tensors from there, rightly, without reading their frames.
    """
    for run in (lambda: verify(source, [patch], jobs=1), lambda: apply(source, [patch], output, jobs=1)):
        with pytest.raises(PatchError) as raised:
            run()
        assert str(patch) in str(raised.value)
    assert not output.exists()
    shutil.rmtree(output.parent / f".{output.name}.partial", ignore_errors=True)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_flipped(small, tmp_path, flip):
    source, _, patch = small
    data = patch.read_bytes()
    assert len(data) < 4000  # exhaustive stays quick
    damaged = tmp_path / "damaged.patch"
    for place in range(len(data)):
        damaged.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        if flip == 0x01:
            refused(source, damaged, tmp_path / "made")
        else:
            with pytest.raises(PatchError):
                verify(source, [damaged], jobs=1)


def test_every_truncation(small, tmp_path):
    source, _, patch = small
    data = patch.read_bytes()
    damaged = tmp_path / "damaged.patch"
    for length in range(len(data)):
        damaged.write_bytes(data[:length])
        refused(source, damaged, tmp_path / "made")


@pytest.mark.parametrize("more", [b"\0", b"DLPATEND", b"x" * 100])
def test_appended_and_prepended_bytes(small, tmp_path, more):
    source, _, patch = small
    for data in (patch.read_bytes() + more, more + patch.read_bytes(), patch.read_bytes() + patch.read_bytes()[-TAIL:]):
        (tmp_path / "damaged.patch").write_bytes(data)
        refused(source, tmp_path / "damaged.patch", tmp_path / "made")


def test_damage_names_the_place(small, tmp_path):
    source, _, patch = small
    with PatchFile(patch) as opened:
        places = {f"tensor {e.name!r}": e.offset for e in opened.tensors.values() if e.length}
        places |= {f"file {f.path!r}": f.offset for f in opened.files if f.length}
    for what, offset in places.items():
        data = bytearray(patch.read_bytes())
        data[offset + 3] ^= 4
        (tmp_path / "damaged.patch").write_bytes(data)
        with pytest.raises(PatchError, match=what.replace(".", r"\.")):
            verify(source, [tmp_path / "damaged.patch"])


# --- footers that lie, with every hash in order ----------------------------------------------------------------------


def forge(patch: Path, output: Path, change: Callable[[dict[str, Any]], object], *, overall: bool = True) -> Path:
    """The patch with another footer, hashes recomputed: what an attacker, not an accident, would make."""
    data = patch.read_bytes()
    length = int.from_bytes(data[-TAIL : -TAIL + 8], "little")
    footer = json.loads(zstandard.ZstdDecompressor().decompress(data[-TAIL - length : -TAIL]))
    change(footer)
    if overall:
        rows = {row[0]: (row[1], tuple(row[2]), row[7] if row[8] is None else row[8]) for row in footer["tensors"]}
        footer["result"]["hash"] = overall_hash(rows)
    seal(data[: -TAIL - length], zstandard.ZstdCompressor().compress(json.dumps(footer).encode()), output)
    return output


def seal(frames: bytes, packed: bytes, output: Path) -> None:
    output.write_bytes(frames + packed + len(packed).to_bytes(8, "little") + blake3(packed).digest() + END)


NAME, DTYPE, SHAPE, CODEC, OFFSET, LENGTH, FRAME, SOURCE, RESULT = range(9)


def tensor(name: str, field: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(footer: dict[str, Any]) -> None:
        next(row for row in footer["tensors"] if row[NAME] == name)[field] = value

    return change


def file(place: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda footer: footer["files"][place].update(fields)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"file named {name!r}": file(-1, path=name) for name in (
        "../evil", "/etc/evil", "a/b", "..", ".", "", "C:evil", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 300, " a",
        None, 5,
    )},
    "a file twice": lambda footer: footer["files"].append(footer["files"][-1]),
    "file beyond the end": file(0, offset=1 << 40),
    "file offset beyond 64 bits": file(0, offset=1 << 70),
    "file of a negative length": file(0, length=-5),
    "file of a fractional length": file(0, length=1.5),
    "huge file": file(0, bytes=1 << 40),
    "file larger than its frame can hold": file(0, bytes=1 << 29),
    "file smaller than its frame": file(0, bytes=3),
    "unknown field of a file": file(0, mode=0o777),
    "no weights": lambda footer: [entry.update(weights=False) for entry in footer["files"]],
    "weights from the source": file(0, length=0, offset=0, frame_hash=None),
    "huge shape": tensor("conditioned", SHAPE, [1 << 60, 1 << 60]),
    "huge new tensor": tensor("new", SHAPE, [1 << 39]),
    "negative shape": tensor("conditioned", SHAPE, [-600]),
    "two negative sizes": tensor("conditioned", SHAPE, [-20, -30]),
    "fractional shape": tensor("conditioned", SHAPE, [600.0]),
    "shape of another form": tensor("conditioned", SHAPE, [30, 20]),
    "shape is a text": tensor("conditioned", SHAPE, "600"),
    "unknown dtype": tensor("conditioned", DTYPE, "F128"),
    "dtype is a list": tensor("conditioned", DTYPE, ["BF16"]),
    "dtype of the same width": tensor("conditioned", DTYPE, "F16"),
    "unknown codec": tensor("conditioned", CODEC, "pickle"),
    "codec of another kind": tensor("sparse", CODEC, "conditioned"),
    "frame before the file": tensor("conditioned", OFFSET, -1),
    "frame beyond the end": tensor("conditioned", OFFSET, 1 << 40),
    "offset beyond 64 bits": tensor("conditioned", OFFSET, 1 << 70),
    "fractional offset": tensor("conditioned", OFFSET, 8.0),
    "offset is null": tensor("conditioned", OFFSET, None),
    "frame of no bytes": tensor("conditioned", LENGTH, 0),
    "unchanged with no bytes at a negative offset": tensor("unchanged", OFFSET, -7),
    "frame of the whole file": tensor("conditioned", LENGTH, 1 << 50),
    "another tensor's frame": tensor("conditioned", OFFSET, len(MAGIC) + 1),
    "no frame hash": tensor("conditioned", FRAME, None),
    "no source": tensor("conditioned", SOURCE, None),
    "raw without a source is not this": tensor("raw", SOURCE, "00" * 32),
    "another result": tensor("conditioned", RESULT, "00" * 32),
    "unchanged into something else": tensor("unchanged", RESULT, "00" * 32),
    "changed said to be unchanged": tensor("conditioned", CODEC, "unchanged"),
    "name is a number": tensor("conditioned", NAME, 5),
    "a tensor twice": lambda footer: footer["tensors"].append(footer["tensors"][0]),
    "a tensor fewer": lambda footer: footer["tensors"].pop(),
    "a row too short": lambda footer: footer["tensors"][0].pop(),
    "tensors is a number": lambda footer: footer.update(tensors=5),
    "no source hash": lambda footer: footer.pop("source"),
    "files is null": lambda footer: footer.update(files=None),
    "later schema": lambda footer: footer.update(schema=2),
    "schema is absent": lambda footer: footer.pop("schema"),
}  # fmt: skip


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_footer_that_lies(small, tmp_path, lie):
    source, _, patch = small
    try:
        forged = forge(patch, tmp_path / "forged.patch", LIES[lie])
    except (TypeError, IndexError, ValueError):  # no overall hash can be made of it
        forged = forge(patch, tmp_path / "forged.patch", LIES[lie], overall=False)
    refused(source, forged, tmp_path / "out" / "made")
    assert {file.name for file in tmp_path.rglob("*")} <= {"forged.patch", "out"}


def test_the_forger_can_tell_the_truth(small, tmp_path):
    """The lies above are refused for what they say, not for how they were sealed."""
    source, trained, patch = small
    forged = forge(patch, tmp_path / "forged.patch", lambda footer: None)
    apply(source, [forged], tmp_path / "made")
    assert contents(tmp_path / "made") == contents(trained)


@pytest.mark.parametrize(
    "text",
    [b"", b"5", b"[]", b"null", b"{", b'{"schema": 1}', b"\xff\xfe", b"[" * 200_000, b'{"schema": ' + b"[" * 100_000],
)
def test_a_footer_of_something_else(small, tmp_path, text):
    seal(MAGIC, zstandard.ZstdCompressor().compress(text), tmp_path / "forged.patch")
    refused(small[0], tmp_path / "forged.patch", tmp_path / "made")


def test_a_footer_that_is_no_zstd_or_a_bomb(small, tmp_path):
    bomb = zstandard.ZstdCompressor().compress(b" " * 1000)
    claim = bomb[:4] + bytes([0xE0]) + (1 << 29).to_bytes(8, "little") + bomb[7:]
    unknown = zstandard.ZstdCompressor(write_content_size=False).compressobj().compress(b"{}")
    for packed in (b"", b"plain", bomb[:-3], claim, unknown):
        seal(MAGIC, packed, tmp_path / "forged.patch")
        refused(small[0], tmp_path / "forged.patch", tmp_path / "made")


def forge_header(patch: Path, output: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The patch with another safetensors header for its weights, appended as a frame of its own."""
    with PatchFile(patch) as opened:
        carried = next(entry for entry in opened.files if entry.weights)
        header = json.loads(opened.file_bytes(carried))
    change(header)
    data = json.dumps(header).encode()
    packed = zstandard.ZstdCompressor().compress(data)
    whole = patch.read_bytes()
    length = int.from_bytes(whole[-TAIL : -TAIL + 8], "little")
    frames_end = len(whole) - TAIL - length
    longer = output.with_suffix(".longer")
    longer.write_bytes(whole[:frames_end] + packed + whole[frames_end:])
    place = {"offset": frames_end, "length": len(packed), "frame_hash": blake3(packed).hexdigest()}
    fields = {"hash": blake3(data).hexdigest(), "bytes": len(data), **place}

    def other(footer: dict[str, Any]) -> None:
        next(entry for entry in footer["files"] if entry.get("weights")).update(fields)

    forge(longer, output, other)
    longer.unlink()
    return output


def test_a_weights_header_that_lies(small, tmp_path):
    """A hole, an overlap, a huge offset, another dtype or shape, a tensor too many or too few: nothing is written."""
    source, _, patch = small
    honest = forge_header(patch, tmp_path / "honest.patch", lambda header: None)
    result = verify(source, [honest])
    assert result.tensors == 6

    def offsets(name: str, shift: int) -> Callable[[dict[str, Any]], None]:
        def change(header: dict[str, Any]) -> None:
            header[name]["data_offsets"] = [n + shift for n in header[name]["data_offsets"]]

        return change

    lies: list[Callable[[dict[str, Any]], object]] = [
        offsets("new", 1 << 45),
        offsets("new", -1),
        offsets("new", 4),
        offsets("new", 1 << 70),
        lambda header: header["new"].update(data_offsets=[0]),
        lambda header: header["new"].update(data_offsets=[float(n) for n in header["new"]["data_offsets"]]),
        lambda header: header["new"].update(dtype="F32"),
        lambda header: header["new"].update(shape=[2, 2]),
        lambda header: header["new"].update(shape=None),
        lambda header: header.pop("new"),
        lambda header: header.update(more=header["new"]),
        lambda header: header.update(new=[1]),
    ]
    for lie in lies:
        refused(source, forge_header(patch, tmp_path / "forged.patch", lie), tmp_path / "made")
        assert not (tmp_path / ".made.partial").exists()


def test_a_chain_that_lies_about_where_it_starts(small, tmp_path):
    """The overall hashes fit, one tensor's do not: refused by name."""
    source, trained, patch = small
    after = {**weights(), "unchanged": np.ones(3, np.int64)}
    pack(trained, write_folder(tmp_path / "third", after), tmp_path / "second.patch")
    verify(source, [patch, tmp_path / "second.patch"])
    forged = forge(tmp_path / "second.patch", tmp_path / "forged.patch", tensor("unchanged", SOURCE, "00" * 32))
    with pytest.raises(PatchError, match="'unchanged' does not start where"):
        verify(source, [patch, forged])


def test_plain_names():
    assert all(plain_name(name) for name in ("config.json", "a b.txt", "épée.json", ".hidden", "...", "x" * 255))
    bad = (
        "",
        ".",
        "..",
        "a/b",
        "/a",
        "a\\b",
        "c:d",
        "a\0",
        "a\n",
        "\x7f",
        " a",
        "a ",
        "\udc80",
        "x" * 256,
        None,
        3,
        b"a",
    )
    assert not any(plain_name(name) for name in bad)


# --- disks and processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def big_pair(folder: Path) -> tuple[Path, Path]:
    """1 MB a side, in 16 tensors that change wholly."""
    rng = np.random.default_rng(0)
    before = {f"layer.{i}": rng.integers(0, 1 << 32, 16_384, np.uint32) for i in range(16)}
    after = {name: values ^ rng.integers(0, 1 << 32, values.size, np.uint32) for name, values in before.items()}
    return write_folder(folder / "source", before), write_folder(folder / "trained", after)


def test_a_full_disk(little_disk, tmp_path):
    source, trained = big_pair(tmp_path)
    kept = contents(source)
    with pytest.raises(PatchError, match="cannot be written"):
        pack(source, trained, little_disk / "run.patch")
    assert list(little_disk.iterdir()) == []
    pack(source, trained, tmp_path / "run.patch")
    with pytest.raises(PatchError, match="cannot be written"):
        apply(source, [tmp_path / "run.patch"], little_disk / "made")
    assert [file.name for file in little_disk.iterdir()] in ([".made.partial"], [])
    assert contents(source) == kept
    # With room, the same command goes through.
    subprocess.run(["mount", "-o", "remount,size=4m", str(little_disk)], check=True)
    apply(source, [tmp_path / "run.patch"], little_disk / "made")
    assert contents(little_disk / "made") == contents(trained)


KILLED = """
import os, sys, time
from deltalens.patch import apply
write, calls = os.pwrite, 0
def slow(handle, data, offset):
    global calls
    calls += 1
    if calls == 8:  # in the middle of a tensor
        write(handle, bytes(data)[: len(data) // 2], offset)
        print("now", flush=True)
        time.sleep(60)
    return write(handle, data, offset)
os.pwrite = slow
apply(sys.argv[1], [sys.argv[2]], sys.argv[3], jobs=1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_in_the_middle_and_run_again(tmp_path):
    source, trained = big_pair(tmp_path)
    kept = contents(source)
    pack(source, trained, tmp_path / "run.patch")
    arguments = [sys.executable, "-c", KILLED, source, tmp_path / "run.patch", tmp_path / "made"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "made").exists()
    assert (tmp_path / ".made.partial" / "model.safetensors").exists()
    result = apply(source, [tmp_path / "run.patch"], tmp_path / "made")
    assert 0 < result.resumed < result.tensors
    assert contents(tmp_path / "made") == contents(trained)
    assert not (tmp_path / ".made.partial").exists()
    assert contents(source) == kept


def test_what_another_run_left_is_not_taken_over(small, tmp_path):
    """A temporary folder of another patch: files that do not belong go, tensors that do not fit are made anew."""
    source, trained, patch = small
    left = write_folder(tmp_path / ".made.partial", moved(weights()), shards=2)
    (left / "model.safetensors").write_bytes(b"\x01" * 100_000)
    apply(source, [patch], tmp_path / "made")
    assert contents(tmp_path / "made") == contents(trained)
