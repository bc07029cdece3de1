"""The validation report: predictions beside measurements as one page that a person reads."""

from planner.validation.report.write import Report, check_installed, make_report, write_report

__all__ = ["Report", "check_installed", "make_report", "write_report"]
