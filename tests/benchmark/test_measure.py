from keras_edifice.benchmark.measure import in_turn, seconds


def test_each_call_is_warmed_up_and_timed():
    calls = []
    times = seconds(lambda: calls.append(0), least=0.0, calls=5)
    assert len(times) == 5 and len(calls) == 6
    assert all(time > 0 for time in times)


def test_calls_take_turns():
    order = []
    times = in_turn([lambda: order.append("a"), lambda: order.append("b")], 0.0, 3)
    assert order == ["a", "b"] * 4
    assert [len(own) for own in times] == [3, 3]


def test_at_least_so_many_seconds_are_spent():
    times = seconds(lambda: sum(range(1000)), least=0.01)
    assert sum(times) >= 0.01
