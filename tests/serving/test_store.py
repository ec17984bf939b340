"""Pictures kept in memory: for a while, and never more than allowed."""

from __future__ import annotations

from fewstep.serving.store import PictureStore


def test_a_file_is_kept_until_it_expires() -> None:
    now = [0.0]
    store = PictureStore(10, 1000, 60, clock=lambda: now[0])
    name = store.put(b"abc", "image/png")
    now[0] = 59.9
    kept = store.get(name)
    assert kept is not None
    assert (kept.content, kept.media_type) == (b"abc", "image/png")
    now[0] = 60.0
    assert store.get(name) is None
    assert (len(store), store.size) == (0, 0)


def test_the_oldest_make_room() -> None:
    store = PictureStore(3, 10, 60)
    names = [store.put(b"ab", "image/png") for _ in range(4)]
    assert [store.get(name) is not None for name in names] == [False, True, True, True]
    large = store.put(b"12345678", "image/png")
    assert [store.get(name) is not None for name in [*names, large]] == [False, False, False, True, True]
    assert store.size == 10
    assert store.get(store.put(b"x" * 11, "image/png")) is None
    assert (len(store), store.size) == (0, 0)


def test_names_cannot_be_guessed() -> None:
    store = PictureStore(500, 10_000, 60)
    names = {store.put(b"x", "image/png") for _ in range(500)}
    assert len(names) == 500
    assert min(map(len, names)) >= 43  # 256 bits
    assert store.get("../../etc/passwd") is None
