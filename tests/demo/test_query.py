import pytest

from demo.query import Condition, Query, path


@pytest.mark.parametrize(
    ("query", "sql"),
    [
        (
            Query(
                table="employees",
                columns=("employees.name",),
                where=(Condition("employees.city", "=", ("Oslo",)), Condition("employees.salary", ">", (52000,))),
            ),
            "SELECT name FROM employees WHERE city = 'Oslo' AND salary > 52000",
        ),
        (
            Query(
                table="employees",
                columns=("employees.name",),
                where=(Condition("departments.name", "=", ("Sales",)),),
            ),
            "SELECT e.name FROM employees e JOIN departments d ON e.department_id = d.id WHERE d.name = 'Sales'",
        ),
        (
            Query(
                table="customers",
                columns=("customers.name",),
                where=(Condition("employees.city", "!=", ("Rome",)),),
            ),
            "SELECT DISTINCT c.name FROM customers c JOIN orders o ON o.customer_id = c.id "
            "JOIN employees e ON o.employee_id = e.id WHERE e.city != 'Rome'",
        ),
        (
            Query(table="projects", function="COUNT", where=(Condition("assignments.hours", ">", (80,)),)),
            "SELECT COUNT(DISTINCT p.id) FROM projects p JOIN assignments a ON a.project_id = p.id WHERE a.hours > 80",
        ),
        (
            Query(
                table="orders",
                function="SUM",
                measure="orders.amount",
                group="customers.name",
                where=(Condition("orders.order_date", "BETWEEN", ("2020-01-01", "2020-02-01")),),
                order="function",
                limit=3,
            ),
            "SELECT c.name FROM orders o JOIN customers c ON o.customer_id = c.id WHERE o.order_date BETWEEN "
            "'2020-01-01' AND '2020-02-01' GROUP BY c.name ORDER BY SUM(o.amount) DESC LIMIT 3",
        ),
        (
            Query(table="employees", function="AVG", measure="employees.salary", group="employees.city"),
            "SELECT city, AVG(salary) FROM employees GROUP BY city",
        ),
        (
            Query(table="employees", function="COUNT", group="employees.city", having=(">", 8)),
            "SELECT city FROM employees GROUP BY city HAVING COUNT(*) > 8",
        ),
        (
            Query(table="orders", columns=("orders.id",), order="orders.amount", descending=False, limit=1),
            "SELECT id FROM orders ORDER BY amount LIMIT 1",
        ),
        (
            Query(table="orders", function="COUNT", measure="orders.status", distinct=True),
            "SELECT COUNT(DISTINCT status) FROM orders",
        ),
    ],
)
def test_sql(query: Query, sql: str) -> None:
    assert query.sql() == sql


def test_a_quote_in_a_constant_is_doubled() -> None:
    query = Query(table="customers", columns=("customers.id",), where=(Condition("customers.name", "=", ("O'Hara",)),))
    assert query.sql() == "SELECT id FROM customers WHERE name = 'O''Hara'"


def test_paths_follow_the_foreign_keys() -> None:
    assert path("departments", "projects") == ("departments", "employees", "assignments", "projects")
    assert path("orders", "orders") == ("orders",)
    with pytest.raises(KeyError):
        path("orders", "suppliers")


def test_a_composition_forgets_constants_and_the_order_of_conditions() -> None:
    city, pay = Condition("employees.city", "=", ("Oslo",)), Condition("employees.salary", ">", (52000,))
    first = Query(table="employees", columns=("employees.name",), where=(city, pay), order="employees.salary", limit=5)
    other = Condition("employees.city", "=", ("Rome",))
    second = Query(
        table="employees", columns=("employees.name",), where=(pay, other), order="employees.salary", limit=7
    )
    assert first.composition() == second.composition()
    assert "Oslo" not in first.composition() and "5" not in first.composition()
    one = Query(table="employees", columns=("employees.name",), where=(city, pay), order="employees.salary", limit=1)
    assert one.composition() != first.composition()


def test_weaker_queries_leave_out_one_thing_each() -> None:
    city, pay = Condition("employees.city", "=", ("Oslo",)), Condition("employees.salary", ">", (52000,))
    query = Query(
        table="employees", columns=("employees.name",), where=(city, pay), order="employees.hire_date", limit=5
    )
    assert [q.sql().removeprefix("SELECT name FROM employees ") for q in query.weaker()] == [
        "WHERE salary > 52000 ORDER BY hire_date DESC LIMIT 5",
        "WHERE city = 'Oslo' ORDER BY hire_date DESC LIMIT 5",
        "WHERE city = 'Oslo' AND salary > 52000 ORDER BY hire_date DESC",
        "WHERE city = 'Oslo' AND salary > 52000 ORDER BY hire_date LIMIT 5",
    ]
    joined = Query(table="employees", function="COUNT", where=(Condition("orders.amount", ">", (900,)),))
    assert [q.sql() for q in joined.weaker()] == [
        "SELECT COUNT(*) FROM employees",
        "SELECT COUNT(DISTINCT e.id) FROM employees e JOIN orders o ON o.employee_id = e.id",
    ]
    counted = Query(table="employees", function="COUNT", group="employees.city", having=("<", 8))
    assert [q.sql() for q in counted.weaker()] == ["SELECT city FROM employees GROUP BY city HAVING COUNT(*) > -1"]
