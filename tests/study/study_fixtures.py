"""A small study and a stand-in for its steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltalens.study.plan import Step
from deltalens.study.steps import made_at


def small_study(**changes: Any) -> dict[str, Any]:
    """A study file with a teacher, two students, masks and a rate search."""
    content: dict[str, Any] = {
        "name": "small",
        "source": "embedded",
        "task": "sums",
        "defaults": {"steps": 4, "learning_rate": 1e-5, "max_new_tokens": 4},
        "runs": {
            "teacher": {"method": "sft", "steps": 8, "snapshot_every": 4},
            "opd": {"method": "opd", "teacher": "teacher", "snapshot_every": 2, "seeds": [0, 1]},
            "opd-mask": {"method": "opd", "teacher": "teacher", "mask": {"from": "opd"}, "seeds": [0, 1]},
            "random": {"method": "opd", "teacher": "teacher", "mask": {"select": "random", "like": "opd-mask"}},
            "sgd": {"method": "opd", "teacher": "teacher", "optimizer": "sgd", "rates": [0.1, 0.3], "best_seeds": [1]},
        },
        "evaluate": {"problems": 10, "curves": ["opd"], "steps": [2], "curve_problems": 5},
        "comparisons": {"pair": ["opd-s0", "opd-s1"]},
        "trajectories": ["opd"],
        "groups": {"first": ["teacher", "opd"], "masks": ["opd-mask", "random"]},
        "tables": {"main": ["teacher", "opd"], "subnetwork": ["opd", "opd-mask", "random"], "optimizers": ["sgd"]},
        "claims": [
            {"id": "low", "text": "small <b>weights</b>", "rule": "above", "margin": 0.01,
             "seen": "analyze:opd:low_magnitude_coverage_10pct_core.pooled", "chance": 0.1,
             "control": "analyze:opd:low_magnitude_coverage_10pct_core.null"},
            {"id": "mask", "text": "enough", "rule": "same", "margin": 0.05, "seen": "eval:opd-mask:accuracy",
             "chance": "eval:opd:accuracy"},
            {"id": "over", "text": "overlap", "rule": "above", "spread": 0.01,
             "seen": "compare:pair/opd>opd:core.a_in_b", "chance": "compare:pair/opd>opd:core.a_in_b_random"},
        ],
        "lacking": {"a table": "it is too large"},
        "scales": {"tiny": {"keep": ["teacher", "opd"], "runs": {"opd": {"steps": 2}}}},
    }  # fmt: skip
    return content | changes


class Stub:
    """Stands in for `perform`: writes what others read, counts its calls, stops where it is told to."""

    def __init__(self, stop_at: str | None = None, outputs: Callable[[str], str] = lambda step: f"made {step}") -> None:
        self.calls: list[str] = []
        self.rates: dict[str, float | None] = {}
        self._stop_at, self._outputs = stop_at, outputs

    def __call__(self, step: Step, folder: Path, *, rate: float | None, quiet: bool) -> tuple[str, dict[str, Any]]:
        if step.id == self._stop_at:
            raise KeyboardInterrupt
        self.calls.append(step.id)
        self.rates[step.id] = rate
        made = made_at(step, folder)
        if step.kind == "train":
            (made / "model").mkdir(parents=True, exist_ok=True)
            (made / "model" / "config.json").write_text("{}")
        elif step.kind in ("mask", "eval"):
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text("x")
        return self._outputs(step.id), self._numbers(step, rate)

    def _numbers(self, step: Step, rate: float | None) -> dict[str, Any]:
        seed = int(step.name[-1]) if step.name[-1].isdigit() else 0
        coverage = {"pooled": 0.32 + 0.001 * seed, "random": 0.1, "null": 0.317, "excess": 1.01}
        pair = {"a_in_b": 0.8, "a_in_b_random": 0.3, "a_in_b_null": 0.6, "a_in_b_excess": 1.3, "b_in_a": 0.7,
                "b_in_a_random": 0.25, "b_in_a_null": 0.5, "sign_agreement": 0.9, "cosine": 0.4}  # fmt: skip
        return {
            "train": {"steps": 4, "learning_rate": rate or 1e-5, "seconds": 1.5},
            "mask": {"density": 0.25},
            "eval": {"accuracy": 0.9 if step.name == "sgd-0.3-s0" else 0.6, "low": 0.5, "high": 0.7},
            "analyze": {
                "relative_norm": 0.001, "sparsity": 0.74 + 0.01 * seed, "top16_energy": {"mean": 0.4, "median": 0.4},
                "stable_rank": {"mean": 8.0, "median": 8.0}, "stable_rank_random": {"mean": 200.0, "median": 200.0},
                "low_magnitude_coverage_10pct_core": coverage, "energy_share": {"ffn": 0.7, "attention": 0.3},
                "parameter_share": {"ffn": 0.6},
            },
            "compare": {"runs": ["opd-s0", "opd-s1"], "pairs": [{"a": "opd-s0", "b": "opd-s1", **pair, "core": pair}]},
            "trajectory": {
                "locked_at": 2,
                "locked_share": 0.5,
                "checkpoints": [
                    {"step": at, "relative_norm": 0.001 * at, "sparsity": 0.9, "stable_rank": 9.0,
                     "stable_rank_null": None, "sim16_right_end": at / 4, "sim16_right_end_null": 0.03,
                     "jaccard_end": at / 4, "jaccard_end_null": 0.2}
                    for at in (2, 4)
                ],
            },
        }.get(step.kind, {})  # fmt: skip
