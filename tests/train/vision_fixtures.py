"""Tiny random image-text models with their processors, built offline: Idefics3 and LLaVA, a few thousand parameters.

`from vision_fixtures import tiny_idefics3, tiny_llava, red_or_blue` in a test of this folder; each builder writes a
model folder that AutoModelForImageTextToText and AutoProcessor load.
"""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltalens.train.tasks import Example

__all__ = ["TEMPLATE", "byte_tokenizer", "red_or_blue", "tiny_idefics3", "tiny_llava"]

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "initializer_range": 0.3,
}


def byte_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token a byte; `<|end|>` is 0, then the chat's two roles, then `special`."""
    first = ["<|end|>", "<|user|>", "<|assistant|>", *special]
    vocabulary = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=first[1:],
    )


def tiny_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Write an Idefics3 of 4 image tokens (between two markers and a tag) a 16 × 16 image; returns the folder."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={**_TEXT, "vocab_size": len(tokenizer), "tie_word_embeddings": True},
            vision_config={**_VISION, "patch_size": 4},
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    )
    side = {"longest_edge": 16}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=side, max_image_size=side)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    return _save(model, processor, folder)


def tiny_llava(folder: Path, *, seed: int = 0) -> Path:
    """Write a LLaVA (a CLIP tower, an untied head) of 4 image tokens a 16 × 16 image; returns the folder."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer("<image>")
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={**_TEXT, "vocab_size": len(tokenizer), "tie_word_embeddings": False},
            vision_config={**_VISION, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 16},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return _save(model, processor, folder)


def red_or_blue(count: int) -> list[Example]:
    """Questions on images of one colour each, of different sizes."""
    colours = [("red", (220, 20, 20)), ("blue", (20, 20, 220))]
    return [
        Example(
            prompt="Which colour? " + "Say it. " * (index % 3),
            context=f" ({colours[index % 2][0]})",
            answer=colours[index % 2][0],
            images=(Image.new("RGB", (16 + 4 * (index % 2), 16), colours[index % 2][1]),),
        )
        for index in range(count)
    ]


def _save(model: torch.nn.Module, processor: object, folder: Path) -> Path:
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0  # type: ignore[union-attr]
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
