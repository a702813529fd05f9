"""How a condition is said: phrases that training sees, and phrases kept for held-out questions."""

from collections.abc import Iterator
from dataclasses import dataclass

PHRASES = """
[employees]
employees.city =
    seen: in {} / from {} / based in {} / +live in {} / +work in {}
    held: located in {} / +are based in {} / +are located in {}
employees.city !=
    seen: outside {} / not based in {} / +do not live in {} / +do not work in {}
    held: not located in {} / +are not based in {}
employees.title =
    seen: with the title {} / with the job title {} / +have the title {} / +hold the title {}
    held: holding the title {} / +have the job title {}
employees.title !=
    seen: without the title {} / with a title other than {} / +do not have the title {}
    held: with a job title other than {} / +do not hold the title {}
employees.salary >
    seen: with a salary above {} / earning more than {} / paid more than {} / +earn more than {} / +make more than {}
    held: with a salary over {} / making more than {} / +earn over {} / +are paid more than {}
employees.salary <
    seen: with a salary below {} / earning less than {} / paid less than {} / +earn less than {} / +make less than {}
    held: with a salary under {} / making less than {} / +earn under {} / +are paid less than {}
employees.salary between
    seen: with a salary between {} and {} / earning between {} and {} / +earn between {} and {}
    held: paid between {} and {} / +have a salary between {} and {}
employees.hire_date date
    seen: hired {} / +were hired {} / +joined {} / +started {}
    held: recruited {} / +were recruited {} / +joined the company {}
departments.name =
    seen: in the {} department / from the {} department / +work in the {} department / +belong to the {} department
    held: of the {} department / +are part of the {} department / working in the {} department
departments.name !=
    seen: outside the {} department / +do not work in the {} department / +do not belong to the {} department
    held: not working in the {} department / +are not part of the {} department
departments.budget >
    seen: ~in departments with a budget above {} / +work in departments with a budget over {}
    held: ~from departments with a budget above {} / +work in departments with a budget higher than {}
departments.budget <
    seen: ~in departments with a budget below {} / +work in departments with a budget under {}
    held: ~from departments with a budget below {} / +work in departments with a budget lower than {}
assignments.hours >
    seen: ~with more than {} hours on a project / +worked more than {} hours on a project
    held: ~with over {} hours on a project / +spent more than {} hours on a project
projects.name =
    seen: on project {} / assigned to project {} / +work on project {} / +are assigned to project {}
    held: working on project {} / +are on project {}
projects.status =
    seen: ~on projects with the status {} / +work on projects with the status {}
    held: ~assigned to projects with the status {} / +are on projects with the status {}
orders.amount >
    seen: ~with an order above {} / +handled an order above {} / +handled an order over {}
    held: ~with an order over {} / +handled an order of more than {}
customers.name =
    seen: ~with orders from {} / +handled orders from {} / +handled an order from {}
    held: ~with an order from {} / +handled orders placed by {}
customers.city =
    seen: ~with orders from customers in {} / +handled orders from customers in {}
    held: ~with orders from customers based in {} / +handled orders placed by customers in {}

[orders]
orders.amount >
    seen: with an amount above {} / above {} / over {} / worth more than {} / +are worth more than {}
    held: with an amount over {} / worth over {} / +are worth over {} / of more than {}
orders.amount <
    seen: with an amount below {} / below {} / under {} / worth less than {} / +are worth less than {}
    held: with an amount under {} / worth under {} / +are worth under {} / of less than {}
orders.amount between
    seen: with an amount between {} and {} / worth between {} and {} / +are worth between {} and {}
    held: with a value between {} and {} / +have an amount between {} and {}
orders.order_date date
    seen: placed {} / +were placed {} / dated {}
    held: made {} / +were made {}
orders.status =
    seen: with status {} / with the status {} / +have the status {}
    held: marked as {} / +are marked as {}
orders.status !=
    seen: without the status {} / with a status other than {} / +do not have the status {}
    held: not marked as {} / +are not marked as {}
customers.name =
    seen: from {} / placed by {} / from customer {} / +were placed by {} / +came from {}
    held: made by {} / placed by customer {} / +were made by {}
customers.city =
    seen: ~from customers in {} / ~placed by customers in {} / +came from customers in {}
    held: ~made by customers in {} / ~from customers based in {} / +were placed by customers in {}
customers.city !=
    seen: ~from customers outside {} / +came from customers outside {}
    held: ~placed by customers outside {} / +were placed by customers outside {}
customers.industry =
    seen: ~from customers in the {} industry / +came from customers in the {} industry
    held: ~placed by customers in the {} industry / +were placed by customers in the {} industry
employees.name =
    seen: handled by {} / processed by {} / +were handled by {} / +were processed by {}
    held: managed by {} / +were managed by {}
employees.city =
    seen: ~handled by employees in {} / +were handled by employees in {}
    held: ~managed by employees in {} / +were handled by people in {}
departments.name =
    seen: ~handled by the {} department / ~processed by the {} department / +were handled by the {} department
    held: ~managed by the {} department / +were managed by the {} department

[customers]
customers.city =
    seen: in {} / from {} / based in {} / +are based in {}
    held: located in {} / +are located in {}
customers.city !=
    seen: outside {} / not based in {} / +are not based in {}
    held: not located in {} / +are not located in {}
customers.industry =
    seen: in the {} industry / from the {} industry / +belong to the {} industry / +work in the {} industry
    held: of the {} industry / +are part of the {} industry
customers.industry !=
    seen: outside the {} industry / +do not belong to the {} industry / +do not work in the {} industry
    held: not in the {} industry / +are not part of the {} industry
orders.amount >
    seen: ~with an order above {} / +placed an order above {} / +placed an order over {}
    held: ~with an order over {} / +made an order above {}
orders.status =
    seen: ~with orders with the status {} / +have orders with the status {} / +placed orders with the status {}
    held: ~with orders marked as {} / +have orders marked as {}
orders.order_date date
    seen: ~with orders placed {} / +placed orders {} / +placed an order {}
    held: ~with orders made {} / +made orders {}
employees.name =
    seen: ~with orders handled by {} / served by {} / +were served by {}
    held: ~with orders managed by {} / +placed orders handled by {}
employees.city =
    seen: ~with orders handled by employees in {} / +were served by employees in {}
    held: ~served by employees in {} / +placed orders handled by employees in {}

[projects]
projects.budget >
    seen: with a budget above {} / with a budget over {} / with a budget of more than {} / +have a budget above {}
    held: with a budget higher than {} / +have a budget over {} / +have a budget of more than {}
projects.budget <
    seen: with a budget below {} / with a budget under {} / with a budget of less than {} / +have a budget below {}
    held: with a budget lower than {} / +have a budget under {} / +have a budget of less than {}
projects.budget between
    seen: with a budget between {} and {} / +have a budget between {} and {}
    held: with a budget from {} to {} / +have a budget of between {} and {}
projects.start_date date
    seen: started {} / +started {} / +were started {}
    held: begun {} / +began {}
projects.status =
    seen: with status {} / with the status {} / +have the status {}
    held: marked as {} / +are marked as {}
projects.status !=
    seen: without the status {} / with a status other than {} / +do not have the status {}
    held: not marked as {} / +are not marked as {}
employees.name =
    seen: with {} on the team / +have {} on the team / +include {}
    held: with {} as a team member / +have {} as a team member
employees.city =
    seen: ~with employees in {} / +include employees in {} / ~with people from {}
    held: ~with employees from {} / +include people in {}
employees.title =
    seen: ~with an employee with the title {} / +include an employee with the title {}
    held: ~with a person with the title {} / +include a person with the title {}

[departments]
departments.budget >
    seen: with a budget above {} / with a budget over {} / with a budget of more than {} / +have a budget above {}
    held: with a budget higher than {} / +have a budget over {} / +have a budget of more than {}
departments.budget <
    seen: with a budget below {} / with a budget under {} / with a budget of less than {} / +have a budget below {}
    held: with a budget lower than {} / +have a budget under {} / +have a budget of less than {}
departments.budget between
    seen: with a budget between {} and {} / +have a budget between {} and {}
    held: with a budget from {} to {} / +have a budget of between {} and {}
employees.city =
    seen: ~with employees in {} / +have employees in {} / +employ people in {}
    held: ~with people in {} / +have staff members in {}
employees.title =
    seen: ~with employees with the title {} / +employ people with the title {} / +have employees with the title {}
    held: ~with people with the title {} / +have staff members with the title {}
employees.salary >
    seen: ~with an employee earning more than {} / +have an employee earning more than {}
    held: ~with a person earning more than {} / +employ a person earning more than {}
employees.hire_date year
    seen: ~with employees hired in {} / +hired employees in {} / +hired people in {}
    held: ~with people hired in {} / +recruited employees in {}

[assignments]
employees.name =
    seen: worked by {} / logged by {}
    held: recorded by {}
projects.name =
    seen: spent on project {} / worked on project {}
    held: logged on project {}
employees.city =
    seen: worked by employees in {} / logged by employees in {}
    held: worked by people in {}
employees.title =
    seen: worked by employees with the title {} / logged by employees with the title {}
    held: worked by people with the title {}
projects.status =
    seen: spent on projects with the status {} / worked on projects with the status {}
    held: logged on projects with the status {}
departments.name =
    seen: worked by the {} department / logged by the {} department
    held: recorded by the {} department
"""
"""Per table: `column operator`, then its phrases, split by " / ".

A phrase follows its noun ("employees in Oslo"). "+" marks a verb phrase, which follows "who" or "that" or ends a
question ("Which employees live in Oslo?"); "~" marks a long phrase, which comes after short ones. The operator `date`
stands for five: after, before and between days, in a year, in a month.
"""

DATE_WAYS = {
    ">": "after {}",
    "<": "before {}",
    "between": "between {} and {}",
    "year": "in {}",
    "month": "in {}",
}


@dataclass(frozen=True)
class Filter:
    """A condition on `column` that narrows down rows of `table`, without its constants."""

    table: str
    column: str
    op: str
    """"=", "!=", ">", "<" or "between"; of a date also "year" or "month"."""
    seen: tuple[str, ...]
    """Phrases of training questions."""
    held: tuple[str, ...]
    """Phrases of held-out questions only."""

    @property
    def dated(self) -> bool:
        """Whether the constant is a day, a month or a year."""
        return self.column.endswith("_date")


@dataclass(frozen=True)
class Noun:
    """What rows of a table are called."""

    many: tuple[str, ...]
    """Plurals that training sees."""
    held: tuple[str, ...]
    """Plurals of held-out questions only."""
    one: str
    relative: str
    """The word before a verb phrase: who or that."""
    label: str
    """What a list of them shows: names or ids."""


NOUNS = {
    "employees": Noun(("employees", "people", "staff members"), ("workers",), "employee", "who", "names"),
    "customers": Noun(("customers", "clients"), ("client companies",), "customer", "that", "names"),
    "projects": Noun(("projects",), (), "project", "that", "names"),
    "departments": Noun(("departments",), (), "department", "that", "names"),
    "orders": Noun(("orders",), (), "order", "that", "ids"),
    "assignments": Noun(("",), (), "", "that", ""),
}


def _filters(text: str) -> Iterator[Filter]:
    """The filters that a text such as PHRASES describes."""
    table, lines = "", iter(text.strip().splitlines())
    for line in lines:
        if line.startswith("["):
            table = line.strip("[]")
        elif line:
            column, op = line.split()
            seen, held = (tuple(next(lines).split(": ")[1].split(" / ")) for _ in range(2))
            for way, words in DATE_WAYS.items() if op == "date" else [(op, "{}")]:
                if op == "date":
                    yield Filter(table, column, way, *(tuple(p.format(words) for p in ps) for ps in (seen, held)))
                else:
                    yield Filter(table, column, op, seen, held)


FILTERS = tuple(_filters(PHRASES))
