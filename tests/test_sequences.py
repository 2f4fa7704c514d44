"""What backends compute from a sequence table once for all layers of a forward."""

from __future__ import annotations

from weakref import ref

import torch

from moba_hf.hf.rows import Rows
from moba_hf.op.sequences import Sequences, batched_table, constant_table, derived


class Counter:
    """Counts how often a value is made."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


class TestDerived:
    def test_a_constant_table_is_evaluated_once_per_key(self) -> None:
        make, table = Counter(), constant_table(torch.zeros(1, 5, dtype=torch.int32))
        assert [derived(table, key, make) for key in ("a", "b", "a")] == [1, 2, 1]

    def test_equal_tables_are_kept_apart(self) -> None:
        make = Counter()
        tables = [constant_table(torch.zeros(1, 5, dtype=torch.int32)) for _ in range(2)]
        assert [derived(table, "a", make) for table in tables] == [1, 2]

    def test_any_other_table_is_evaluated_again(self) -> None:
        make, table = Counter(), torch.zeros(1, 5, dtype=torch.int32)
        assert [derived(table, "a", make) for _ in range(2)] == [1, 2]

    def test_results_go_with_their_table(self) -> None:
        table = constant_table(torch.zeros(1, 5, dtype=torch.int32))
        kept = ref(derived(table, "a", Counter))
        assert kept() is not None
        del table
        assert kept() is None

    def test_the_table_of_a_forward_is_constant(self) -> None:
        layout = Rows(2, 4, 4, 0, "cpu").layout({}, torch.device("cpu"))
        make = Counter()
        assert [derived(layout.sequences.table, "a", make) for _ in range(2)] == [1, 1]

    def test_the_table_of_a_part_of_the_rows_is_not(self) -> None:
        layout = Rows(2, 4, 4, 0, "cpu").layout({}, torch.device("cpu"))
        make = Counter()
        part = layout.between(1, 3).sequences.table
        assert [derived(part, "a", make) for _ in range(2)] == [1, 2]

    def test_operators_see_the_same_table(self) -> None:
        seen: list[int] = []
        table = constant_table(batched_table(1, 4, 4, torch.device("cpu")))

        @torch.library.custom_op("moba_hf_test::look", mutates_args=())
        def look(table: torch.Tensor) -> torch.Tensor:
            seen.append(derived(table, "a", lambda: 1))
            return table.clone()

        where = Sequences(table, 4, 4)
        look(where.table)
        assert derived(table, "a", lambda: 7) == 1
