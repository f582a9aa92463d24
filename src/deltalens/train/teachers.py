"""Teachers that are not one local model: several, routed by a dataset column, or one behind an endpoint."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EndpointTeacher"]


@dataclass(frozen=True)
class EndpointTeacher:
    """A teacher served by vLLM or another OpenAI-compatible server that returns prompt logprobs."""

    url: str
    model: str
    api_key: str | None = None
