"""Fixtures that several folders of tests use."""

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (bfloat16) with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    vocabulary = ["<|end|>", "<|user|>", "<|assistant|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class WriteCheckpoint(Protocol):
    """Writes arrays as a safetensors checkpoint, in one file or in several with an index; returns its folder."""

    def __call__(self, tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> Path: ...


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> WriteCheckpoint:
    """Writes a checkpoint into a new folder; of the session's scope, so that hypothesis may use it."""
    root = tmp_path_factory.mktemp("checkpoints")
    numbers = count()

    def write(tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> Path:
        folder = root / f"{next(numbers)}"
        folder.mkdir()
        arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        if shards == 1:
            save_file(arrays, folder / "model.safetensors")
            return folder
        places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(arrays)}
        for file in sorted(set(places.values())):
            save_file({name: arrays[name] for name in arrays if places[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return folder

    return write


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden pairs and of what the paper's script computed on them."""
    return Path(__file__).parent / "data" / "golden"
