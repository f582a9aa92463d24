"""A small SmolVLM-like model: an untrained vision tower before the text weights of a small language model.

Idefics3 (Laurençon et al. 2024, arXiv 2408.12637) puts a SigLIP-like tower, a pixel shuffle and one projection before
a Llama; SmolVLM is the same with SmolLM2. Here the tower has a few layers, sees one small image without splitting it,
and starts from random weights, so that a laptop's CPU can train it; the text weights are the given model's own bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from deltalens.errors import ConfigError
from deltalens.train.models import load_model, load_tokenizer, quiet_libraries, save_model

__all__ = ["build_small_vlm"]

_NEW_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")

# ChatML as SmolLM2 writes it, without a system message unless one is given: twenty tokens less a prompt.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_small_vlm(
    text_folder: Path,
    out: Path,
    *,
    vision_layers: int = 4,
    hidden: int = 192,
    image_size: int = 64,
    patch: int = 8,
    scale_factor: int = 2,
    text_layers: int | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> Path:
    """Write an untrained image-text model that AutoModelForImageTextToText and AutoProcessor load.

    An image becomes (image_size / patch / scale_factor)² tokens, 16 by default, between two markers.

    Args:
        text_folder: a Llama-like causal language model with ChatML tokens (SmolLM2-135M-Instruct), a local folder.
        out: the new model folder.
        vision_layers: layers of the vision tower.
        hidden: its width; heads have 64 channels (or it has one), its MLP four times the width.
        image_size, patch: of the square image that the processor makes, in pixels; patch divides image_size.
        scale_factor: patches a token along each side.
        text_layers: keep only the first layers of the text model; None for all.
        seed: of the random weights.
        dtype: of the saved weights. The text weights are the source's bits if it has the same dtype.

    Returns:
        `out`.

    Raises:
        ConfigError: the text model cannot be used, or the sizes do not divide each other.
    """
    import torch

    side = image_size // patch
    if image_size % patch or side % scale_factor or hidden % max(1, hidden // 64):
        raise ConfigError(
            f"small VLM: patch must divide image_size, scale_factor their ratio, and {max(1, hidden // 64)} heads "
            f"hidden; got image_size={image_size}, patch={patch}, scale_factor={scale_factor}, hidden={hidden}"
        )
    with quiet_libraries(), torch.random.fork_rng():
        tokenizer = load_tokenizer(text_folder)
        text = load_model(text_folder, "float32")
        if text.config.model_type != "llama":
            raise ConfigError(f"{text_folder}: the small VLM needs a Llama-like model, not {text.config.model_type}")
        tokenizer.add_special_tokens({"additional_special_tokens": list(_NEW_TOKENS)})
        torch.manual_seed(seed)
        vision = {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(1, hidden // 64),
            "image_size": image_size,
            "patch_size": patch,
        }
        model = _assemble(text, tokenizer, vision, scale_factor, text_layers)
        save_model(model.to(getattr(torch, dtype)), _processor(tokenizer, image_size, side // scale_factor), out)
    return out


def _assemble(text: Any, tokenizer: Any, vision: dict[str, Any], scale_factor: int, text_layers: int | None) -> Any:
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    end = tokenizer.eos_token_id
    config = text.config.to_dict() | {"vocab_size": len(tokenizer), "pad_token_id": end}
    if text_layers is not None:
        config["num_hidden_layers"] = text_layers
    tied = text.config.tie_word_embeddings
    settings: dict[str, Any] = {
        "text_config": config,
        "vision_config": vision,
        "scale_factor": scale_factor,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": tied,
        "pad_token_id": end,  # taken through the config's **kwargs, which its signature does not name
    }
    model = Idefics3ForConditionalGeneration(Idefics3Config(**settings))
    weights = text.model.state_dict()
    weights["embed_tokens.weight"] = _extended(weights["embed_tokens.weight"], len(tokenizer))
    wanted = set(model.model.text_model.state_dict())
    model.model.text_model.load_state_dict({name: weight for name, weight in weights.items() if name in wanted})
    if not tied:
        model.lm_head.weight.data = _extended(text.lm_head.weight.detach(), len(tokenizer))
    # The tower ends in a layer norm: its outputs have variance 1. With this scale the image's tokens come in at the
    # size of the words' and not several times larger.
    size = weights["embed_tokens.weight"].square().mean().sqrt()
    projection = model.model.connector.modality_projection.proj.weight
    projection.data = torch.randn_like(projection) * size / projection.shape[1] ** 0.5
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = tokenizer.bos_token_id, end, end
    return model


def _extended(embedding: Any, rows: int) -> Any:
    """The embedding with new rows near the mean of the old ones, where no new token stands out as an output."""
    import torch

    mean = embedding.mean(dim=0)
    new = mean + 0.01 * torch.randn(rows - len(embedding), len(mean))
    return torch.cat([embedding, new])


def _processor(tokenizer: Any, image_size: int, tokens_a_side: int) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    edge = {"longest_edge": image_size}
    return Idefics3Processor(
        Idefics3ImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge),
        tokenizer,
        image_seq_len=tokens_a_side**2,
        chat_template=_TEMPLATE,
    )
