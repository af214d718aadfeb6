"""A report on runs: one HTML file, to be opened in a browser, read on a phone, or printed.

Needs the extra `dtrain[report]`: matplotlib draws the pictures, Jinja2 fills in the page and escapes what users wrote.
"""

from dtrain.measure.report.page import render

__all__ = ["render"]
