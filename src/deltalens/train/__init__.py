"""Training runs and their evaluation. The modules that need torch import it themselves; this one imports nothing."""

__all__: list[str] = []
