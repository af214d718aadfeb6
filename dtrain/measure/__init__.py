"""Where a step's time goes, who waited for whom, what is sent, and what that would be elsewhere."""

from dtrain.measure.clock import Offset, offset_to_first
from dtrain.measure.ledger import Late, Ledger
from dtrain.measure.meter import Meter, PrimaryMeter, Transfer, metered
from dtrain.measure.stopwatch import Sent, StepTimes, Stopwatch
from dtrain.measure.summary import mean, summarise
from dtrain.measure.trace import Chosen

__all__ = [
    "Chosen",
    "Late",
    "Ledger",
    "Meter",
    "Offset",
    "PrimaryMeter",
    "Sent",
    "StepTimes",
    "Stopwatch",
    "Transfer",
    "mean",
    "metered",
    "offset_to_first",
    "summarise",
]
