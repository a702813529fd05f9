"""What tables, columns and functions are called in questions."""

from demo.frames import Words

SHOWN = {
    "employees": "employees.name",
    "customers": "customers.name",
    "projects": "projects.name",
    "departments": "departments.name",
    "orders": "orders.id",
}
"""The column that stands for a row."""

EXTRAS = {
    "employees": {"salary": "salaries", "title": "titles", "city": "cities", "hire_date": "hire dates"},
    "orders": {"amount": "amounts", "order_date": "order dates", "status": "statuses"},
    "projects": {"budget": "budgets", "start_date": "start dates", "status": "statuses"},
    "customers": {"city": "cities", "industry": "industries"},
}

GROUPS = {
    "employees": {
        "employees.city": ("city", "cities"),
        "employees.title": ("title", "titles"),
        "departments.name": ("department", "departments"),
    },
    "orders": {
        "orders.status": ("status", "statuses"),
        "customers.name": ("customer", "customers"),
        "customers.industry": ("industry", "industries"),
        "customers.city": ("customer city", "customer cities"),
        "employees.name": ("employee", "employees"),
    },
    "assignments": {"projects.name": ("project", "projects"), "employees.name": ("employee", "employees")},
    "customers": {"customers.city": ("city", "cities"), "customers.industry": ("industry", "industries")},
    "projects": {"projects.status": ("status", "statuses")},
}

LOOKUPS: tuple[tuple[str, str, str, str, Words], ...] = (
    (
        "employees.name",
        "{}",
        "employees.salary",
        "salary",
        Words(("How much does {v} earn?",), ("How much is {v} paid?",)),
    ),
    ("employees.name", "{}", "employees.title", "job title", Words(("What is the title of {v}?",))),
    (
        "employees.name",
        "{}",
        "employees.city",
        "city",
        Words(("Where does {v} live?",), ("What city does {v} live in?",)),
    ),
    (
        "employees.name",
        "{}",
        "employees.hire_date",
        "hire date",
        Words(("When was {v} hired?",), ("When did {v} join?",)),
    ),
    (
        "employees.name",
        "{}",
        "departments.name",
        "department",
        Words(("Which department does {v} work in?",), ("Which department does {v} belong to?",)),
    ),
    ("departments.name", "the {} department", "departments.budget", "budget", Words(())),
    ("projects.name", "project {}", "projects.budget", "budget", Words(())),
    ("projects.name", "project {}", "projects.status", "status", Words(())),
    (
        "projects.name",
        "project {}",
        "projects.start_date",
        "start date",
        Words(("When did {v} start?",), ("When did {v} begin?",)),
    ),
    (
        "customers.name",
        "customer {}",
        "customers.city",
        "city",
        Words(("Where is {v} based?",), ("Where is {v} located?",)),
    ),
    ("customers.name", "customer {}", "customers.industry", "industry", Words(("Which industry is {v} in?",))),
    ("orders.id", "order {}", "orders.amount", "amount", Words(("How much is {v} worth?",))),
    ("orders.id", "order {}", "orders.status", "status", Words(())),
    ("orders.id", "order {}", "orders.order_date", "date", Words(("When was {v} placed?",), ("When was {v} made?",))),
    ("orders.id", "order {}", "customers.name", "customer", Words(("Which customer placed {v}?",), ("Who made {v}?",))),
    ("orders.id", "order {}", "customers.industry", "customer industry", Words(())),
    (
        "orders.id",
        "order {}",
        "employees.name",
        "",
        Words(
            ("Who handled {v}?", "Which employee handled {v}?", "Show who handled {v}."),
            ("Tell me who handled {v}.", "Who managed {v}?"),
        ),
    ),
    (
        "orders.id",
        "order {}",
        "departments.name",
        "",
        Words(
            ("Which department handled {v}?", "Show which department handled {v}.", "What department handled {v}?"),
            ("Tell me which department handled {v}.", "Which department managed {v}?"),
        ),
    ),
)
"""Column that names a thing, how it is named, column shown, that column's word ("" for none), questions of its own."""

FUNCTIONS = {
    "AVG": Words(("average", "mean")),
    "SUM": Words(("total", "combined"), ("overall",)),
    "MAX": Words(("highest", "maximum", "largest"), ("biggest",)),
    "MIN": Words(("lowest", "minimum", "smallest")),
}
DATE_FUNCTIONS = {"MAX": Words(("latest", "most recent")), "MIN": Words(("earliest", "first"))}
MEASURES = {
    "employees.salary": "salary",
    "employees.hire_date": "hire date",
    "orders.amount": "amount",
    "orders.order_date": "order date",
    "projects.budget": "budget",
    "projects.start_date": "start date",
    "departments.budget": "budget",
    "assignments.hours": "number of hours",
}
MORE = {">": Words(("more",)), "<": Words(("fewer",), ("less",))}
ABOVE = {
    ">": Words(("above", "of more than"), ("over", "higher than")),
    "<": Words(("below", "of less than"), ("under", "lower than")),
}
MOST = {True: Words(("highest", "largest"), ("biggest",)), False: Words(("lowest", "smallest"))}
DATE_MOST = {True: Words(("latest", "most recent")), False: Words(("earliest",))}
BEST = {
    ("employees.salary", True): Words(("highest paid", "best paid"), ("top paid",)),
    ("employees.salary", False): Words(("lowest paid", "worst paid")),
    ("employees.hire_date", True): Words(("most recently hired", "newest"), ("latest hired",)),
    ("employees.hire_date", False): Words(("earliest hired", "longest serving")),
    ("orders.amount", True): Words(("largest",), ("biggest",)),
    ("orders.amount", False): Words(("smallest",)),
    ("orders.order_date", True): Words(("latest", "most recent"), ("newest",)),
    ("orders.order_date", False): Words(("earliest", "oldest"), ("first",)),
    ("projects.start_date", True): Words(("newest", "most recently started")),
    ("projects.start_date", False): Words(("oldest", "earliest started")),
}
