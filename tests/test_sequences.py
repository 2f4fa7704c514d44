"""What backends compute from a sequence table once for all layers of a forward."""

from __future__ import annotations

from weakref import ref

import pytest
import torch

from moba_hf.hf.layout import Layout
from moba_hf.hf.rows import Masks, Rows
from moba_hf.op.sequences import Sequences, batched_table, constant_table, covers_queries, derived


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

    @pytest.mark.parametrize("padded", [False, True])
    def test_the_parts_of_a_forward_are_made_once(self, padded: bool) -> None:
        masks = Masks(torch.tensor([[True] * 4, [False, True, True, True]])) if padded else None
        layout = Rows(2, 4, 4, 0, "cpu", masks).layout({}, torch.device("cpu"))
        make = Counter()
        parts = [layout.between(1, 3) for _ in range(2)]
        assert [derived(part.sequences.table, "a", make) for part in parts] == [1, 1]
        assert covers_queries(parts[0].sequences.table) != padded
        other = layout.between(0, 3).sequences.table
        assert (derived(other, "a", make), other.tolist()) == (
            2,
            [[0, 0, 3, 0, 3], [1, int(padded), 3, int(padded), 3]],
        )

    def test_the_table_on_another_device_is_constant(self) -> None:
        layout = Rows(2, 4, 4, 0, "cpu").layout({}, torch.device("cpu"))
        make, moved = Counter(), layout.to(torch.device("meta"))
        assert moved.sequences.table.device.type == "meta"
        assert [derived(moved.sequences.table, "a", make) for _ in range(2)] == [1, 1]
        assert covers_queries(moved.sequences.table)
        derived(layout.sequences.table, "a", make)
        again = layout.to(torch.device("cpu"))
        assert derived(again.sequences.table, "a", make) == 2  # the same table, with its results

    def test_parts_and_copies_of_any_other_table_are_evaluated_again(self) -> None:
        layout = Layout(Sequences(batched_table(1, 4, 4, torch.device("cpu")), 4, 4), whole=True)
        make = Counter()
        for other in (layout.between(1, 3), layout.to(torch.device("meta"))):
            seen = [derived(other.sequences.table, "a", make) for _ in range(2)]
            assert seen[0] != seen[1]

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
