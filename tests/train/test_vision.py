"""Image-text models: the small VLM, processors, generation from images, their evaluation."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from vision_fixtures import byte_tokenizer, red_or_blue, tiny_idefics3, tiny_llava

from deltalens.cli import app
from deltalens.errors import ConfigError
from deltalens.train.evaluate import evaluate, generate
from deltalens.train.models import load_model, load_processor, quiet_libraries, save_model, sees_images
from deltalens.train.small_vlm import build_small_vlm
from deltalens.train.tasks import Example


@pytest.fixture(scope="module", params=[tiny_idefics3, tiny_llava], ids=["idefics3", "llava"])
def tiny_vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet_libraries():
        return request.param(tmp_path_factory.mktemp("vlm") / "model")


class Colours:
    """Colours of plain images; a reply counts if it holds the letter `e`, so that a random model is sometimes right."""

    name = "colours"
    reply_tokens = 6

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def train(self, count: int, seed: int = 0) -> list[Example]:
        return self.test(count)

    def test(self, count: int) -> list[Example]:
        examples = red_or_blue(count)
        if self.folder is None:
            return examples
        files = [self.folder / f"{index}.png" for index in range(count)]
        for example, file in zip(examples, files, strict=True):
            example.images[0].save(file)
        return [replace(example, images=(str(file),)) for example, file in zip(examples, files, strict=True)]

    def score(self, reply: str, example: Example) -> bool:
        return "e" in reply


def test_greedy_replies_to_images_do_not_depend_on_the_batch(tiny_vlm: Path) -> None:
    with quiet_libraries():
        model, processor = load_model(tiny_vlm, "float32"), load_processor(tiny_vlm)
        examples = red_or_blue(6)
        prompts, images = [e.prompt for e in examples], [e.images for e in examples]
        together = generate(model, processor, prompts, images=images, temperature=0, max_new_tokens=8)
        alone = [
            generate(model, processor, [prompt], images=[shown], temperature=0, max_new_tokens=8)[0]
            for prompt, shown in zip(prompts, images, strict=True)
        ]
        swapped = generate(
            model, processor, prompts[:2], images=[images[1], images[0]], temperature=0, max_new_tokens=8
        )
    assert together == alone
    assert swapped != together[:2], "the image must reach the model"


def test_an_image_text_model_answers_text(tiny_vlm: Path) -> None:
    with quiet_libraries():
        model, processor = load_model(tiny_vlm, "float32"), load_processor(tiny_vlm)
        both = generate(model, processor, ["a", "a b c"], temperature=0, max_new_tokens=4)
        assert both[0] == generate(model, processor, ["a"], temperature=0, max_new_tokens=4)[0]


def test_no_reply_holds_an_image_token(tiny_vlm: Path) -> None:
    with quiet_libraries():
        model, processor = load_model(tiny_vlm, "float32"), load_processor(tiny_vlm)
        image = model.config.image_token_id
        with torch.no_grad():  # an image token at every step, were it allowed
            head = model.get_output_embeddings().weight
            model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros_like(head))
            hook = model.get_output_embeddings().register_forward_hook(
                lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([image]), 9.0)
            )
        done = generate(model, processor, ["a"], temperature=0, max_new_tokens=4)
        hook.remove()
    # Then 0, the end, is the first of the equals.
    assert done == [("", 1, False)]


def test_evaluation_of_an_image_text_model(tiny_vlm: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_vlm, Colours(), problems=8)
    assert result.max_new_tokens == 6
    from_files = evaluate(tiny_vlm, Colours(tmp_path), problems=8)
    assert [g.reply for g in from_files.generations] == [g.reply for g in result.generations]
    from_files.save(tmp_path / "replies.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [[str(tmp_path / f"{i}.png")] for i in range(8)]


def test_text_models_and_broken_images_are_refused(tiny_model: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a text model, and colours asks about images"):
        evaluate(tiny_model, Colours(), problems=2)
    file = tmp_path / "no.png"
    file.write_text("no image")
    with quiet_libraries():
        model, processor = load_model(tiny_vlm, "float32"), load_processor(tiny_vlm)
        with pytest.raises(ConfigError, match=r"no\.png: is not an image"):
            generate(model, processor, ["a"], images=[(str(file),)], temperature=0, max_new_tokens=4)


def test_what_kind_of_model_a_folder_holds(tiny_model: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    with quiet_libraries():
        assert sees_images(tiny_vlm)
        assert not sees_images(tiny_model)
        assert not hasattr(load_processor(tiny_model), "image_processor")
        processor = load_processor(tiny_vlm)
        assert processor.tokenizer.padding_side == "left"
        assert not sees_images(tmp_path)
        # gemma3 is both kinds: what was saved decides.
        for architecture, seeing in (("Gemma3ForConditionalGeneration", True), ("Gemma3ForCausalLM", False)):
            config = {"model_type": "gemma3", "architectures": [architecture]}
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert sees_images(tmp_path) == seeing


def test_saved_with_its_processor_it_loads_again(tiny_vlm: Path, tmp_path: Path) -> None:
    with quiet_libraries():
        save_model(load_model(tiny_vlm, "float32"), load_processor(tiny_vlm), tmp_path / "again")
        again = load_model(tmp_path / "again", "bfloat16").state_dict()
        assert all(torch.equal(again[name], w) for name, w in load_model(tiny_vlm, "bfloat16").state_dict().items())
        assert load_processor(tmp_path / "again").chat_template == load_processor(tiny_vlm).chat_template


def test_broken_processors_are_one_clear_line(tiny_vlm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_vlm / "config.json").read_text())
    with quiet_libraries():
        with pytest.raises(ConfigError, match=r"its processor cannot be loaded|no image processor") as caught:
            load_processor(tmp_path)
        assert "\n" not in str(caught.value)
        save_model(load_model(tiny_vlm, "bfloat16"), load_processor(tiny_vlm), tmp_path / "mute")
        (tmp_path / "mute" / "chat_template.jinja").unlink()
        with pytest.raises(ConfigError, match="no chat template"):
            load_processor(tmp_path / "mute")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    byte_tokenizer("<|image_pad|>", "<|video_pad|>").save_pretrained(tmp_path)
    config = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kinds = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kinds))
    with quiet_libraries(), pytest.raises(ConfigError, match="needs torchvision, which is not installed") as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


SMALL = {"vision_layers": 1, "hidden": 16, "image_size": 16, "patch": 4, "scale_factor": 2}


def test_small_vlm_keeps_the_text_weights_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    build_small_vlm(tiny_model, tmp_path / "vlm", **SMALL)
    text, built = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "vlm" / "model.safetensors")
    assert len(text) > 10
    for name, weight in text.items():
        copy = built[name.replace("model.", "model.text_model.", 1)]
        assert torch.equal(copy[: len(weight)].view(torch.int16), weight.view(torch.int16)), name
    assert any(name.startswith("model.vision_model.") for name in built)
    with quiet_libraries(), torch.no_grad():
        model = load_model(tmp_path / "vlm", "float32")
        shown = model.model.get_image_features(torch.randn(8, 1, 3, 16, 16)).pooler_output
    words = text["model.embed_tokens.weight"].float().square().mean().sqrt()
    assert torch.cat(shown).square().mean().sqrt() == pytest.approx(words.item(), rel=0.3)
    with quiet_libraries():
        model, processor = load_model(tmp_path / "vlm", "float32"), load_processor(tmp_path / "vlm")
        examples = red_or_blue(2)
        replies = generate(
            model,
            processor,
            [e.prompt for e in examples],
            images=[e.images for e in examples],
            temperature=0,
            max_new_tokens=5,
        )
        assert len(replies) == 2
        inputs = processor(text=["<image>a"], images=[[examples[0].images[0]]], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    assert tuple(inputs["pixel_values"].shape) == (1, 1, 3, 16, 16)


def test_small_vlm_is_the_same_for_the_same_seed(tiny_model: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        return load_file(build_small_vlm(tiny_model, tmp_path / name, seed=seed, **SMALL) / "model.safetensors")

    state = torch.get_rng_state()
    one, same, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    tower = "model.vision_model.embeddings.patch_embedding.weight"
    assert not torch.equal(one[tower], other[tower])


def test_small_vlm_with_fewer_layers_and_an_untied_head(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "untied"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_small_vlm(folder, tmp_path / "vlm", text_layers=1, dtype="float32", **SMALL)
    with quiet_libraries():
        model = load_model(tmp_path / "vlm", "float32")
    assert len(model.model.text_model.layers) == 1
    rows = len(weights["lm_head.weight"])
    assert torch.equal(model.lm_head.weight[:rows], weights["lm_head.weight"].float())


def test_small_vlm_refuses_what_cannot_be_built(tiny_model: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    for wrong in ({"patch": 5}, {"scale_factor": 3}, {"hidden": 193}):
        with pytest.raises(ConfigError, match="patch must divide image_size"):
            build_small_vlm(tiny_model, tmp_path / "vlm", **{**SMALL, **wrong})
    with pytest.raises(ConfigError, match="needs a Llama-like model, not"):
        build_small_vlm(tiny_vlm, tmp_path / "vlm", **SMALL)
    assert not list(tmp_path.iterdir())


def test_commands(tiny_model: Path, tmp_path: Path) -> None:
    sizes = ["--vision-layers", "1", "--hidden", "16", "--image-size", "16", "--patch", "4"]
    built = CliRunner().invoke(app, ["small-vlm", "-o", str(tmp_path / "vlm"), "--model", str(tiny_model), *sizes])
    assert built.exit_code == 0, built.output
    asked = ["eval", str(tmp_path / "vlm"), "--task", "easy-vqa", "--problems", "4", "--samples", "2"]
    done = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "replies.jsonl"), "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["problems"], summary["samples"], summary["max_new_tokens"]) == (4, 2, 8)
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(Path(row["images"][0]).is_file() for row in rows)
    again = CliRunner().invoke(app, [*asked, "--dtype", "float32", "--json"])
    assert [summary["dtype"], json.loads(again.stdout)["dtype"]] == ["bfloat16", "float32"]
