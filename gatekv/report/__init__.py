"""Reports: pictures and tables of a results.json, and one page that a browser opens without a network."""

from gatekv.report.bits import bits
from gatekv.report.frontier import frontier
from gatekv.report.keep import keep
from gatekv.report.needle import needle
from gatekv.report.page import page
from gatekv.report.tables import tables

__all__ = ["bits", "frontier", "keep", "needle", "page", "tables"]
