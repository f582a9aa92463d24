"""Under FSDP2 in two processes the callback says what it says of the same steps in one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STEPS = 3


def train(folder: Path, output: Path, *, rank: int, sharded: bool) -> None:
    """A plain loop that calls the callback as a trainer does, so that nothing but sharding differs."""
    from transformers import LlamaForCausalLM

    from deltalens import UpdateGeometryCallback

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, foreach=False)
    callback: Any = UpdateGeometryCallback(every=1, output=output)
    state = SimpleNamespace(global_step=0, epoch=None, is_world_process_zero=rank == 0, log_history=[])
    args, control = SimpleNamespace(output_dir=str(output)), SimpleNamespace(should_log=False)
    callback.on_train_begin(args, state, control, model=model)
    tokens = torch.randint(3, 200, (STEPS, 4, 8), generator=torch.Generator().manual_seed(1))
    for batch in tokens:
        model(input_ids=batch, labels=batch).loss.backward()
        callback.on_pre_optimizer_step(args, state, control, model=model, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    assert bool(state.log_history) == (rank == 0)


def worker(rank: int, folder: Path, output: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        train(folder, output, rank=rank, sharded=True)
    finally:
        dist.destroy_process_group()


def test_two_processes_say_what_one_says(tiny_model: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (tiny_model, tmp_path / "two", port), nprocs=2)
    train(tiny_model, tmp_path / "one", rank=0, sharded=False)
    one, two = (pl.read_parquet(tmp_path / name / "geometry.parquet") for name in ("one", "two"))
    assert one.columns == two.columns
    assert one["step"].unique().sort().to_list() == [1, 2, 3]
    for ours, theirs in zip(one.to_dicts(), two.to_dicts(), strict=True):
        for name, value in ours.items():
            if isinstance(value, float):
                # The shards' norms are summed in another order, which may turn a rounding.
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=1e-6), (ours["step"], ours["key"], name)
            elif name == "visible_updates":
                assert theirs[name] == pytest.approx(value, abs=2), (ours["step"], ours["key"])
            else:
                assert theirs[name] == value, name
    snapshots = [sorted((tmp_path / name / "geometry_source").glob("*.safetensors")) for name in ("one", "two")]
    assert [file.read_bytes() for file in snapshots[0]] == [file.read_bytes() for file in snapshots[1]]
