"""pack and apply: the result's files are TRAINED's, byte for byte; chains, refusals, loaded weights."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from patch_fixtures import BF16, contents, moved, weights, write_folder
from safetensors.numpy import load_file, save_file

from deltalens.errors import CheckpointError, PatchError
from deltalens.patch import PatchFile, apply, apply_in_place, pack, verify


def round_trip(source: Path, trained: Path, folder: Path, **options: object) -> Path:
    """Pack, verify, apply; the source must be as before and nothing must lie beside the result."""
    before = contents(source) if source.is_dir() else source.read_bytes()
    packed = pack(source, trained, folder / "run.patch", **options)
    made = folder / "made"
    seen = verify(source, [folder / "run.patch"])
    assert not made.exists()
    result = apply(source, [folder / "run.patch"], made)
    assert (seen.result_hash, seen.tensors, seen.changed) == (packed.result_hash, packed.tensors, result.changed)
    assert (result.result_hash, result.path, result.resumed) == (packed.result_hash, made, 0)
    assert (contents(source) if source.is_dir() else source.read_bytes()) == before
    assert {file.name for file in folder.iterdir() if file.name.startswith(".")} == set()
    return made


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("jobs", [1, 3])
def test_single_file(tmp_path, fast, jobs):
    source = write_folder(tmp_path / "source", weights())
    trained = write_folder(tmp_path / "trained", moved(weights()))
    made = round_trip(source, trained, tmp_path, fast=fast, jobs=jobs)
    assert contents(made) == contents(trained)


@pytest.mark.parametrize(("before", "after", "stem"), [(1, 3, "model"), (3, 1, "model"), (2, 3, "renamed")])
def test_shards_and_their_names_are_the_results(tmp_path, before, after, stem):
    source = write_folder(tmp_path / "source", weights(), shards=before)
    trained = write_folder(tmp_path / "trained", moved(weights()), shards=after, stem=stem)
    assert contents(round_trip(source, trained, tmp_path)) == contents(trained)


def test_added_removed_reshaped_and_recast_tensors(tmp_path):
    tensors = weights()
    after = moved(tensors)
    del after["mask"]
    after["new.weight"] = np.arange(12, dtype=np.float64).reshape(3, 4)
    after["new.empty"] = np.zeros((3, 0), BF16)
    after["embed.weight"] = np.concatenate([after["embed.weight"], after["embed.weight"][:2]])
    after["layer.weight"] = after["layer.weight"].astype(np.float32)
    source, trained = write_folder(tmp_path / "source", tensors), write_folder(tmp_path / "trained", after)
    assert contents(round_trip(source, trained, tmp_path)) == contents(trained)
    with PatchFile(tmp_path / "run.patch") as opened:
        assert opened.removed == ["mask"]
        whole = {name for name, entry in opened.tensors.items() if entry.source_hash is None}
    assert whole == {"new.weight", "new.empty", "embed.weight", "layer.weight"}


def test_files_beside_the_weights(tmp_path):
    """Equal ones come from the source, changed and new ones from the patch, gone ones are gone; others stay out."""
    source, trained = (
        write_folder(tmp_path / "source", weights()),
        write_folder(tmp_path / "trained", weights(), shards=2),
    )
    (source / "gone.json").write_text("{}")
    (trained / "config.json").write_text('{"model_type": "llama", "use_cache": false}')
    (trained / "generation_config.json").write_text('{"temperature": 0.6}')
    (trained / "chat_template.jinja").write_text("{{ messages }}")
    (trained / "empty.txt").write_bytes(b"")
    wanted = contents(trained)
    (trained / "optimizer.bin").write_bytes(b"state")
    (trained / ".cache").write_text("x")
    (trained / "runs").mkdir()
    made = round_trip(source, trained, tmp_path)
    assert contents(made) == wanted
    with PatchFile(tmp_path / "run.patch") as opened:
        assert [file.path for file in opened.files if not file.length] == ["tokenizer.json"]
    (source / "tokenizer.json").write_text("another")
    with pytest.raises(PatchError, match=r"tokenizer\.json"):
        verify(source, [tmp_path / "run.patch"])
    with pytest.raises(PatchError, match=r"tokenizer\.json"):
        apply(source, [tmp_path / "run.patch"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_bare_files(tmp_path):
    for name, tensors in (("a", weights()), ("b", moved(weights()))):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    made = round_trip(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path)
    assert contents(made) == {"b.safetensors": contents(tmp_path)["b.safetensors"]}


def test_equal_checkpoints_cost_their_hashes(tmp_path):
    source = write_folder(tmp_path / "source", weights(size=400))
    trained = write_folder(tmp_path / "trained", weights(size=400))
    made = round_trip(source, trained, tmp_path)
    assert contents(made) == contents(trained)
    assert (tmp_path / "run.patch").stat().st_size < 2000 < (trained / "model.safetensors").stat().st_size // 100


def test_float8_is_carried_as_it_is_stored(tmp_path):
    """Scaled float8 weights are multiplied out for analysis; a patch carries the stored bytes."""
    rng = np.random.default_rng(0)
    tensors = {
        "layer.weight": rng.standard_normal((16, 16)).astype(ml_dtypes.float8_e4m3fn),
        "layer.weight_scale": np.array(0.5, np.float32),
    }
    after = dict(tensors)
    after["layer.weight"] = tensors["layer.weight"][::-1].copy()
    source, trained = write_folder(tmp_path / "source", tensors), write_folder(tmp_path / "trained", after)
    assert contents(round_trip(source, trained, tmp_path)) == contents(trained)


def test_bytes_that_no_tensor_owns_are_refused(tmp_path):
    source = write_folder(tmp_path / "source", weights())
    trained = write_folder(tmp_path / "trained", moved(weights()))
    with (trained / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(PatchError, match="belong to no tensor"):
        pack(source, trained, tmp_path / "run.patch")
    assert not (tmp_path / "run.patch").exists()


@pytest.mark.parametrize("side", ["source", "trained", "both"])
def test_torch_files(tmp_path, side):
    """A torch file's result is one safetensors file of the same bits."""
    import torch

    tensors = {name: values for name, values in weights().items() if name != "mask"}
    after = moved(tensors)
    folders = {}
    for name, content in (("source", tensors), ("trained", after)):
        if side not in (name, "both"):
            folders[name] = write_folder(tmp_path / name, content)
            continue
        folders[name] = tmp_path / name
        folders[name].mkdir()
        state = {
            key: torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            if values.dtype == BF16
            else torch.from_numpy(values)
            for key, values in content.items()
        }
        torch.save(state, folders[name] / "pytorch_model.bin")
    made = round_trip(folders["source"], folders["trained"], tmp_path)
    assert [file.name for file in made.glob("*model*")] == ["model.safetensors"]
    result = load_file(made / "model.safetensors")
    assert {name: values.tobytes() for name, values in result.items()} == {n: v.tobytes() for n, v in after.items()}


def test_result_loads_with_transformers(tiny_model, tmp_path):
    """A tiny Llama, stepped: from_pretrained takes the result, and its parameters are TRAINED's bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "trained")
    made = round_trip(tiny_model, tmp_path / "trained", tmp_path)
    assert contents(made) == contents(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), loaded[name].view(torch.int16)), name
    AutoTokenizer.from_pretrained(made)


@pytest.fixture
def chain(tmp_path):
    """base → step 1 → step 2 → step 3: tensors come, go, come back, are reshaped; files change and stay."""
    steps = [weights(), moved(weights()), None, None]
    steps[2] = moved(steps[1], 0.02, seed=2)
    steps[2]["late"] = np.arange(7, dtype=np.int32)
    del steps[2]["half.weight"]
    steps[3] = moved(steps[2], 1.0, seed=3)
    steps[3]["half.weight"] = steps[0]["half.weight"]
    steps[3]["norm.weight"] = np.ones((2, 3), np.float32)
    folders = [write_folder(tmp_path / f"step{i}", tensors, shards=1 + i % 2) for i, tensors in enumerate(steps)]
    (folders[1] / "config.json").write_text('{"changed": 1}')
    (folders[2] / "config.json").write_text('{"changed": 1}')
    patches = [tmp_path / f"{i}.patch" for i in range(3)]
    for i, patch in enumerate(patches):
        pack(folders[i], folders[i + 1], patch)
    return folders, patches


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_chain_in_one_pass(chain, tmp_path, last):
    folders, patches = chain
    seen = verify(folders[0], patches[:last])
    result = apply(folders[0], patches[:last], tmp_path / "made")
    assert contents(tmp_path / "made") == contents(folders[last])
    assert seen.result_hash == result.result_hash
    assert (seen.patches, seen.bytes, seen.changed) == (last, result.bytes, result.changed)


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0, 0], [2, 1, 0]])
def test_a_chain_out_of_order_is_refused(chain, tmp_path, order):
    folders, patches = chain
    for run in (
        lambda: verify(folders[0], [patches[i] for i in order]),
        lambda: apply(folders[0], [patches[i] for i in order], tmp_path / "made"),
    ):
        with pytest.raises(PatchError, match="does not start where"):
            run()
    assert not (tmp_path / "made").exists()


def test_no_patch_is_refused(tmp_path):
    with pytest.raises(PatchError, match="no patch"):
        verify(tmp_path, [])


def test_wrong_source_is_refused_naming_the_first_tensor_that_differs(chain, tmp_path):
    folders, patches = chain
    tensors = weights()
    tensors["embed.weight"] = tensors["embed.weight"].copy()
    tensors["embed.weight"].view(np.uint16)[3, 3] ^= 1
    tensors["layer.weight"] = -tensors["layer.weight"]
    wrong = write_folder(tmp_path / "wrong", tensors)
    names = list(json.loads(_header(folders[1] / "model-00001-of-00002.safetensors")))
    first = next(name for name in names if name in ("embed.weight", "layer.weight"))
    for run in (
        lambda: verify(wrong, patches[:1]),
        lambda: apply(wrong, patches[:1], tmp_path / "made"),
        lambda: apply(wrong, patches, tmp_path / "made"),
    ):
        with pytest.raises(PatchError, match=first):
            run()
    assert not (tmp_path / "made").exists()


def _header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_a_source_of_other_tensors_is_refused(chain, tmp_path):
    folders, patches = chain
    for change, match in (("drop", "is absent"), ("cast", "is F64"), ("shape", r"is F32 \[2, 20\]")):
        tensors = weights()
        norm = tensors.pop("norm.weight")
        if change != "drop":
            tensors["norm.weight"] = norm.astype(np.float64) if change == "cast" else norm.reshape(2, 20)
        wrong = write_folder(tmp_path / change, tensors)
        with pytest.raises(PatchError, match=match):
            verify(wrong, patches[:1])
    with pytest.raises(CheckpointError):
        apply(tmp_path / "absent", patches[:1], tmp_path / "made")
    with pytest.raises(PatchError, match="cannot be opened"):
        apply(folders[0], [tmp_path / "absent.patch"], tmp_path / "made")
    with pytest.raises(PatchError, match="cannot be read"):
        apply(folders[0], [tmp_path], tmp_path / "made")


def test_what_is_there_is_not_touched(chain, tmp_path):
    folders, patches = chain
    for output in (folders[2], patches[0]):
        before = contents(tmp_path)
        with pytest.raises(PatchError, match="exists already"):
            apply(folders[0], patches[:1], output)
        assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    apply(folders[0], patches[:1], tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(folders[1])


def test_outputs_in_new_folders_and_relative_paths(chain, tmp_path, monkeypatch):
    folders, patches = chain
    apply(folders[0], patches[:1], tmp_path / "a" / "b" / "made")
    assert contents(tmp_path / "a") == {f"b/made/{name}": digest for name, digest in contents(folders[1]).items()}
    monkeypatch.chdir(tmp_path)
    apply("step0", ["0.patch"], "relative/")
    assert contents(tmp_path / "relative") == contents(folders[1])


def test_progress_counts_every_byte(chain):
    folders, patches = chain
    seen: list[tuple[int, int, str]] = []
    verify(folders[0], patches[:1], progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    assert seen[-1][0] == seen[-1][1] == sum(values.nbytes for values in weights().values())


def as_torch(tensors: dict[str, np.ndarray]) -> dict[str, object]:
    import torch

    return {
        name: torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        if values.dtype == BF16
        else torch.from_numpy(values.copy())
        for name, values in tensors.items()
    }


def bits(state: dict) -> dict[str, bytes]:
    out = {}
    for name, values in state.items():
        if not isinstance(values, np.ndarray):
            import torch

            values = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        out[name] = values.tobytes()
    return out


@pytest.fixture
def loaded(tmp_path):
    tensors = weights()
    after = moved(tensors)
    source, trained = write_folder(tmp_path / "source", tensors), write_folder(tmp_path / "trained", after)
    pack(source, trained, tmp_path / "run.patch")
    return tensors, after, tmp_path / "run.patch"


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_in_place(loaded, kind):
    tensors, after, patch = loaded
    state = {n: v.copy() for n, v in tensors.items()} if kind == "numpy" else as_torch(tensors)
    held = dict(state)
    assert apply_in_place(state, patch) == 4
    assert bits(state) == bits(after)
    assert all(state[name] is held[name] for name in state)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_in_place_wrong_state_is_refused_and_nothing_is_changed(loaded, kind):
    tensors, _, patch = loaded
    for name in tensors:
        if not tensors[name].size:
            continue
        wrong = {n: v.copy() for n, v in tensors.items()}
        wrong[name].reshape(-1).view(np.uint8)[-1] ^= 1
        state = wrong if kind == "numpy" else as_torch(wrong)
        before = bits(state)
        with pytest.raises(PatchError, match=name):
            apply_in_place(state, patch)
        assert bits(state) == before
    state = {name: values for name, values in tensors.items() if name != "embed.weight"}
    with pytest.raises(PatchError, match="embed"):
        apply_in_place(state, patch)


def test_in_place_tied_parameters_views_and_parameters(tmp_path):
    """Tied tensors that the patch has twice; a transposed view; a parameter that requires a gradient."""
    import torch

    tensors = {"a": weights()["embed.weight"], "c": weights()["layer.weight"]}
    tensors["b"] = tensors["a"]
    after = moved(tensors)
    after["b"] = after["a"]
    source, trained = write_folder(tmp_path / "source", tensors), write_folder(tmp_path / "trained", after)
    pack(source, trained, tmp_path / "run.patch")
    state = as_torch(tensors)
    state["a"] = torch.nn.Parameter(state["a"])
    state["b"] = state["a"]
    state["c"] = state["c"].t().contiguous().t()
    apply_in_place(state, tmp_path / "run.patch")
    assert bits(state) == bits(after)


def test_in_place_refuses_new_tensors(tmp_path):
    after = {**weights(), "new": np.ones(3, np.float32)}
    source, trained = write_folder(tmp_path / "source", weights()), write_folder(tmp_path / "trained", after)
    pack(source, trained, tmp_path / "run.patch")
    with pytest.raises(PatchError, match="'new' is new or reshaped"):
        apply_in_place(weights(), tmp_path / "run.patch")


def test_in_place_refuses_removed_tensors(tmp_path):
    after = moved(weights())
    del after["mask"]
    source, trained = write_folder(tmp_path / "source", weights()), write_folder(tmp_path / "trained", after)
    pack(source, trained, tmp_path / "run.patch")
    state = weights()
    with pytest.raises(PatchError, match="removes tensor 'mask'"):
        apply_in_place(state, tmp_path / "run.patch")
    assert bits(state) == bits(weights())
