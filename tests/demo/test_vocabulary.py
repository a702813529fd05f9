from contextlib import closing

from demo import vocabulary
from demo.database import database_in_memory
from demo.frames import Words


def test_every_column_with_a_word_is_in_the_database() -> None:
    columns = [*vocabulary.SHOWN.values(), *vocabulary.MEASURES]
    columns += [column for groups in vocabulary.GROUPS.values() for column in groups]
    columns += [f"{table}.{column}" for table, extras in vocabulary.EXTRAS.items() for column in extras]
    columns += [column for key, _, shown, _, _ in vocabulary.LOOKUPS for column in (key, shown)]
    columns += [column for column, _ in vocabulary.BEST]
    with closing(database_in_memory()) as connection:
        for column in columns:
            table, name = column.split(".")
            connection.execute(f"SELECT {name} FROM {table}")


def test_held_out_words_are_not_seen() -> None:
    tables = (vocabulary.FUNCTIONS, vocabulary.DATE_FUNCTIONS, vocabulary.MORE, vocabulary.ABOVE, vocabulary.MOST)
    every: list[Words] = [
        words for table in (*tables, vocabulary.DATE_MOST, vocabulary.BEST) for words in table.values()
    ]
    every += [own for *_, own in vocabulary.LOOKUPS]
    for words in every:
        assert not set(words.seen) & set(words.held)
