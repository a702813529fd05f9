"""Generate the data of `veneer demo`: a made company's database, and questions about it with their SQL.

`python -m demo` (or `make demo-data`) writes it into src/veneer/cli/demo_data, which is part of the package; this
generator is not.
"""

from demo.files import SHOWCASE, write_demo_data
from demo.plans import KINDS
from demo.questions import Question, make_questions

__all__ = ["KINDS", "SHOWCASE", "Question", "make_questions", "write_demo_data"]
