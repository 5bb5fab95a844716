"""Whether all ranks clip by the same norm: what each rank has, what follows from it, and what to do."""

from torchclip.ranks_report.report import RanksReport, check_ranks

__all__ = ["RanksReport", "check_ranks"]
