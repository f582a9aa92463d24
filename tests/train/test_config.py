"""Run configs: what is refused, and how it is said."""

from pathlib import Path

import pytest

from deltalens.errors import ConfigError
from deltalens.train.arguments import trl_arguments
from deltalens.train.config import GRPORun, OPDRun, SFTRun, TeacherEndpoint, load_config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "method is None; choose one of grpo, opd, opsd, seqkd, sft"),
        ({"method": "ppo"}, "method is 'ppo'"),
        ({"method": "sft", "lernrate": 1}, "unknown key 'lernrate'; did you mean learning_rate?"),
        ({"method": "sft", "loss": "k1"}, "unknown key 'loss'"),
        ({"method": "sft", "steps": 0}, r"steps: .* \(it is 0\)"),
        ({"method": "seqkd"}, "teacher is missing"),
        ({"method": "opd"}, "give either teacher"),
        ({"method": "opd", "teacher": "a", "teachers": {"x": "b"}, "teacher_column": "c"}, "give either teacher"),
        ({"method": "opd", "teachers": {"x": "b"}}, "need each other"),
        ({"method": "opd", "teacher": "a", "teacher_column": "c"}, "need each other"),
        ({"method": "opd", "teacher": "a", "token_share": 0}, "token_share"),
        ({"method": "sft", "lora": {"rank": 4}}, "unknown key 'lora.rank'"),
        ({"method": "grpo", "samples_per_prompt": 1}, "samples_per_prompt"),
    ],
)
def test_mistakes_are_named(content: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(content)
    assert "\n" not in str(error.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read"):
        load_config(file)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match=r"run\.yaml: is not YAML"):
        load_config(file)
    file.write_text("- 1")
    with pytest.raises(ConfigError, match="keys and values"):
        load_config(file)
    file.write_text("method: opd\nteacher: t\nlearning_rate: 1e-5\n")  # YAML reads 1e-5 as a string
    run = load_config(file, ["loss=k1", "trainer.top_p=0.9", "lora.r=4", "steps=7"])
    assert isinstance(run, OPDRun)
    assert (run.learning_rate, run.loss, run.steps, run.trainer) == (1e-5, "k1", 7, {"top_p": 0.9})
    assert run.lora is not None
    assert run.lora.r == 4
    for bad, said in (("steps", "key=value"), ("=3", "key=value"), ("steps=[", "not a YAML value")):
        with pytest.raises(ConfigError, match=said):
            load_config(file, [bad])


def test_a_teacher_is_a_folder_or_an_endpoint() -> None:
    run = load_config({"method": "opd", "teacher": {"url": "http://localhost:8000", "model": "m"}})
    assert isinstance(run.teacher, TeacherEndpoint)
    with pytest.raises(ConfigError, match="teacher"):
        load_config({"method": "opd", "teacher": {"url": "http://localhost:8000"}})


def test_the_shipped_examples_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    assert files
    for file in files:
        load_config(file)


def test_trl_gets_its_arguments(tmp_path: Path) -> None:
    from trl import GRPOConfig, SFTConfig

    run = GRPORun(method="grpo", prompts_per_step=4, samples_per_prompt=6, micro_batch=8, schedule="linear")
    arguments = trl_arguments(GRPOConfig, run, tmp_path, num_generations=6)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (8, 3)
    assert arguments.lr_scheduler_type == "linear"
    with pytest.raises(ConfigError, match="micro_batch 5 does not divide a process's share of 24"):
        trl_arguments(GRPOConfig, run.model_copy(update={"micro_batch": 5}), tmp_path)
    chosen = SFTRun(method="sft", trainer={"max_length": 77, "gradient_checkpointing": True})
    arguments = trl_arguments(SFTConfig, chosen, tmp_path)
    assert (arguments.max_length, arguments.gradient_checkpointing) == (77, True)
    unknown = SFTRun(method="sft", trainer={"max_lenght": 77})
    with pytest.raises(ConfigError, match="SFTConfig has no argument 'max_lenght'; did you mean max_length"):
        trl_arguments(SFTConfig, unknown, tmp_path)
    refused = SFTRun(method="sft", trainer={"lr_scheduler_type": "sideways"})
    with pytest.raises(ConfigError, match="SFTConfig refuses"):
        trl_arguments(SFTConfig, refused, tmp_path)
