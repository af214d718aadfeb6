"""Where a step's time goes, and what is sent."""

from dtrain.measure.meter import Meter, PrimaryMeter, metered
from dtrain.measure.stopwatch import Stopwatch, summarise

__all__ = ["Meter", "PrimaryMeter", "Stopwatch", "metered", "summarise"]
