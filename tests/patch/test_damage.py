"""Whatever happens to a patch, a disk or a process: one PatchError that names the place, never a wrong checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
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
from deltalens.patch.codec import CODECS
from deltalens.patch.format import CRC, END, HASH, MAGIC, TAIL, PatchFile, plain_name


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
    assert codecs == set(CODECS)
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


def forge(patch: Path, output: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The patch with another footer and its hash recomputed: what an attacker, not an accident, would make.

    `change` sees the JSON's fields and, under "rows", each tensor's model, CRC-32, result hash and source hash.
    """
    data = patch.read_bytes()
    length = int.from_bytes(data[-TAIL : -TAIL + 8], "little")
    frames, whole = data[: -TAIL - length], data[-TAIL - length : -TAIL]
    first, second = (int.from_bytes(whole[i : i + 4], "little") for i in (0, 4))
    unpack = zstandard.ZstdDecompressor().decompress
    footer = json.loads(unpack(whole[8 : 8 + first]))
    models, checks = unpack(whole[8 + first : 8 + first + second]), whole[8 + first + second :]
    rows = footer["rows"] = {}
    names = [name for entry in footer["weights"] for name in json.loads(entry["header"]) if name != "__metadata__"]
    for name, codec, size in zip(names, footer["codecs"], footer["models"], strict=True):
        row = rows[name] = {"model": models[:size]}
        models = models[size:]
        for field, bytes_ in (("crc", CRC), ("result", HASH), ("source", HASH)):
            absent = codec == "new" if field == "source" else codec == "unchanged"
            row[field], checks = (b"", checks) if absent else (checks[:bytes_], checks[bytes_:])
    change(footer)
    rows = footer.pop("rows").values()
    checks = b"".join(row[field] for row in rows for field in ("crc", "result", "source"))
    pack = zstandard.ZstdCompressor().compress
    seal(frames, [pack(json.dumps(footer).encode()), pack(b"".join(row["model"] for row in rows))], checks, output)
    return output


def seal(frames: bytes, parts: list[bytes], checks: bytes, output: Path) -> None:
    whole = b"".join([*(len(part).to_bytes(4, "little") for part in parts), *parts, checks])
    output.write_bytes(frames + whole + len(whole).to_bytes(8, "little") + blake3(whole).digest() + END)


def row(name: str, **fields: bytes) -> Callable[[dict[str, Any]], None]:
    return lambda footer: footer["rows"][name].update(fields)


def column(name: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(footer: dict[str, Any]) -> None:
        footer[field][list(footer["rows"]).index(name)] = value

    return change


def both(*changes: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    return lambda footer: [change(footer) for change in changes]  # type: ignore[return-value]


def model(data: bytes) -> Callable[[dict[str, Any]], None]:
    """Another model for "conditioned", of the length that the footer says."""
    return both(row("conditioned", model=data), column("conditioned", "models", len(data)))


def file(place: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda footer: footer["files"][place].update(fields)


def weights_file(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda footer: footer["weights"][0].update(fields)


def exchange(footer: dict[str, Any]) -> None:
    """Two frames' border moved by one byte."""
    at = list(footer["rows"]).index("conditioned")
    footer["lengths"][at] += 1
    footer["lengths"][at + 1] -= 1


NAMES = (
    "../evil",
    "/etc/evil",
    "a/b",
    "..",
    ".",
    "",
    "C:evil",
    "a\\b",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 300,
    " a",
    None,
    5,
)
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"file named {name!r}": file(-1, path=name) for name in NAMES},
    **{f"weights named {name!r}": weights_file(path=name) for name in NAMES},
    "a file twice": lambda footer: footer["files"].append({**footer["files"][-1], "length": 0}),
    "a file and weights of one name": file(-1, path="model.safetensors"),
    "weights twice": lambda footer: footer["weights"].append(footer["weights"][0]),
    "file beyond the end": file(0, length=1 << 40),
    "file of a negative length": file(0, length=-5),
    "file of a fractional length": file(0, length=1.5),
    "huge file": file(0, bytes=1 << 40),
    "file larger than its frame can hold": file(0, bytes=1 << 29),
    "file smaller than its frame": file(0, bytes=3),
    "file of another content": file(0, hash="00" * 32),
    "file of another check": file(0, crc=5),
    "file that the source lacks": both(file(0, length=0), file(0, hash="00" * 32)),
    "unknown field of a file": file(0, mode=0o777),
    "no weights": lambda footer: footer.update(weights=[]),
    "a header of bytes": weights_file(header=[1, 2]),
    "no header": weights_file(header="{"),
    "a deep header": weights_file(header="[" * 100_000),
    "unknown codec": column("conditioned", "codecs", "pickle"),
    "codec is a list": column("conditioned", "codecs", ["raw"]),
    "codec of another kind": column("sparse", "codecs", "planes"),
    "conditioned without a model": model(b""),
    "conditioned float32": both(
        column("sparse", "codecs", "conditioned"), column("sparse", "models", 1), row("sparse", model=b"\0")
    ),
    "a model of another kind": both(column("sparse", "models", 1), row("sparse", model=b"\0")),
    "a model of unknown flags": model(b"\xff\xff\1\1"),
    "a model without groups": model(b"\0"),
    "a model that never ends": model(b"\0" + bytes(range(255))),
    "a model that goes back": model(b"\0\5\3\xff" + b"\1\1" * 3),
    "a model without frequencies": model(b"\0\xff"),
    "a model of no symbol": model(b"\0\xff\1\0"),
    "a model of too small a frequency": model(b"\0\xff\1\xf0"),
    "a model of too many tokens": model(b"\0\xff" + bytes([65]) + b"\1" * 65),
    "a model that goes on": model(b"\0\xff\1\1\0"),
    "another model": model(b"\0\xff\3\1\1\1"),
    "another model, by rows": model(b"\4" + b"\xff" * 8 + b"\3\1\1\1" * 8),
    "models longer than they are": column("conditioned", "models", 1 << 40),
    "a negative model": column("conditioned", "models", -1),
    "frame of no bytes": column("conditioned", "lengths", 0),
    "frame of a negative length": column("conditioned", "lengths", -8),
    "frame of the whole file": column("conditioned", "lengths", 1 << 50),
    "fractional length": column("conditioned", "lengths", 8.0),
    "length is null": column("conditioned", "lengths", None),
    "a border moved": exchange,
    "bytes that no frame owns": lambda footer: footer["files"].pop(0),
    "another check": row("conditioned", crc=b"1234"),
    "no check": row("conditioned", crc=b""),
    "another source": row("conditioned", source=b"0" * HASH),
    "another source of the unchanged": row("unchanged", source=b"0" * HASH),
    "no source": both(column("conditioned", "codecs", "new"), column("conditioned", "models", 0),
                      row("conditioned", model=b"", source=b"")),
    "raw without a source is not this": both(column("new", "codecs", "raw"), row("new", source=b"0" * HASH)),
    "another result": row("conditioned", result=b"0" * HASH),
    "another result of a new one": row("new", result=b"0" * HASH),
    "changed said to be unchanged": both(column("raw", "codecs", "unchanged"), row("raw", crc=b"", result=b"")),
    "one hash more": row("new", source=b"0" * HASH),
    "one codec fewer": lambda footer: footer["codecs"].pop(),
    "one length fewer": lambda footer: footer["lengths"].pop(),
    "one model fewer": lambda footer: footer["models"].pop(),
    "codecs is a number": lambda footer: footer.update(codecs=5),
    "no source hash": lambda footer: footer.pop("source"),
    "files is null": lambda footer: footer.update(files=None),
    "later schema": lambda footer: footer.update(schema=3),
    "earlier schema": lambda footer: footer.update(schema=1),
    "schema is absent": lambda footer: footer.pop("schema"),
}  # fmt: skip


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_footer_that_lies(small, tmp_path, lie):
    source, _, patch = small
    forged = forge(patch, tmp_path / "forged.patch", LIES[lie])
    refused(source, forged, tmp_path / "out" / "made")
    assert {file.name for file in tmp_path.rglob("*")} <= {"forged.patch", "out"}


def test_the_forger_can_tell_the_truth(small, tmp_path):
    """The lies above are refused for what they say, not for how they were sealed."""
    source, trained, patch = small
    forged = forge(patch, tmp_path / "forged.patch", lambda footer: None)
    apply(source, [forged], tmp_path / "made")
    assert contents(tmp_path / "made") == contents(trained)


def test_a_frame_whose_check_was_forged(small, tmp_path):
    """The CRC-32 guards against accidents; what gets past it comes out right, or not at all, by the result's hash."""
    source, _, patch = small
    with PatchFile(patch) as opened:
        entries = [entry for entry in opened.tensors.values() if entry.length]
        hash_ = opened.result_hash
    refusals = 0
    for entry in entries:
        for place in range(entry.offset, entry.offset + entry.length, 7):
            data = bytearray(patch.read_bytes())
            data[place] ^= 0x10
            (tmp_path / "changed.patch").write_bytes(data)
            crc = zlib.crc32(data[entry.offset : entry.offset + entry.length]).to_bytes(CRC, "little")
            forged = forge(tmp_path / "changed.patch", tmp_path / "forged.patch", row(entry.name, crc=crc))
            try:
                made = verify(source, [forged], jobs=1).result_hash
            except PatchError as error:
                made, refusals = hash_ if entry.name in str(error) else str(error), refusals + 1
            assert made == hash_
    assert refusals > 50


@pytest.mark.parametrize("magic", [b"DLPATCH1", b"DLPATCH3"])
def test_another_schema_is_named(small, tmp_path, magic):
    (tmp_path / "other.patch").write_bytes(magic + small[2].read_bytes()[8:])
    with pytest.raises(PatchError, match=f"schema {magic[-1:].decode()}, but"):
        PatchFile(tmp_path / "other.patch")


@pytest.mark.parametrize(
    "text",
    [b"", b"5", b"[]", b"null", b"{", b'{"schema": 2}', b"\xff\xfe", b"[" * 200_000, b'{"schema": ' + b"[" * 100_000],
)
def test_a_footer_of_something_else(small, tmp_path, text):
    pack_ = zstandard.ZstdCompressor().compress
    seal(MAGIC, [pack_(text), pack_(b"")], b"", tmp_path / "forged.patch")
    refused(small[0], tmp_path / "forged.patch", tmp_path / "made")


def test_a_footer_that_is_no_zstd_or_a_bomb(small, tmp_path):
    bomb = zstandard.ZstdCompressor().compress(b" " * 1000)
    claim = bomb[:4] + bytes([0xE0]) + (1 << 29).to_bytes(8, "little") + bomb[7:]
    unknown = zstandard.ZstdCompressor(write_content_size=False).compressobj().compress(b"{}")
    for packed in (b"", b"plain", bomb[:-3], claim, unknown):
        for parts in ([packed, bomb], [bomb, packed], [packed], []):
            seal(MAGIC, parts, b"", tmp_path / "forged.patch")
            refused(small[0], tmp_path / "forged.patch", tmp_path / "made")
    whole = (1 << 31).to_bytes(4, "little") * 2
    tail = len(whole).to_bytes(8, "little") + blake3(whole).digest() + END
    (tmp_path / "forged.patch").write_bytes(MAGIC + whole + tail)
    refused(small[0], tmp_path / "forged.patch", tmp_path / "made")


def forge_header(patch: Path, output: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The patch with another safetensors header for its weights."""
    with PatchFile(patch) as opened:
        header = json.loads(opened.weights["model.safetensors"])
    change(header)
    return forge(patch, output, weights_file(header=json.dumps(header)))


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
        lambda header: header["raw"].update(dtype="I8"),
        lambda header: header["raw"].update(shape=[30, 20]),
        lambda header: header["conditioned"].update(dtype="F16"),
        lambda header: header["new"].update(dtype="F128"),
        lambda header: header["new"].update(dtype=["I32"]),
        lambda header: header["new"].update(shape=[-2, -2]),
        lambda header: header["new"].update(shape=[1 << 60, 1 << 60]),
        lambda header: header["new"].update(shape=[1 << 38], data_offsets=[1720, 1720 + (4 << 38)]),
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
    forged = forge(tmp_path / "second.patch", tmp_path / "forged.patch", row("unchanged", source=b"0" * HASH))
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
