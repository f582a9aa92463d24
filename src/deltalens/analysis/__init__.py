"""From checkpoint pairs to tables: the streaming pass, the engine that runs it, the summary."""

from deltalens.analysis.analyze import analyze
from deltalens.analysis.result import AnalysisResult
from deltalens.analysis.settings import Settings

__all__ = ["AnalysisResult", "Settings", "analyze"]
