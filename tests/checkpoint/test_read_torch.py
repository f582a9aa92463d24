import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltalens.checkpoint import open_checkpoint
from deltalens.errors import CheckpointError

torch = pytest.importorskip("torch")


def _same(checkpoint: Any, state: dict[str, Any]) -> None:
    assert set(checkpoint.entries) == set(state)
    for name, tensor in state.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(checkpoint.read(name), raw)
        if tensor.numel() > 2:
            width = tensor.element_size()
            np.testing.assert_array_equal(checkpoint.read(name, start=1, count=2), raw[width : 3 * width])


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    big = torch.randn(6, 5)
    return {
        "a.weight": torch.randn(4, 3, dtype=torch.bfloat16),
        "transposed": torch.randn(3, 4).t(),
        "strided": big[::2, 1:4],
        "view": big[2:4],
        "half": torch.randn(5).half(),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "step": torch.tensor(3),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_single_file(tmp_path: Path, wrapper: str | None, file: str) -> None:
    state = _state()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / file)
    torch.save({"x": torch.ones(2)}, tmp_path / "optimizer.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "training_args.bin")
    _same(open_checkpoint(tmp_path), state)
    checkpoint = open_checkpoint(tmp_path / file)
    _same(checkpoint, state)
    copy = pickle.loads(pickle.dumps(checkpoint))
    np.testing.assert_array_equal(copy.read("view"), checkpoint.read("view"))
    copy.tensors.close()
    checkpoint.tensors.close()


def test_a_model_with_tied_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    _same(checkpoint, model.state_dict())
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight"))


def test_shards_with_an_index(tmp_path: Path) -> None:
    state = _state()
    names = list(state)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    _same(open_checkpoint(tmp_path), state)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _same(open_checkpoint(tmp_path), state)
    index.write_text(json.dumps({"weight_map": {**weight_map, "absent": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(CheckpointError, match="'absent', but it does not"):
        open_checkpoint(tmp_path)
    index.unlink()
    torch.save({names[0]: state[names[0]]}, tmp_path / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(CheckpointError, match="is also in"):
        open_checkpoint(tmp_path)


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of the file ran",))


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2), "evil": _Evil()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt: holds more than weights"):
        open_checkpoint(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    torch.save({"a": torch.ones(300)}, file)
    whole = file.read_bytes()
    for damaged in (b"", b"no zip at all", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"m\.bin"):
            open_checkpoint(file)
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6"):
        open_checkpoint(file)
    for empty in ({"a": 3}, [torch.ones(2)], torch.ones(2)):
        torch.save(empty, file)
        with pytest.raises(CheckpointError, match="holds no state dict"):
            open_checkpoint(file)
