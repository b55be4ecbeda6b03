"""The table of slow tests."""

import ast
import functools

from tests.slow import TABLE, find_slow, is_slow, read_table


def test_each_slow_test_exists():
    @functools.cache
    def functions(path):
        tree = ast.parse((TABLE.parents[1] / path).read_text())
        return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}

    for name in read_table():
        path, _, function = name.partition("::")
        assert not function or function in functions(path), name


def test_slow_are_functions_whose_tests_take_long_and_modules_whose_fixtures_do():
    log = (
        "....." * 10_000 + "\n"
        "0.50s call     tests/a/test_a.py::test_long[x-1]\n"
        "0.20s setup    tests/a/test_a.py::test_long[x-2]@store\n"
        "0.20s call     tests/a/test_a.py::test_mean[1]\n"
        "0.06s call     tests/a/test_a.py::test_mean[2]\n"
        "9.00s teardown tests/a/test_a.py::test_mean[2]\n"
        "2.50s setup    tests/b/test_b.py::test_first\n"
        "0.01s call     tests/b/test_b.py::test_first\n"
        "0.01s call     tests/b/test_b.py::test_second@/tmp/tests/b/test_b.py\n"
    )
    assert find_slow(log) == {"tests/a/test_a.py::test_long": 0.7, "tests/b/test_b.py": 2.52}
    slow = frozenset(find_slow(log))
    assert is_slow("tests/b/test_b.py::test_second[3]", slow) and is_slow("tests/a/test_a.py::test_long[y]", slow)
    assert not is_slow("tests/a/test_a.py::test_mean[1]", slow)
