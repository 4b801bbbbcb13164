import pytest

from i2am import memory


@pytest.mark.parametrize(
    ("limit", "free"),
    [("1000000", 1_000_000 - 700_000 + 5_000), ("600000", 0), ("max", None)],
    ids=["limited", "exceeded", "unlimited"],
)
def test_the_limit_of_a_container_counts(limit, free, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    without = memory.available_memory()
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 695000\ninactive_file 5000\n")
    found = memory.available_memory()
    if free is None:
        assert found == pytest.approx(without, rel=0.5)
    else:
        assert found == free


def test_available_memory_is_plausible():
    available = memory.available_memory()
    assert available is not None
    assert 1 << 24 < available < 1 << 46
