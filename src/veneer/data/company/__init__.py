"""A made company database and questions about it with their SQL: the data of `veneer demo`."""

from veneer.data.company.database import make_database
from veneer.data.company.demo import SHOWCASE, DemoFiles, write_demo_files
from veneer.data.company.plans import KINDS
from veneer.data.company.questions import Question, make_questions

__all__ = ["KINDS", "SHOWCASE", "DemoFiles", "Question", "make_database", "make_questions", "write_demo_files"]
