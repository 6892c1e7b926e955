"""The list of rows that cannot be used."""

import json
import sys
from pathlib import Path

import pytest

from audiophi.training.bad_rows import BadRows


def test_processes_list_a_row_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    first, second = BadRows(path, 1.0), BadRows(path, 1.0)
    for number in range(4):
        first.add("set", number, f"id{number}", "no \udcff text")
        second.add("set", 5 - number, f"id{5 - number}", "no \udcff text")
    listed = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    assert sorted(listed) == list(range(6)) and len(first) == len(second) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what was read")
def test_the_list_is_not_read_again_for_every_row(tmp_path):
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    bad, before = BadRows(tmp_path / "bad.jsonl", 1.0), read()
    for number in range(500):
        bad.add("set", number, f"id{number}", "no such file")
    assert read() - before < 10 * bad.path.stat().st_size
