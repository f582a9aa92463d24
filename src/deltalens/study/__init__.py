"""The paper's experiment as one command: runs from a study file, measured, judged, put beside its tables."""

from __future__ import annotations

from deltalens.study.outcome import Outcome
from deltalens.study.page import write_pages
from deltalens.study.plan import plan, select
from deltalens.study.runner import Runner
from deltalens.study.spec import Study, load_study, packaged_studies

__all__ = ["Outcome", "Runner", "Study", "load_study", "packaged_studies", "plan", "select", "write_pages"]
