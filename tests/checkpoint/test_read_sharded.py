"""Checkpoints written by four real processes: verl's rank files and torch.distributed.checkpoint folders."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltalens.checkpoint import open_checkpoint
from deltalens.errors import CheckpointError

torch = pytest.importorskip("torch")

WORLD = 4


def _full() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model.rows.weight": torch.randn(7, 6).bfloat16(),  # 7 rows over 4 ranks: 2, 2, 2, 1
        "model.few.weight": torch.randn(3, 5),  # the last rank holds nothing
        "model.columns.weight": torch.randn(5, 7).bfloat16(),
        "model.both.weight": torch.randn(5, 7),
        "model.twice.weight": torch.randn(9, 4),  # one dimension split by both dimensions of the mesh
        "model.replicated.weight": torch.randn(3),
        "model.plain": torch.arange(4.0),
    }


def _write(rank: int, folder: str) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    line = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    places = {
        "model.rows.weight": (line, [Shard(0)]),
        "model.few.weight": (line, [Shard(0)]),
        "model.columns.weight": (grid, [Replicate(), Shard(1)]),
        "model.both.weight": (grid, [Shard(0), Shard(1)]),
        "model.twice.weight": (grid, [Shard(0), Shard(0)]),
        "model.replicated.weight": (line, [Replicate()]),
    }
    full = _full()
    state = {
        name: distribute_tensor(tensor, *places[name]) if name in places else tensor for name, tensor in full.items()
    }
    torch.save(state, f"{folder}/verl/model_world_size_{WORLD}_rank_{rank}.pt")
    moments = {name: {"exp_avg": tensor} for name, tensor in state.items()}
    dcp.save(state, checkpoint_id=f"{folder}/flat")
    dcp.save({"model": state, "optimizer": {"state": moments}, "step": 3}, checkpoint_id=f"{folder}/nested")
    dcp.save(
        {"app": {"model": state, "optim": moments, "ema": {"decay": torch.ones(2)}}}, checkpoint_id=f"{folder}/app"
    )

    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    if rank == 0:
        torch.save(module.state_dict(), f"{folder}/fsdp2.pt")
    for layer in module:
        fully_shard(layer, mesh=line)
    fully_shard(module, mesh=line)
    # As Accelerate's SHARDED_STATE_DICT names it.
    dcp.save({"model": module.state_dict()}, checkpoint_id=f"{folder}/accelerate/pytorch_model_fsdp_0")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch.multiprocessing as mp

    folder = tmp_path_factory.mktemp("sharded")
    (folder / "verl").mkdir()
    mp.spawn(_write, (str(folder),), WORLD)
    return folder


def _check(checkpoint: Any, full: dict[str, Any]) -> None:
    assert set(checkpoint.entries) == set(full)
    rng = np.random.default_rng(0)
    for name, tensor in full.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(checkpoint.read(name), raw, err_msg=name)
        width, n = tensor.element_size(), tensor.numel()
        for _ in range(5):
            start, stop = sorted(rng.integers(0, n + 1, 2))
            buffer = np.full(raw.size + 3, 9, np.uint8)
            got = checkpoint.read(name, buffer, start=int(start), count=int(stop - start))
            np.testing.assert_array_equal(got, raw[start * width : stop * width], err_msg=name)
            assert (buffer[got.size :] == 9).all()


def test_verl_rank_files(written: Path) -> None:
    folder = written / "verl"
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "verl FSDP shards"
    _check(checkpoint, _full())
    copy = pickle.loads(pickle.dumps(checkpoint))
    _check(copy, _full())
    copy.tensors.close()
    checkpoint.tensors.close()


def test_verl_finds_the_config_it_writes_beside(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "global_step_10" / "actor"
    shutil.copytree(written / "verl", folder)
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(folder.parent)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.folder == folder / "huggingface"
    (folder / "model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ranks \[2\] of 4 are missing"):
        open_checkpoint(folder)
    shutil.copy(written / "verl" / "model_world_size_4_rank_0.pt", folder / "model_world_size_2_rank_0.pt")
    with pytest.raises(CheckpointError, match=r"several world sizes|missing"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is a shard; give the folder"):
        open_checkpoint(folder / "model_world_size_4_rank_0.pt")


def test_verl_ranks_of_two_checkpoints(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "verl", tmp_path / "x")
    torch.save({"model.plain": torch.arange(5.0)}, tmp_path / "x" / "model_world_size_4_rank_1.pt")
    with pytest.raises(CheckpointError, match="the ranks do not belong together"):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("layout", ["flat", "nested", "app"])
def test_distributed_checkpoints(written: Path, layout: str) -> None:
    checkpoint = open_checkpoint(written / layout)
    assert checkpoint.format == "torch.distributed.checkpoint"
    _check(checkpoint, _full())
    assert any("ema" in note for note in checkpoint.notes) == (layout == "app")
    copy = pickle.loads(pickle.dumps(checkpoint))
    _check(copy, _full())
    copy.tensors.close()
    checkpoint.tensors.close()


def test_fsdp2_as_accelerate_saves_it(written: Path) -> None:
    _check(open_checkpoint(written / "accelerate"), torch.load(written / "fsdp2.pt", weights_only=True))


def test_a_distributed_checkpoint_with_a_file_gone(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "nested", tmp_path / "x")
    (tmp_path / "x" / "__3_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__3_0\.distcp: there is no such file"):
        open_checkpoint(tmp_path / "x")


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of the file ran",))


def test_metadata_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / ".metadata"
    for raw in (pickle.dumps(_Evil()), pickle.dumps({"a": 1}), b"", b"nonsense"):
        file.write_bytes(raw)
        with pytest.raises(CheckpointError, match="not the metadata of a distributed checkpoint"):
            open_checkpoint(tmp_path)
    assert "ran" not in capsys.readouterr().out
