"""What a run leaves behind: ``barrier.json``, tables, structures, figures and one offline ``report.html``.

Every function here is pure: it takes ``(run, generations, labels)`` and knows no database. matplotlib, jinja2 and rich
are imported inside the functions that need them.
"""

from flows.report.build import write_report
from flows.report.summary import barrier_summary
from flows.report.table import generation_table, result_lines

__all__ = ["barrier_summary", "generation_table", "result_lines", "write_report"]
